"""fused_reg beside torchao's pruning-aware training (PAT): the same networks for scikit-learn's digits, the same
groups, the same shares of zeros, the same optimizers and schedules; what accuracy is left?

    python examples/pat.py

A convolutional network loses output channels, a transformer loses heads of attention and hidden neurons. Both packages
take a share of zeros as the aim; for the convolutions there is also group lasso, whose strength is searched until the
share is that. Without torchao only fused_reg's part runs. ``python -m benchmarks.pat`` measures steps and memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import Any

import pat_results
import torch
from common import extras, parser, prepare, save_results
from pat_setups import (
    PruneOptimizer,
    Setup,
    Transformer,
    dense_convolutions,
    dense_transformer,
    ours_convolutions,
    ours_lasso,
    ours_transformer,
    pat_convolutions,
    pat_lasso,
    pat_transformer,
    size,
    zero_groups,
)
from prune import CHANNELS, accuracy, load, network, one_thread
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

with extras():
    from rich.console import Console
    from rich.progress import Progress

SHARES = [0.5, 0.75, 0.875]  # of every tensor's groups a whole number
EPOCHS, BATCH = 20, 64
WEAKEST, STRONGEST, TRAININGS = 1e-3, 1.0, 8  # of the search for a strength, at most so many trainings


@dataclass
class Network:
    make: Callable[[], nn.Module]
    dense: Callable[[nn.Module], Optimizer]  # the optimizer without zeros
    aims: dict[str, Setup]  # which take the share
    searched: dict[str, Setup] = field(default_factory=dict)  # which take a strength


NETWORKS = {
    "convolutions": Network(
        partial(network, CHANNELS),
        dense_convolutions,
        {"fused_reg, zeros": ours_convolutions, "PAT, MinSparsityConstraint": pat_convolutions},
        {"fused_reg, group lasso": ours_lasso, "PAT, group lasso": pat_lasso},
    ),
    "transformer": Network(
        Transformer,
        dense_transformer,
        {"fused_reg, zeros": ours_transformer, "PAT, MinSparsityConstraint": pat_transformer},
    ),
}


def train(of: Network, seed: int, epochs: int, setup: Callable[[nn.Module, int], Optimizer]) -> dict[str, Any]:
    """One training; the seed is that of the weights, the batches and the training images."""
    data = load(seed)
    torch.manual_seed(seed)
    model, (x, y) = of.make(), data.train
    steps = epochs * -(-len(x) // BATCH)
    optimizer = setup(model, steps)
    rate = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, cycle_momentum=False)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    zeros = {name: mask.float().mean().item() for name, mask in zero_groups(model).items()}
    share = torch.cat(list(zero_groups(model).values())).float().mean().item()
    return {"accuracy": round(accuracy(model, data.test), 4), "share": share, "zeros": zeros, "trainings": 1}


def aimed(of: Network, seed: int, epochs: int, setup: Setup, share: float) -> dict[str, Any]:
    return train(of, seed, epochs, lambda model, steps: setup(model, share, steps))


def searched(of: Network, seed: int, epochs: int, setup: Setup, share: float) -> dict[str, Any]:
    """Halves the range of the strengths' logarithms until the share is within a point of that wanted; the training that
    came nearest, if none is."""
    weakest, strongest, found = WEAKEST, STRONGEST, []
    while len(found) < TRAININGS and not (found and abs(found[-1]["share"] - share) <= 0.01):
        strength = sqrt(weakest * strongest)
        found.append(aimed(of, seed, epochs, setup, strength) | {"strength": strength})
        weakest, strongest = (weakest, strength) if found[-1]["share"] > share else (strength, strongest)
    return min(found, key=lambda one: abs(one["share"] - share)) | {"trainings": len(found)}


def compare(of: Network, seed: int, epochs: int, shares: list[float]) -> dict[str, Any]:
    """One seed: without zeros, and of each method and share what came out."""
    numbers: dict[str, Any] = {"dense": train(of, seed, epochs, lambda model, steps: of.dense(model))}
    for ways, run in ((of.aims, aimed), (of.searched, searched)):
        for name, setup in available(ways).items():
            numbers[name] = {str(share): run(of, seed, epochs, setup, share) for share in shares}
    return numbers


def available(ways: dict[str, Setup]) -> dict[str, Setup]:
    return {name: setup for name, setup in ways.items() if PruneOptimizer or not name.startswith("PAT")}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parser(__doc__, "pat").parse_args(arguments)
    folder = prepare(given.out)
    seeds, epochs, shares = (min(given.seeds, 2), 8, [0.5]) if given.quick else (given.seeds, EPOCHS, SHARES)
    results: dict[str, Any] = {"epochs": epochs, "torchao": pat_results.version(), "networks": {}}
    if PruneOptimizer is None:
        print("pat.py: torchao is missing, and with it one half; run pip install 'fused_reg[pat]'", file=sys.stderr)
    with one_thread(), Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("training", total=seeds * len(NETWORKS))
        for name, of in NETWORKS.items():
            runs = []
            for seed in range(seeds):
                runs.append(compare(of, seed, epochs, shares))
                progress.advance(bar)
            sizes = {way: size(setup) for way, setup in available(of.aims | of.searched).items()}
            results["networks"][name] = {"code": sizes, "seeds": runs}
    save_results(folder, "pat", results)
    pat_results.report(results)
    print("pictures:", *pat_results.draw(results, folder))
    return results


if __name__ == "__main__":
    main()
