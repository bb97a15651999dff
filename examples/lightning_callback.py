"""A `Regularizer` in Lightning: a callback that attaches it to the optimizers, and the check that it is the plain loop.

In a plain loop, five lines, and no line of the step changes:

    regularizer = Regularizer(model, l1=1e-4, weights_only=True)
    attachment = regularizer.attach(optimizer)             # or mode="prox": weights that are exactly zero
    for x, y in batches:
        loss(model(x), y).backward(); optimizer.step(); optimizer.zero_grad()
        log("penalty", attachment.value)

In Lightning, ``Trainer(callbacks=[RegularizerCallback(l1=1e-4, weights_only=True)])``; or the first two lines in
``configure_optimizers``. The penalty comes in once per optimizer step, whatever ``accumulate_grad_batches`` is; after
gradient clipping, which sees the loss's gradient alone; and after the loss scale of ``precision="16-mixed"`` is divided
out. A penalty in ``training_step`` would be in all three.

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

from fused_reg import Regularizer, fused_penalty

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Lightning's own imports deprecate
        import lightning.pytorch as pl
except ImportError:
    sys.exit("examples/lightning_callback.py: needs Lightning; pip install lightning")

STRENGTHS = {"l1": 1e-3, "l2": 1e-3}
ACCUMULATE = 2


class RegularizerCallback(pl.Callback):
    """Attaches ``Regularizer(module, **arguments)`` to every optimizer that holds parameters of it; logs the penalty;
    keeps the schedules' step in the checkpoint.
    """

    def __init__(self, mode: str = "grad", **arguments: Any) -> None:
        self.mode, self.arguments = mode, arguments
        self.regularizer: Regularizer | None = None
        self.attachments: list[Any] = []
        self._state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.regularizer = Regularizer(pl_module, **self.arguments)
        if self._state is not None:
            self.regularizer.load_state_dict(self._state)
        own = {id(p) for _, p in self.regularizer.named_parameters()}
        self.attachments = [
            self.regularizer.attach(optimizer, mode=self.mode)
            for optimizer in trainer.optimizers
            if any(id(p) in own for group in optimizer.param_groups for p in group["params"])
        ]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        values = [attachment.value for attachment in self.attachments]
        if values:
            self.log("penalty", torch.stack(values).sum())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for attachment in self.attachments:
            attachment.remove()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.regularizer is None else self.regularizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict or None


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
        max_epochs=epochs, accumulate_grad_batches=ACCUMULATE, callbacks=[callback], accelerator="cpu", devices=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
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
    print(f"penalty of the last step: {callback.attachments[0].value.item():.6f}")
    print(f"largest difference of a weight from the plain loop: {difference:.1e}; from no penalty: {effect:.1e}")
    assert difference < 1e-9 < 1e-3 < effect

    weights = with_lightning(epochs, RegularizerCallback(mode="prox", l1=0.3, weights_only=True))
    share = sum((p == 0).sum().item() for p in weights) / sum(p.numel() for p in weights)
    print(f'mode="prox": {100 * share:.0f} % of all weights are exactly zero')
    assert share > 0.1
    return difference


if __name__ == "__main__":
    main()
