"""Chooses l1 and l2 for a small network with few digits to learn from: by a grid, at random, and with Optuna.

    python examples/tune.py

Each search has the same number of trials and sees a validation set. What it chose is trained anew on training and
validation set, and judged on a test set that no search has seen. The trials are kept in ``out/tune/tune.db``: the same
command goes on where it was interrupted.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_reg import Regularizer

with common.extras():
    import optuna
    from matplotlib.figure import Figure
    from optuna.distributions import FloatDistribution
    from optuna.trial import FrozenTrial, TrialState
    from rich.console import Console
    from rich.progress import Progress
    from scipy.stats import t as student
    from sklearn.datasets import load_digits
    from sqlalchemy.exc import SQLAlchemyError

LOW, HIGH = 1e-5, 1e-1  # of both strengths
CHECK = 25  # steps from one look at the validation set to the next
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)

SEARCHES = {"grid": "#0072B2", "random": "#E69F00", "Optuna": "#009E73"}  # colours of Okabe and Ito
LINES = {"grid": (2.2, "-"), "random": (5.0, "-"), "Optuna": (2.2, "--")}  # width and dashes: all seen where they meet
BASELINES = {
    "no penalty": {"l1": 0.0},
    "AdamW's default": {"l1": 0.0, "weight_decay": 1e-2},  # torch's
    "fused_penalty's default": {"l2": 1.0},  # of a call without strengths, which leaves it to you to scale it
}

Examples = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    train: Examples
    validation: Examples
    test: Examples

    @property
    def train_and_validation(self) -> Examples:
        return torch.cat([self.train[0], self.validation[0]]), torch.cat([self.train[1], self.validation[1]])


@dataclass(frozen=True)
class Budget:
    """What every search gets."""

    side: int  # of the grid
    steps: int  # of one training

    @property
    def trials(self) -> int:
        return self.side**2


def load(seed: int) -> Data:
    """200 digits for training and 100 for validation, drawn by the seed out of 1,000; the other 797, the same for every
    seed, are the test."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    drawn = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    train, validation = drawn[:200], drawn[200:300]
    return Data((x[train], y[train]), (x[validation], y[validation]), (x[1000:], y[1000:]))


def fit(
    examples: Examples,
    strengths: dict[str, float],
    seed: int,
    steps: int,
    watch: Callable[[int, nn.Module], None] | None = None,
    weight_decay: float = 0.0,
) -> nn.Module:
    """Trains from the seed. ``watch`` sees the model every ``CHECK`` steps, and may end the training by raising."""
    x, y = examples
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=weight_decay, fused=True)
    Regularizer(model, **strengths, weights_only=True).attach(optimizer)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if watch is not None and step % CHECK == 0:
            watch(step, model)
    return model


@torch.no_grad()
def judge(model: nn.Module, examples: Examples) -> tuple[float, float]:
    """Cross-entropy and accuracy."""
    output = model(examples[0])
    return cross_entropy(output, examples[1]).item(), (output.argmax(dim=1) == examples[1]).float().mean().item()


def grid(side: int, seed: int) -> list[tuple[float, float]]:
    """All pairs of ``side`` strengths, in an order drawn by the seed."""
    exponents = torch.linspace(math.log10(LOW), math.log10(HIGH), side, dtype=torch.float64).tolist()
    points = [(10**a, 10**b) for a in exponents for b in exponents]
    return random.Random(seed).sample(points, len(points))


def proposal(search: str, seed: int, number: int, budget: Budget) -> tuple[Any, dict[str, FloatDistribution]]:
    """The sampler and the space of a trial. Each trial has a sampler of its own, seeded by its number, so that a study
    that was interrupted goes on with the trials that it would have had. Optuna's first ten trials are the random ones.
    """
    sampler = optuna.samplers.TPESampler if search == "Optuna" else optuna.samplers.RandomSampler
    ranges = [(LOW, HIGH)] * 2
    if search == "grid":  # a point of it is a range of one value
        ranges = [(strength, strength) for strength in grid(budget.side, seed)[number]]
    space = {name: FloatDistribution(*r, log=True) for name, r in zip(("l1", "l2"), ranges, strict=True)}
    return sampler(seed=1000 * seed + number), space


def run_trial(trial: optuna.Trial, data: Data, seed: int, steps: int) -> float:
    """Trains with the trial's strengths, while the pruner lets it; the validation loss at the end."""

    def watch(step: int, model: nn.Module) -> None:
        trial.report(judge(model, data.validation)[0], step)
        if trial.should_prune():
            raise optuna.TrialPruned

    is_pruned = not isinstance(trial.study.pruner, optuna.pruners.NopPruner)
    model = fit(data.train, trial.params, seed, steps, watch if is_pruned else None)
    return judge(model, data.validation)[0]


def open_study(search: str, seed: int, budget: Budget, storage: optuna.storages.BaseStorage) -> optuna.Study:
    """A new study, or the one that was interrupted."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=8) if search == "Optuna" else optuna.pruners.NopPruner()
    name = f"{search}, seed {seed}, {budget.trials} trials of {budget.steps} steps"
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True, pruner=pruner)
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # of a process that was killed
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def finish(study: optuna.Study, search: str, seed: int, budget: Budget) -> Iterator[int]:
    """Runs the trials that are missing; yields how many there are, before and after each."""
    data = load(seed)
    done = len(finished(study))
    yield done
    for number in range(done, budget.trials):
        study.sampler, space = proposal(search, seed, number, budget)
        trial = study.ask(space)
        try:
            study.tell(trial, run_trial(trial, data, seed, budget.steps))
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        yield number + 1


def finished(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=FINISHED)


def best_so_far(trials: list[FrozenTrial]) -> list[float]:
    """The lowest validation loss of the trials up to each, those that were pruned left out."""
    best, curve = math.inf, []
    for trial in trials:
        if trial.state == TrialState.COMPLETE:
            best = min(best, trial.value)
        curve.append(best)
    return curve


def steps_of(trials: list[FrozenTrial], steps: int) -> int:
    """How many steps the trials have taken: the cost of the search."""
    return sum(steps if trial.state == TrialState.COMPLETE else trial.last_step for trial in trials)


def gain_over(losses: list[float], reference: list[float]) -> dict[str, Any]:
    """How much lower the losses are, seed by seed: mean, standard deviation, and half the 95 % interval of the mean
    (Student's t)."""
    gains = [b - a for a, b in zip(losses, reference, strict=True)]
    if len(gains) == 1:
        return {"mean": gains[0], "sd": None, "half_interval": None, "verdict": "one seed: no spread"}
    deviation = statistics.stdev(gains)
    half = float(student.ppf(0.975, len(gains) - 1)) * deviation / math.sqrt(len(gains))
    mean = statistics.mean(gains)
    verdict = "within noise" if abs(mean) <= half else "better" if mean > 0 else "worse"
    return {"mean": mean, "sd": deviation, "half_interval": half, "verdict": verdict}


def search_all(seeds: int, budget: Budget, storage: optuna.storages.BaseStorage) -> dict[str, list[optuna.Study]]:
    """The studies of each search, one for each seed."""
    studies: dict[str, list[optuna.Study]] = {search: [] for search in SEARCHES}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=seeds * len(SEARCHES) * budget.trials)
        for i, (seed, search) in enumerate(product(range(seeds), SEARCHES)):
            study = open_study(search, seed, budget, storage)
            for done in finish(study, search, seed, budget):
                progress.update(bar, description=f"{search}, seed {seed}", completed=i * budget.trials + done)
            studies[search].append(study)
    return studies


def judge_all(studies: dict[str, list[optuna.Study]], seeds: int, steps: int) -> dict[str, Any]:
    """What was chosen, and what was not, on the test set."""
    results: dict[str, Any] = {}
    for name in (*BASELINES, *SEARCHES):
        scores, chosen = [], []
        for seed in range(seeds):
            data = load(seed)
            given = dict(BASELINES[name] if name in BASELINES else studies[name][seed].best_params)
            chosen.append(dict(given))
            decay = given.pop("weight_decay", 0.0)
            model = fit(data.train_and_validation, given, seed, steps, weight_decay=decay)
            scores.append(judge(model, data.test))
        losses, accuracies = (list(column) for column in zip(*scores, strict=True))
        results[name] = {"strengths": chosen, "test_loss": losses, "test_accuracy": accuracies}
    for name, own in results.items():
        own["gain"] = {ref: gain_over(own["test_loss"], results[ref]["test_loss"]) for ref in BASELINES if ref != name}
    for name, own in studies.items():
        trials = [finished(study) for study in own]
        results[name]["validation_loss"] = [study.best_value for study in own]
        results[name]["pruned"] = [sum(t.state == TrialState.PRUNED for t in row) for row in trials]
        results[name]["steps"] = [steps_of(row, steps) for row in trials]
        results[name]["best_so_far"] = [best_so_far(row) for row in trials]
    return results


def draw_planes(studies: dict[str, optuna.Study]) -> Figure:
    """Where each search has looked: the validation loss over the plane of the two strengths."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, len(studies), sharex=True, sharey=True)
    lowest = min(study.best_value for study in studies.values())
    scale = {"vmin": lowest, "vmax": 2 * lowest, "cmap": "viridis", "edgecolors": "black", "linewidths": 0.4}
    for axes, (search, study) in zip(panels, studies.items(), strict=True):
        trials = finished(study)
        for state, marker, label in (
            (TrialState.COMPLETE, "o", "trained to the end"),
            (TrialState.PRUNED, "X", "pruned: its last loss"),
        ):
            own = [trial for trial in trials if trial.state == state]
            l1, l2 = ([trial.params[name] for trial in own] for name in ("l1", "l2"))
            dots = axes.scatter(l1, l2, 45, [trial.value for trial in own], marker=marker, **scale, label=label)
        best = study.best_params
        ring = {"facecolors": "none", "edgecolors": "#D55E00", "linewidths": 2}
        axes.scatter(best["l1"], best["l2"], 180, **ring, label="chosen")
        axes.set(xscale="log", yscale="log", xlabel="l1", title=f"{search}: lowest {study.best_value:.3f}")
    panels[0].set_ylabel("l2")
    figure.colorbar(dots, ax=panels, label="validation cross-entropy, nats", extend="max")
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def draw_results(results: dict[str, Any]) -> Figure:
    """How fast each search gets to the lowest validation loss, and the test loss of what it chose."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    lowest = torch.tensor([results[search]["validation_loss"] for search in SEARCHES]).amin(dim=0)  # of each seed
    for search, colour in SEARCHES.items():
        excess = torch.tensor(results[search]["best_so_far"]) - lowest[:, None]
        trials = range(1, excess.shape[1] + 1)
        width, dashes = LINES[search]
        style = {"color": colour, "linestyle": dashes, "drawstyle": "steps-post", "zorder": 9 - width}
        top.plot(trials, excess.T, **style, linewidth=0.3 * width, alpha=0.6)
        top.plot(trials, excess.mean(dim=0), **style, linewidth=width, label=search)
    top.set(xlabel="trials", ylabel="lowest validation cross-entropy so far,\nabove the seed's lowest, nats")
    top.set_ylim(-0.003, 0.1)
    top.legend(title="mean (thin: each seed)", loc="upper right")

    end = 2 * max(results["no penalty"]["test_loss"])
    for row, (name, own) in enumerate(results.items()):
        colour = SEARCHES.get(name, "#555555")
        mean = statistics.mean(own["test_loss"])
        if mean > end:
            place = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center"}
            bottom.annotate(f"{mean:.2f}: off the scale", (0.98, row), **place)
            continue
        bottom.scatter(own["test_loss"], [row] * len(own["test_loss"]), color=colour, s=22, alpha=0.6)
        bottom.scatter(mean, row, color=colour, marker="|", s=380, linewidths=2.5)
    bottom.set_yticks(range(len(results)), results)
    bottom.set(ylim=(len(results) - 0.4, -0.6), xlabel="test cross-entropy, nats (bar: mean)")
    return figure


def print_table(results: dict[str, Any]) -> None:
    """The results, and the gains with the interval that says whether there are any."""
    print(f"{'':24}  {'test cross-entropy':>18}  {'test accuracy':>17}  {'steps':>7}  pruned")
    for name, own in results.items():
        cost = f"{statistics.mean(own['steps']):7.0f}  {statistics.mean(own['pruned']):6.1f}" if "steps" in own else ""
        losses, accuracies = common.spread(own["test_loss"]), common.spread(own["test_accuracy"])
        print(f"{name:24}  {losses:>18}  {accuracies:>17}  {cost}".rstrip())
    print("\nlower test cross-entropy than the other, seed by seed, with the 95 % interval of the mean:")
    for search in SEARCHES:
        for reference, gain in results[search]["gain"].items():
            half = "" if gain["half_interval"] is None else f" ± {gain['half_interval']:.4f}"
            print(f"  {search:6}  than {reference:24} {gain['mean']:.4f}{half}  {gain['verdict']}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__, "tune").parse_args(arguments)
    out: Path = common.prepare(options.out)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # a network this small only waits for a second thread
    seeds, budget = (min(options.seeds, 2), Budget(3, 50)) if options.quick else (options.seeds, Budget(5, 100))

    file = out / "tune.db"
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    except (SQLAlchemyError, optuna.exceptions.OptunaError):
        raise SystemExit(f"tune.py: {file} is not a study; remove it to search anew") from None
    try:
        studies = search_all(seeds, budget, storage)
    except KeyboardInterrupt:
        raise SystemExit("tune.py: interrupted; the same command goes on from here") from None
    results = judge_all(studies, seeds, budget.steps)
    common.save_picture(draw_planes({search: own[0] for search, own in studies.items()}), out, "tune-planes")
    common.save_picture(draw_results(results), out, "tune-results")
    seconds = time.process_time()
    settings = {"seeds": seeds, "trials": budget.trials, "steps": budget.steps, "cpu_seconds": seconds}
    common.save_results(out, "tune", settings | {"results": results})

    print(f"digits, {budget.trials} trials for each search, {seeds} seeds (mean ± sd)")
    print(f"{seconds:.0f} s of one core in this run\n")
    print_table(results)
    print(f"\npictures, numbers and studies: {out}")
    return results


if __name__ == "__main__":
    main()
