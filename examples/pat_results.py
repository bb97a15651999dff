"""What pat.py has found, as a table and a picture: all of it is in the results that it saves."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from common import extras, save_picture, spread

with extras():
    import matplotlib.pyplot as plt

# Colors of Okabe and Ito, for every eye; a form, and how far to the right, so that nothing hides another.
STYLES = {
    "fused_reg, zeros": ("#0072B2", "o-", -0.9),
    "PAT, MinSparsityConstraint": ("#D55E00", "s-", -0.3),
    "fused_reg, group lasso": ("#56B4E9", "^:", 0.3),
    "PAT, group lasso": ("#E69F00", "v:", 0.9),
}


def version() -> str | None:
    """That of torchao, if it is installed."""
    try:
        return version_of("torchao")
    except PackageNotFoundError:
        return None


def report(results: dict[str, Any]) -> None:
    for name, found in results["networks"].items():
        runs = found["seeds"]
        dense = spread([run["dense"]["accuracy"] for run in runs])
        print(f"{name}: {results['epochs']} epochs, {len(runs)} seeds, without zeros {dense}\n")
        print(f"{'':28}{'aim':>7}{'share of zeros':>18}{'accuracy':>18}{'trainings':>11}{'lines':>7}{'characters':>12}")
        for way, (lines, characters) in found["code"].items():
            for share in runs[0][way]:
                of = [run[way][share] for run in runs]
                shares, scores = (spread([one[what] for one in of]) for what in ("share", "accuracy"))
                trainings = sum(one["trainings"] for one in of) / len(of)
                print(f"{way:28}{share:>7}{shares:>18}{scores:>18}{trainings:>11.1f}{lines:>7}{characters:>12}")
        print()


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """What is wrong of the test images, over the share of zeros that was reached: the mean, the least and the most of
    the seeds. What none of them has wrong is drawn as a tenth of a percent, for the logarithm."""
    networks = results["networks"]
    figure, columns = plt.subplots(1, len(networks), figsize=(9, 4.3), sharey=True, layout="constrained")
    for axes, (name, found) in zip(columns, networks.items(), strict=True):
        runs = found["seeds"]
        dense = torch.tensor([run["dense"]["accuracy"] for run in runs], dtype=torch.float64)
        axes.axhline(100 * (1 - dense.mean()), color="0.3", linewidth=1, label="without zeros")
        for way in found["code"]:
            of = [[(one["share"], 1 - one["accuracy"]) for one in run[way].values()] for run in runs]
            shares, wrong = 100 * torch.tensor(of, dtype=torch.float64).permute(2, 1, 0)
            wrong = wrong.clamp(min=0.1)
            color, style, shift = STYLES[way]
            x, mean = shares.mean(dim=1) + shift, wrong.mean(dim=1)
            bars = torch.stack([mean - wrong.amin(dim=1), wrong.amax(dim=1) - mean])
            axes.errorbar(x, mean, bars, fmt=style, color=color, capsize=3, label=way)
        axes.set(title=name, xlabel="groups that are zero, %", yscale="log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    columns[0].set_ylabel("wrong of the test images, %")
    figure.legend(*columns[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path = save_picture(figure, folder, "pat-accuracy")
    plt.close("all")
    return [path]
