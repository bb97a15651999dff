"""What prune.py has found, as tables and pictures: all of it is in the results that it saves."""

from __future__ import annotations

import statistics
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from common import extras, save_picture, spread

with extras():
    import matplotlib.pyplot as plt

COLORS = ["#0072B2", "#D55E00", "#009E73"]  # Okabe and Ito's, for every eye
KINDS = ["penalized", "pruned", "pruned, fine-tuned", "magnitude", "magnitude, fine-tuned", "small from the start"]


def over_seeds(results: dict[str, Any], strength: str, *keys: str) -> list[Any]:
    """What stands under these keys, of each seed."""
    return [reduce(getitem, keys, run["strengths"][strength]) for run in results["seeds"]]


def report(results: dict[str, Any]) -> None:
    chosen, dense, seeds = results["chosen"], results["dense"], results["seeds"]
    print(f"digits, {results['epochs']} epochs, of these {results['fine_tuning']} after a cut; {len(seeds)} seeds\n")
    columns = {
        "strength": 8,
        "parameters": 14,
        "FLOPs of an image": 20,
        "accuracy: pruned": 17,
        "fine-tuned": 17,
        "by magnitude": 17,
        "outputs within": 15,
    }

    def row(*cells: Any) -> None:
        print("".join(f"{cell:>{width}}" for cell, width in zip(cells, columns.values(), strict=False)))

    row(*columns)
    row("none", dense["parameters"], dense["flops"], spread([run["dense"]["test"] for run in seeds]))
    for strength in seeds[0]["strengths"]:
        row(
            strength,
            spread(over_seeds(results, strength, "parameters"), 0),
            spread(over_seeds(results, strength, "flops"), 0),
            *(spread(over_seeds(results, strength, KINDS[i], "test")) for i in (1, 2, 4)),
            f"{max(over_seeds(results, strength, 'largest_difference')):.1e}",
        )
    print("outputs within: the largest difference that the cut makes to any, relative to the largest output\n")

    print(f"{f'strength {chosen}, chosen on validation images':46}{'accuracy':>16}{'less than dense':>20}")
    for kind in KINDS:
        found = over_seeds(results, chosen, kind, "test")
        lost = [run["dense"]["test"] - accuracy for run, accuracy in zip(seeds, found, strict=True)]
        print(f"  {kind:44}{spread(found):>16}{spread(lost):>20}")
    for batch in ("1", "256"):
        faster = spread(over_seeds(results, chosen, "times_faster", batch), 2)
        print(f"  {f'latency of dense / pruned, {batch} images':44}{faster:>16}")


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    figures = {"channels": draw_channels(results), "norms": draw_norms(results), "tradeoff": draw_tradeoff(results)}
    paths = [save_picture(figure, folder, f"prune-{what}") for what, figure in figures.items()]
    plt.close("all")
    return paths


def draw_channels(results: dict[str, Any]) -> Any:
    """Every seed a thin line, their mean a thick one."""
    seeds = torch.tensor(over_seeds(results, results["chosen"], "channels"), dtype=torch.float64)
    epochs = range(1, seeds.shape[1] + 1)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, (color, style) in enumerate(zip(COLORS, ("-", "--", "-."), strict=True)):
        axes.plot(epochs, seeds[:, :, i].T, color=color, alpha=0.4, linewidth=0.8)
        label = f"conv{i + 1}, of {results['dense']['channels'][i]}"
        axes.plot(epochs, seeds[:, :, i].mean(dim=0), style, color=color, linewidth=2, label=label)
    axes.set(xlabel="epoch", ylabel="channels that are not zero", ylim=(0, None))
    axes.set_title(f"strength {results['chosen']}: {len(seeds)} seeds (thin) and their mean", fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def draw_norms(results: dict[str, Any]) -> Any:
    """Of the first seed."""
    figure, columns = plt.subplots(1, 3, figsize=(9, 3.5), sharey=True, layout="constrained")
    both = zip(columns, *results["norms"], strict=True)
    for i, (axes, without, penalized) in enumerate(both):
        rank = range(1, len(without) + 1)
        axes.plot(rank, sorted(without, reverse=True), "o-", color=COLORS[0], markersize=4, label="no penalty")
        ordered = sorted(penalized, reverse=True)
        left = sum(norm > 0 for norm in ordered)
        axes.plot(rank[:left], ordered[:left], "s-", color=COLORS[1], markersize=4, label="group norms")
        axes.plot(rank[left:], ordered[left:], "x", color=COLORS[1], markersize=5, label="exactly zero")
        axes.set(title=f"conv{i + 1}: {left} of {len(ordered)} left", xlabel="channel, sorted")
    columns[0].set_ylabel("norm of the channel's weights")
    columns[-1].legend()
    return figure


def draw_tradeoff(results: dict[str, Any]) -> Any:
    """What lies at the same number of parameters is drawn side by side."""
    strengths, seeds = results["seeds"][0]["strengths"], len(results["seeds"])
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    mean, deviation = mean_and_deviation([run["dense"]["test"] for run in results["seeds"]])
    axes.axhline(mean, color="0.3", linewidth=1, label="dense")
    axes.axhspan(mean - deviation, mean + deviation, color="0.5", alpha=0.15, linewidth=0)
    shares = [mean_and_deviation(over_seeds(results, strength, "parameters"))[0] for strength in strengths]
    shares = [100 * share / results["dense"]["parameters"] for share in shares]
    drawn = {"pruned": ("^:", -0.7), "pruned, fine-tuned": ("o-", 0), "magnitude, fine-tuned": ("s--", 0.7)}
    for (kind, (style, shift)), color in zip(drawn.items(), COLORS, strict=True):
        found = [mean_and_deviation(over_seeds(results, strength, kind, "test")) for strength in strengths]
        means, deviations = zip(*found, strict=True)
        axes.errorbar([s + shift for s in shares], means, deviations, fmt=style, color=color, capsize=3, label=kind)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.1f}")
    axes.set(xlabel="parameters left, % of the dense network", ylabel="accuracy on test images, %")
    title = f"strengths {', '.join(strengths)}, from the right: mean and standard deviation of {seeds} seeds"
    axes.set_title(title, fontsize="medium")
    axes.legend()
    return figure


def mean_and_deviation(numbers: list[float]) -> tuple[float, float]:
    return statistics.mean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else 0.0
