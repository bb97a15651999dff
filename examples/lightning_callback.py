"""A penalty in Lightning by `fused_reg.integrations.lightning`, and the check that it is the plain loop.

The network knows nothing of the penalty, and the trainer accumulates gradients.

    python examples/lightning_callback.py
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fused_reg import fused_penalty

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning's own imports deprecate
        import lightning.pytorch as pl

        from fused_reg.integrations.lightning import RegularizerCallback
except ImportError:
    sys.exit("examples/lightning_callback.py: needs Lightning; pip install lightning")

STRENGTHS = {"l1": 1e-3, "l2": 1e-3}
ACCUMULATE = 2
QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


class Net(pl.LightningModule):
    """Knows nothing of the penalty."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        # In float32 a rounding may flip the sign of a weight near zero, and the gradient of L1 with it.
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 8, generator=generator, dtype=torch.float64)
    y = x[:, :1] - 2 * x[:, 1:2] + 0.1 * torch.randn(len(x), 1, generator=generator)
    return list(zip(x.split(16), y.split(16), strict=True))


def plain_loop(epochs: int) -> list[Tensor]:
    """The penalty in the loss, once for each step of ``ACCUMULATE`` batches."""
    net = Net()
    optimizer = net.configure_optimizers()
    for _ in range(epochs):
        for i, batch in enumerate(batches()):
            loss = net.training_step(batch, i) / ACCUMULATE
            if (i + 1) % ACCUMULATE:
                loss.backward()
            else:
                (loss + fused_penalty(net.parameters(), **STRENGTHS)).backward()
                optimizer.step()
                optimizer.zero_grad()
    return [p.detach() for p in net.parameters()]


def with_lightning(epochs: int, callback: RegularizerCallback, **arguments: Any) -> list[Tensor]:
    """The same training by Lightning; ``arguments`` are its trainer's."""
    net = Net()
    trainer = pl.Trainer(
        max_epochs=epochs, accumulate_grad_batches=ACCUMULATE, callbacks=[callback], **QUIET, **arguments
    )
    trainer.fit(net, torch.utils.data.DataLoader(batches(), batch_size=None))
    return [p.detach() for p in net.parameters()]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args(arguments).epochs
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # hints on workers and on the logger
    warnings.filterwarnings("ignore", category=DeprecationWarning)

    callback = RegularizerCallback(**STRENGTHS)
    ours, loop = with_lightning(epochs, callback), plain_loop(epochs)
    unpenalized = with_lightning(epochs, RegularizerCallback(l1=0.0))
    difference = max((a - b).abs().max().item() for a, b in zip(ours, loop, strict=True))
    effect = max((a - b).abs().max().item() for a, b in zip(ours, unpenalized, strict=True))
    print(callback.regularizer)
    print(f"penalty of the last step: {callback.penalty.item():.6f}")
    print(f"largest difference of a weight from the plain loop: {difference:.1e}; from no penalty: {effect:.1e}")
    assert difference < 1e-9 < 1e-3 < effect

    weights = with_lightning(epochs, RegularizerCallback(mode="prox", l1=0.3, weights_only=True))
    share = sum((p == 0).sum().item() for p in weights) / sum(p.numel() for p in weights)
    print(f'mode="prox": {100 * share:.0f} % of all weights are exactly zero')
    assert share > 0.1
    return difference


if __name__ == "__main__":
    main()
