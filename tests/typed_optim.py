"""What type checkers know of `fused_reg.optim`. mypy reads it with the package: a line that should fail says so."""

import torch

from fused_reg.optim import SGD, AdamW


def use(w: torch.nn.Parameter) -> tuple[torch.optim.AdamW, float, torch.Tensor]:
    optimizer = AdamW([w], 1e-3, weight_decay=0.1, l1=1e-5, l2=torch.tensor(0.1), prox="preconditioned")
    optimizer.step()
    loss: float = optimizer.step(lambda: 3.0)
    SGD([w], lr=0.1, prox="both")  # type: ignore[arg-type]
    SGD([w], lr=0.1, l2=0.1, toward="start", importance=[w.detach().abs()], lazy_rows=True)
    SGD([w], lr=0.1, l2=0.1, lazy_rows="yes")  # type: ignore[arg-type]
    return optimizer, loss, optimizer.penalty
