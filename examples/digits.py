"""One small network, trained three times from one seed: with the hand-written loop, with ``fused_penalty``, and with
``weight_decay = 2 * l2``. All three are the same training, and the table shows it.

    python examples/digits.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import extras
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_reg import fused_penalty

with extras():
    from sklearn.datasets import load_digits

L2 = 1e-3


@dataclass
class Run:
    """What one training left behind."""

    name: str
    trajectory: list[Tensor]  # all weights after each epoch
    losses: list[tuple[float, float]]  # task loss and penalty, of the whole training set, after each epoch
    accuracy: float  # on the test set
    seconds: float


def loop_penalty(model: nn.Module) -> Tensor:
    return L2 * sum((p**2).sum() for p in model.parameters())


def our_penalty(model: nn.Module) -> Tensor:
    return fused_penalty(model.parameters(), l2=L2)


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits: 1,797 images of 8 x 8 pixels, every fourth for the test."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    test = torch.arange(len(x)) % 4 == 0
    return x[~test], y[~test], x[test], y[test]


def train(name: str, epochs: int, penalty: Callable[[nn.Module], Tensor] | None, weight_decay: float = 0.0) -> Run:
    """Train from the same seed, with a penalty in the loss or with the optimizer's weight decay."""
    x, y, x_test, y_test = load()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    run = Run(name, [], [], 0.0, 0.0)
    for _ in range(epochs):
        start = time.perf_counter()
        for batch in torch.randperm(len(x)).split(64):
            loss = cross_entropy(model(x[batch]), y[batch])
            if penalty is not None:
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.seconds += time.perf_counter() - start
        with torch.no_grad():
            run.losses.append((cross_entropy(model(x), y).item(), our_penalty(model).item()))
            run.trajectory.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    with torch.no_grad():
        run.accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
    return run


def largest_difference(run: Run, other: Run) -> float:
    """The largest difference of any weight after any epoch."""
    pairs = zip(run.trajectory, other.trajectory, strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def main(arguments: list[str] | None = None) -> list[Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args(arguments).epochs

    train("warm-up", 1, our_penalty)
    runs = [
        train("loop", epochs, loop_penalty),
        train("fused_penalty", epochs, our_penalty),
        train("weight_decay", epochs, None, weight_decay=2 * L2),
    ]

    print(f"digits, {epochs} epochs, l2 = {L2}, weight_decay = {2 * L2}\n")
    print(f"{'epoch':>5}  " + "  ".join(f"{run.name + ': task loss':>24} {'penalty':>9}" for run in runs))
    for epoch in sorted({0, epochs // 4, epochs // 2, epochs - 1}):
        row = "  ".join(f"{run.losses[epoch][0]:24.6f} {run.losses[epoch][1]:9.6f}" for run in runs)
        print(f"{epoch + 1:5}  {row}")

    print(f"\n{'':14}  {'accuracy':>8}  {'time':>8}  {'largest difference of a weight from the loop':>44}")
    for run in runs:
        print(f"{run.name:14}  {run.accuracy:8.4f}  {run.seconds:6.2f} s  {largest_difference(run, runs[0]):44.2e}")
    return runs


if __name__ == "__main__":
    main()
