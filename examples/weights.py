"""One network, trained from the same seed without a penalty, with L1, L2, both (elastic net), and L1 by proximal steps,
by SGD and by Adam: what each does to the weights.

    python examples/weights.py

Writes pictures, numbers and TensorBoard's files to ``out/weights``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_reg import Regularizer
from fused_reg.optim import SGD, Adam

with common.extras():
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from sklearn.datasets import load_digits
    from torch.utils.tensorboard import SummaryWriter

BATCH = 128
SMALL = 1e-3  # above lr * l1, the steps in which L1's gradient goes to and fro over zero


@dataclass(frozen=True)
class Method:
    """A penalty, and how it gets into the training: by its gradient (``prox=False``), or by proximal steps."""

    name: str
    strengths: dict[str, float]
    colour: str  # of palettes for the colour-blind, too
    prox: bool | str = False
    optimizer: type[torch.optim.Optimizer] = SGD
    lr: float = 0.4


METHODS = (
    Method("no penalty", {"l1": 0.0}, "#555555"),
    Method("L1", {"l1": 1e-3}, "#E69F00"),
    Method("L2", {"l2": 1e-3}, "#0072B2"),
    Method("elastic net", {"l1": 5e-4, "l2": 5e-4}, "#009E73"),
    Method("L1, proximal", {"l1": 1e-3}, "#D55E00", prox=True),
    Method("Adam, L1", {"l1": 1e-3}, "#56B4E9", optimizer=Adam, lr=0.01),
    Method("Adam, L1, proximal", {"l1": 1e-3}, "#999933", True, Adam, 0.01),
    Method("Adam, L1, preconditioned", {"l1": 1e-3}, "#CC79A7", "preconditioned", Adam, 0.01),
)


@dataclass
class Run:
    """What one training left behind."""

    method: Method
    before: Tensor  # all weights, without the biases
    after: Tensor
    history: list[tuple[float, float, float]] = field(default_factory=list)  # task loss, penalty, sum |w| by epoch
    zeros: dict[str, float] = field(default_factory=dict)  # the share of exact zeros in each layer
    small: dict[str, float] = field(default_factory=dict)  # the share of weights below SMALL, zeros among them
    accuracy: float = 0.0  # on the test set

    @property
    def task_loss(self) -> float:
        return self.history[-1][0]

    @property
    def penalty(self) -> float:
        return self.history[-1][1]


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The digits: 1,797 images of 8 x 8 pixels, every fourth for the test; centred by the mean of the others."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    test = torch.arange(len(x)) % 4 == 0
    x = x - x[~test].mean(dim=0)
    return x[~test], y[~test], x[test], y[test]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def weights_of(regularizer: Regularizer) -> Tensor:
    return torch.cat([w.detach().flatten() for _, w in regularizer.named_parameters()])


def train(
    method: Method, seed: int, epochs: int, log: SummaryWriter | None = None, advance: Callable[[], None] = lambda: None
) -> Run:
    """Trains from the seed; the penalty is in the optimizer, and the loop knows nothing of it."""
    x, y, x_test, y_test = load()
    torch.manual_seed(seed)
    model = network()
    weights = {"params": [p for p in model.parameters() if p.ndim > 1], **method.strengths}
    biases = {"params": [p for p in model.parameters() if p.ndim == 1]}
    optimizer = method.optimizer([weights, biases], lr=method.lr, prox=method.prox)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)  # proximal steps follow it
    regularizer = Regularizer(model, **method.strengths, weights_only=True)  # reports
    run = Run(method, weights_of(regularizer), torch.empty(0))
    for epoch in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            task_loss = cross_entropy(model(x), y).item()
        report = regularizer.report()
        run.history.append((task_loss, report.rows[-1]["value"], weights_of(regularizer).abs().sum().item()))
        if log is not None:
            log.add_scalar("task_loss", task_loss, epoch)
            for tag, number in report.scalars().items():  # value, norm and share of zeros: of all, and by layer
                log.add_scalar(tag, number, epoch)
        advance()
    run.after = weights_of(regularizer)
    run.zeros = {row["name"]: row["zero_share"] for row in report.rows if row["level"] == "parameter"}
    run.small = {name: (w.abs() < SMALL).float().mean().item() for name, w in regularizer.named_parameters()}
    with torch.no_grad():
        run.accuracy = (model(x_test).argmax(dim=1) == y_test).float().mean().item()
    return run


def train_all(seeds: int, epochs: int, out: Path) -> list[list[Run]]:
    """The runs of each method, one for each seed; those of the first seed are logged."""
    runs = []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(METHODS) * seeds * epochs)
        for method in METHODS:
            # What an earlier run has logged there is hidden.
            with SummaryWriter(out / "tensorboard" / method.name.replace(", ", "-"), purge_step=0) as log:
                own = []
                for seed in range(seeds):
                    progress.update(bar, description=f"{method.name}, seed {seed}")
                    own.append(train(method, seed, epochs, log if seed == 0 else None, lambda: progress.advance(bar)))
                runs.append(own)
    return runs


def draw_histograms(runs: Sequence[Run], seed_note: str) -> Figure:
    """The weights before and after, on shared axes; the exact zeros are a stem, because a bar has a width."""
    figure = Figure(figsize=(9, 7.8), layout="constrained")
    grid = figure.subplots(3, 3, sharex=True, sharey=True)
    limit = max(run.after.abs().max().item() for run in runs)
    total = len(runs[0].after)
    bins = torch.linspace(-limit, limit, 82).tolist()  # an odd number of bins: one is around zero
    for axes, run in zip(grid.flat, runs, strict=False):
        zeros = int((run.after == 0).sum())
        axes.hist(run.after[run.after != 0].tolist(), bins, color=run.method.colour, alpha=0.8, label="after, not zero")
        axes.hist(run.before.tolist(), bins, histtype="step", color="black", linewidth=0.9, label="before")
        if zeros:
            axes.plot([0, 0], [0.7, zeros], color="black", marker="o", markevery=[1], label="after, exactly zero")
        small = int((run.after.abs() < SMALL).sum())
        axes.set_title(f"{run.method.name}\n{zeros:,} exact zeros, {small:,} below {SMALL:g}", fontsize=10)
        axes.set(yscale="log", ylim=(0.7, 1.5 * total))
        axes.label_outer()
    grid[1, 2].xaxis.set_tick_params(labelbottom=True)
    note = grid.flat[-1]
    note.axis("off")
    handles, labels = grid[1, 1].get_legend_handles_labels()
    note.legend(handles, labels, loc="center", title=f"{total:,} weights, {seed_note}")
    figure.supxlabel("weight")
    figure.supylabel("number of weights")
    return figure


def draw_zeros(runs: Sequence[Sequence[Run]], layers: dict[str, str]) -> Figure:
    """The share of exact zeros, and of what is small, in each layer: mean and standard deviation over seeds."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    width = 0.8 / len(runs)
    for axes, share, title in zip(panels, ("zeros", "small"), ("exactly zero", f"below {SMALL:g}"), strict=True):
        for i, own in enumerate(runs):
            shares = 100 * torch.tensor([[getattr(run, share)[name] for name in layers] for run in own])
            places = [layer + (i - (len(runs) - 1) / 2) * width for layer in range(len(layers))]
            deviation = shares.std(dim=0).tolist() if len(own) > 1 else None
            style = {"color": own[0].method.colour, "label": own[0].method.name}
            axes.bar(places, shares.mean(dim=0).tolist(), width, yerr=deviation, **style)
        axes.set_title(title)
        axes.set_xticks(range(len(layers)), layers.values())
        axes.set_ylim(0, 100)
    panels[0].set_ylabel("share of the layer's weights, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_losses(runs: Sequence[Run]) -> Figure:
    """Task loss and penalty over time; and the way through the plane of task loss and size, which all share."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    panels = figure.subplot_mosaic([["task", "plane"], ["penalty", "plane"]], width_ratios=[1, 1.1])
    marks = sorted({0, len(runs[0].history) // 5 - 1, len(runs[0].history) - 1})
    for run in runs:
        task, penalty, size = zip(*run.history, strict=True)
        style = {"color": run.method.colour, "linestyle": "--" if run.method.prox else "-"}
        epochs = range(1, len(task) + 1)
        panels["task"].plot(epochs, task, **style)
        if max(penalty) > 0:
            panels["penalty"].plot(epochs, penalty, **style)
        panels["plane"].plot(size, task, marker="o", markevery=marks, markersize=4, label=run.method.name, **style)
    panels["task"].sharex(panels["penalty"])
    panels["task"].tick_params(labelbottom=False)
    panels["task"].set(yscale="log", ylabel="task loss, nats")
    panels["penalty"].set(ylim=0, xlabel="epoch", ylabel="penalty, nats")
    panels["plane"].set(yscale="log", xlabel="sum of |w|", ylabel="task loss, nats")
    panels["plane"].set_title(f"dots: after epochs {', '.join(str(mark + 1) for mark in marks)}", fontsize=10)
    panels["plane"].legend()
    return figure


def summary(own: Sequence[Run]) -> dict[str, Any]:
    """The numbers of one method, for each seed."""
    return {
        "strengths": own[0].method.strengths,
        "optimizer": own[0].method.optimizer.__name__,
        "prox": own[0].method.prox,
        "test_accuracy": [run.accuracy for run in own],
        "exact_zeros": [int((run.after == 0).sum()) for run in own],
        "below_1e-3": [int((run.after.abs() < SMALL).sum()) for run in own],
        "task_loss": [run.task_loss for run in own],
        "penalty": [run.penalty for run in own],
        "zeros_by_layer": [run.zeros for run in own],
    }


def print_table(runs: Sequence[Sequence[Run]]) -> None:
    heads = ("test accuracy", "exact zeros, %", "task loss", "penalty", "sum of both")
    print(f"{'':24}", *(f"{head:>17}" for head in heads))
    for own in runs:
        columns = (
            common.spread([run.accuracy for run in own]),
            common.spread([100 * (run.after == 0).float().mean().item() for run in own], digits=1),
            common.spread([run.task_loss for run in own]),
            common.spread([run.penalty for run in own]),
            common.spread([run.task_loss + run.penalty for run in own]),
        )
        print(f"{own[0].method.name:24}", *(f"{column:>17}" for column in columns))


def main(arguments: list[str] | None = None) -> list[list[Run]]:
    options = common.parser(__doc__, "weights").parse_args(arguments)
    out = common.prepare(options.out)
    torch.set_num_threads(1)  # a network this small only waits for a second thread
    seeds, epochs = (min(options.seeds, 2), 10) if options.quick else (options.seeds, 50)

    runs = train_all(seeds, epochs, out)
    first = [own[0] for own in runs]
    layers = {name: f"{name}\n{w.shape[0]} x {w.shape[1]}" for name, w in network().named_parameters() if w.ndim > 1}
    common.save_picture(draw_histograms(first, "seed 0"), out, "weights-histograms")
    common.save_picture(draw_zeros(runs, layers), out, "weights-zeros")
    common.save_picture(draw_losses(first), out, "weights-losses")
    seconds = time.process_time()
    results = {own[0].method.name: summary(own) for own in runs}
    settings = {"seeds": seeds, "epochs": epochs, "cpu_seconds": seconds}
    common.save_results(out, "weights", settings | {"methods": results})

    weights = f"{len(first[0].after):,} weights"
    print(f"digits, {weights}, {epochs} epochs, {seeds} seeds (mean ± sd), {seconds:.0f} s of one core\n")
    print_table(runs)
    print(f"\npictures and numbers: {out}")
    print(f"the reports, epoch by epoch: tensorboard --logdir {out / 'tensorboard'}")
    return runs


if __name__ == "__main__":
    main()
