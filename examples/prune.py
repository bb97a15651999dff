"""A convolutional network for scikit-learn's digits that loses channels: group norms over rows make whole output
channels exactly zero in training, these are cut out, and the smaller network gives the same outputs.

    python examples/prune.py

It is compared with others that train for as many epochs: one without a penalty that is cut to the same numbers of
channels by magnitude, both fine-tuned after the cut, and one that is as small from the start. The strength is chosen on
validation images, the accuracy is that of test images. Seeds change the weights, the batches and the validation images.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import prune_results
import torch
from common import extras, parser, prepare, save_results
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from fused_reg import Regularizer

with extras():
    from rich.console import Console
    from rich.progress import Progress
    from sklearn.datasets import load_digits

CHANNELS = [16, 32, 32]
STRENGTHS = [0.01, 0.02, 0.03]
EPOCHS, TUNING = 20, 8  # all epochs, and how many of them follow the cut
LEARNING_RATE, MOMENTUM, BATCH = 0.1, 0.9, 64
TOLERANCE = 0.01  # the strongest penalty that costs at most this much of the validation accuracy is chosen

Images = tuple[Tensor, Tensor]  # x: [n, 1, 8, 8], y: [n]


@dataclass
class Data:
    train: Images
    validation: Images
    test: Images


def load(seed: int) -> Data:
    """The digits: every fourth image for the test, whatever the seed; a fifth of the others, drawn, validates."""
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    test = torch.arange(len(x)) % 4 == 0
    rest = (~test).nonzero().flatten()
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    validation, train = rest[: len(rest) // 5], rest[len(rest) // 5 :]
    return Data(*((x[part], y[part]) for part in (train, validation, test)))


def network(channels: list[int]) -> nn.Sequential:
    """No bias in the penalized layers: a channel with zero weights then gives exactly zero, also where the next layer
    pads, and can be cut. With a bias it would give a constant, which padding makes another number at the border."""
    a, b, c = channels
    layers = {
        "conv1": nn.Conv2d(1, a, 3, padding=1, bias=False),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(a, b, 3, padding=1, bias=False),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "conv3": nn.Conv2d(b, c, 3, padding=1, bias=False),
        "relu3": nn.ReLU(),
        "pool3": nn.MaxPool2d(2),
        "flatten": nn.Flatten(),
        "linear": nn.Linear(c * 2 * 2, 10),
    }
    return nn.Sequential(OrderedDict(layers))


def norms(model: nn.Sequential) -> list[Tensor]:
    """The norm of each output channel's weights, for each convolution."""
    return [layer.weight.detach().flatten(1).norm(dim=1) for layer in model if isinstance(layer, nn.Conv2d)]


def alive(model: nn.Sequential) -> list[Tensor]:
    """Which output channels of each convolution are not exactly zero: [channels], bool."""
    return [norm > 0 for norm in norms(model)]


def strongest(model: nn.Sequential, channels: list[int]) -> list[Tensor]:
    """The same numbers of channels, those of the largest norms."""
    kept = [torch.zeros_like(norm, dtype=torch.bool) for norm in norms(model)]
    for mask, norm, count in zip(kept, norms(model), channels, strict=True):
        mask[norm.topk(count).indices] = True
    return kept


def counts(kept: list[Tensor]) -> list[int]:
    return [int(mask.sum()) for mask in kept]


@torch.no_grad()
def cut(model: nn.Sequential, kept: list[Tensor]) -> nn.Sequential:
    """A smaller network with the kept output channels, in which each next layer has lost the inputs that were cut."""
    if not all(counts(kept)):
        raise ValueError(f"a layer has no channels left, {counts(kept)}; take a smaller strength")
    small = network(counts(kept))
    inputs = torch.ones(1, dtype=torch.bool)
    for name, outputs in zip(("conv1", "conv2", "conv3"), kept, strict=True):
        weight = model.get_submodule(name).weight
        small.get_submodule(name).weight.copy_(weight[outputs][:, inputs])
        inputs = outputs
    small.linear.weight.copy_(model.linear.weight[:, inputs.repeat_interleave(4)])  # 2 x 2 pixels of each channel
    small.linear.bias.copy_(model.linear.bias)
    return small


def train(model: nn.Sequential, images: Images, epochs: int, strength: float = 0.0) -> list[list[int]]:
    """Trains in place, and returns the channels that are left after each epoch."""
    x, y = images
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, cycle_momentum=False)
    if strength:
        penalty(model, strength, steps).attach(optimizer, mode="prox")
    left = []
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
        left.append(counts(alive(model)))
    return left


def penalty(model: nn.Sequential, strength: float, steps: int) -> Regularizer:
    """The norms of the channels' weights. With momentum each gradient counts 1 / (1 - MOMENTUM) times, but a proximal
    step once: so much stronger it has its rest where loss + strength * norms has its minimum. It grows over half of the
    training: at once, it would end layers that have not learned anything yet."""
    full = strength / (1 - MOMENTUM)
    return Regularizer(model, l2_norm=lambda step: full * min(1.0, 2 * step / steps), group="row", include="conv*")


@torch.no_grad()
def accuracy(model: nn.Sequential, images: Images) -> float:
    x, y = images
    return (model(x).argmax(dim=1) == y).float().mean().item()


def parameters(model: nn.Sequential) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def flops(model: nn.Sequential) -> int:
    """Of one image; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, 8, 8))
    return counter.get_total_flops()


@torch.inference_mode()
def times_faster(small: nn.Sequential, large: nn.Sequential, batch: int, rounds: int) -> float:
    """How many times the small network's latency the large one's is: medians of rounds in which both take turns."""
    x = torch.rand(batch, 1, 8, 8)
    seconds: dict[nn.Sequential, list[float]] = {small: [], large: []}
    for _ in range(rounds):
        for model, taken in seconds.items():
            begin = time.perf_counter()
            model(x)
            taken.append(time.perf_counter() - begin)
    return statistics.median(seconds[large]) / statistics.median(seconds[small])


def largest_difference(small: nn.Sequential, model: nn.Sequential, x: Tensor) -> float:
    """Of any output, relative to the largest output."""
    with torch.no_grad():
        expected = model(x)
        return ((small(x) - expected).abs().max() / expected.abs().max()).item()


class Run:
    """One seed: its networks, and its numbers (all accuracies on validation and test images)."""

    def __init__(self, seed: int, epochs: int, tuning: int) -> None:
        """Trains without a penalty; of all epochs, tuning follow the cut."""
        self.seed, self.epochs, self.tuning = seed, epochs, tuning
        self.data = load(seed)
        self.dense, _ = self.trained(CHANNELS, epochs)
        self.uncut, _ = self.trained(CHANNELS, epochs - tuning)
        self.penalized: dict[float, nn.Sequential] = {}
        self.pruned: dict[float, nn.Sequential] = {}
        self.numbers: dict[str, Any] = {"dense": self.scores(self.dense), "strengths": {}}

    def trained(self, channels: list[int], epochs: int, strength: float = 0.0) -> tuple[nn.Sequential, list[list[int]]]:
        torch.manual_seed(self.seed)
        model = network(channels)
        return model, train(model, self.data.train, epochs, strength)

    def tuned(self, model: nn.Sequential) -> nn.Sequential:
        model = copy.deepcopy(model)
        train(model, self.data.train, self.tuning)
        return model

    def scores(self, model: nn.Sequential) -> dict[str, float]:
        return {"validation": accuracy(model, self.data.validation), "test": accuracy(model, self.data.test)}

    def prune(self, strength: float) -> None:
        penalized, channels = self.trained(CHANNELS, self.epochs - self.tuning, strength)
        pruned = cut(penalized, alive(penalized))
        self.penalized[strength], self.pruned[strength] = penalized, pruned
        magnitude = cut(self.uncut, strongest(self.uncut, channels[-1]))
        self.numbers["strengths"][str(strength)] = {
            "channels": channels,
            "parameters": parameters(pruned),
            "flops": flops(pruned),
            "largest_difference": largest_difference(pruned, penalized, self.data.test[0]),
            "penalized": self.scores(penalized),
            "pruned": self.scores(pruned),
            "pruned, fine-tuned": self.scores(self.tuned(pruned)),
            "magnitude": self.scores(magnitude),
            "magnitude, fine-tuned": self.scores(self.tuned(magnitude)),
        }

    def compare(self, strength: float, rounds: int) -> None:
        """What only the strength that was chosen gets: a network of that size from the start, and the latency."""
        pruned, numbers = self.pruned[strength], self.numbers["strengths"][str(strength)]
        numbers["small from the start"] = self.scores(self.trained(numbers["channels"][-1], self.epochs)[0])
        numbers["times_faster"] = {
            "1": times_faster(pruned, self.dense, 1, 10 * rounds),
            "256": times_faster(pruned, self.dense, 256, rounds),
        }


def choose(runs: list[Run], strengths: list[float]) -> float:
    """The strongest penalty that, over the seeds, costs at most TOLERANCE of the validation accuracy."""

    def lost(strength: float) -> float:
        found = [run.numbers["strengths"][str(strength)]["pruned, fine-tuned"] for run in runs]
        dense = [run.numbers["dense"] for run in runs]
        return statistics.mean(d["validation"] - f["validation"] for d, f in zip(dense, found, strict=True))

    return max((strength for strength in strengths if lost(strength) <= TOLERANCE), default=min(strengths))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    given = parser(__doc__, "prune").parse_args(arguments)
    folder = prepare(given.out)
    seeds, epochs, tuning = (min(given.seeds, 2), 10, 3) if given.quick else (given.seeds, EPOCHS, TUNING)
    strengths = STRENGTHS[1:2] if given.quick else STRENGTHS

    runs = []
    with one_thread(), Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=seeds * (len(strengths) + 2))
        for seed in range(seeds):
            runs.append(Run(seed, epochs, tuning))
            progress.advance(task)
            for strength in strengths:
                runs[-1].prune(strength)
                progress.advance(task)
        chosen = choose(runs, strengths)
        for run in runs:
            run.compare(chosen, rounds=5 if given.quick else 30)
            progress.advance(task)

    results = {
        "chosen": str(chosen),
        "epochs": epochs,
        "fine_tuning": tuning,
        "dense": {"channels": CHANNELS, "parameters": parameters(runs[0].dense), "flops": flops(runs[0].dense)},
        "norms": [  # of the first seed: without and with the penalty
            [norm.tolist() for norm in norms(model)] for model in (runs[0].uncut, runs[0].penalized[chosen])
        ],
        "seeds": [run.numbers for run in runs],
    }
    save_results(folder, "prune", results)
    prune_results.report(results)
    print("\npictures:", *prune_results.draw(results, folder))
    return results


@contextmanager
def one_thread() -> Iterator[None]:
    """Layers this small take longer on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
