"""The regularization path of Lasso and elastic net on scikit-learn's diabetes data: every coefficient over a falling
strength, by proximal gradient steps with ``prox_`` and by scikit-learn's coordinate descent.

    python examples/path.py

Both minimize, with n samples, scikit-learn's alpha, and r for its l1_ratio (1 is the Lasso),

    1 / (2 n) ||y - X w||^2  +  alpha r ||w||_1  +  alpha (1 - r) / 2 ||w||_2^2

which is the loss ||y - X w||^2 / (2 n) with l1 = alpha * r and l2 = alpha * (1 - r) / 2. (torch's mse_loss has no 1/2:
with it, take twice these strengths.) Each seed draws a bootstrap sample of the patients, on which both run again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import extras, parser, positive, prepare, save_picture, save_results, spread
from torch import Tensor

from fused_reg import prox_

with extras():
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import track
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import enet_path

L1_RATIOS = {"Lasso": 1.0, "elastic net": 0.5}
WITHIN = 1e-13  # a step that moves no coefficient by more than this, of the largest one, is the last
MOST_STEPS = 100_000  # for one strength
SKLEARN = {"tol": 1e-12, "max_iter": 1_000_000}  # tol: of the duality gap, relative to ||y||^2
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"]  # Okabe and Ito's, for every eye


@dataclass
class Problem:
    """Least squares with standardized features and a centered target, in float64."""

    x: Tensor  # [samples, features]
    y: Tensor  # [samples]

    def __post_init__(self) -> None:
        self.x = (self.x - self.x.mean(dim=0)) / self.x.std(dim=0, correction=0)
        self.y = self.y - self.y.mean()
        self.gram = self.x.T @ self.x / len(self.x)
        self.moments = self.x.T @ self.y / len(self.x)
        self.step = 1 / torch.linalg.eigvalsh(self.gram)[-1].item()  # 1 / the largest curvature of the loss

    def gradient(self, w: Tensor) -> Tensor:
        return self.gram @ w - self.moments

    def alphas(self, l1_ratio: float, count: int) -> Tensor:
        """From the smallest strength at which every coefficient is zero down to a thousandth of it."""
        return self.moments.abs().max() / l1_ratio * torch.logspace(0, -3, count, dtype=torch.float64)


def fista(problem: Problem, w: Tensor, l1: float, l2: float) -> tuple[Tensor, int]:
    """The minimum of loss + penalty, sought from w, and the number of steps (accelerated, with restarts)."""
    ahead, t = w, 1.0
    for step in range(1, MOST_STEPS + 1):
        stepped = ahead - problem.step * problem.gradient(ahead)
        prox_(stepped, l1=l1, l2=l2, step=problem.step)
        missed, moved = ahead - stepped, stepped - w
        if torch.dot(missed, moved) > 0:  # the momentum leads uphill
            t = 1.0
        t_next = (1 + math.sqrt(1 + 4 * t * t)) / 2
        ahead, w, t = stepped + (t - 1) / t_next * moved, stepped, t_next
        if missed.abs().max() <= WITHIN * w.abs().max():
            return w, step
    raise RuntimeError(f"no minimum in {MOST_STEPS} steps (l1={l1}, l2={l2})")


def path(problem: Problem, alphas: Tensor, l1_ratio: float, warm: bool = True) -> tuple[Tensor, int]:
    """The coefficients [features, alphas], and the steps of all strengths together; warm: each strength begins where
    the one before it ended."""
    w, steps, coefficients = torch.zeros_like(problem.moments), 0, []
    for alpha in alphas.tolist():
        start = w if warm else torch.zeros_like(w)
        w, taken = fista(problem, start, l1=alpha * l1_ratio, l2=alpha * (1 - l1_ratio) / 2)
        coefficients.append(w)
        steps += taken
    return torch.stack(coefficients, dim=1), steps


def sklearn_path(problem: Problem, alphas: Tensor, l1_ratio: float) -> Tensor:
    """The same from scikit-learn (its lasso_path is enet_path with l1_ratio=1)."""
    x, y = problem.x.numpy(), problem.y.numpy()
    return torch.from_numpy(enet_path(x, y, l1_ratio=l1_ratio, alphas=alphas.numpy(), **SKLEARN)[1])


def violation(problem: Problem, w: Tensor, alphas: Tensor, l1_ratio: float) -> float:
    """By how much coefficients [features, alphas] miss the conditions of the minimum: the gradient of the smooth terms
    is -l1 sgn(w) where w is not zero, and within [-l1, l1] where it is."""
    smooth = problem.gram @ w - problem.moments[:, None] + alphas * (1 - l1_ratio) * w
    l1 = alphas * l1_ratio
    return torch.where(w != 0, (smooth + l1 * w.sign()).abs(), (smooth.abs() - l1).clamp(min=0)).max().item()


def compare(problem: Problem, l1_ratio: float, strengths: int) -> tuple[dict[str, Any], Tensor, Tensor, Tensor]:
    """Both paths over the same strengths: what they differ by, and how long they took; strengths and coefficients."""
    alphas = problem.alphas(l1_ratio, strengths)
    begin = time.perf_counter()
    ours, steps = path(problem, alphas, l1_ratio)
    between = time.perf_counter()
    theirs = sklearn_path(problem, alphas, l1_ratio)
    end = time.perf_counter()
    result = {
        "largest_difference": (ours - theirs).abs().max().item(),
        "same_zeros": ((ours == 0) == (theirs == 0)).all(dim=0).sum().item(),
        "steps": steps,
        "violation": violation(problem, ours, alphas, l1_ratio),
        "sklearn_violation": violation(problem, theirs, alphas, l1_ratio),
        "seconds": between - begin,
        "sklearn_seconds": end - between,
        "times_sklearn": (between - begin) / (end - between),
        "step_microseconds": 1e6 * (between - begin) / steps,
    }
    return result, alphas, ours, theirs


def draw(paths: dict[str, tuple[Tensor, Tensor, Tensor]], names: list[str], folder: Path) -> Path:
    """A column for each penalty: the coefficients of both, and below them what they differ by."""
    figure, axes = plt.subplots(
        2, len(paths), figsize=(9, 6), sharex="col", sharey="row", height_ratios=[3, 1], layout="constrained"
    )
    for (title, (alphas, ours, theirs)), (above, below) in zip(paths.items(), axes.T, strict=True):
        above.axhline(0, color="0.8", linewidth=0.8)
        for i, name in enumerate(names):
            above.plot(alphas, ours[i], color=COLORS[i % 5], linestyle="--" if i // 5 else "-", label=name)
        every = slice(None, None, max(1, len(alphas) // 20))
        for theirs_of_feature in theirs:
            above.plot(alphas[every], theirs_of_feature[every], ".", color="black", markersize=4, label="scikit-learn")
        above.set(title=f"{title} (l1_ratio = {L1_RATIOS[title]:g})", xscale="log")
        below.plot(alphas, (ours - theirs).abs().amax(dim=0), ".", color="black", markersize=3)
        below.set(xlabel="strength alpha, falling", yscale="log")
        below.invert_xaxis()
    axes[0, 0].set_ylabel("coefficient\n(disease score per standard deviation)")
    axes[1, 0].set_ylabel("largest difference\nof a coefficient")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    once = len(names) + 1
    figure.legend(handles[:once], labels[:once], loc="outside right center", title="lines: prox_")
    saved = save_picture(figure, folder, "path-coefficients")
    plt.close(figure)
    return saved


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parser(__doc__, "path")
    options.add_argument("--strengths", type=positive, help="strengths on the path (default: 100; with --quick, 20)")
    given = options.parse_args(arguments)
    strengths = given.strengths or (20 if given.quick else 100)
    seeds = min(given.seeds, 2) if given.quick else given.seeds
    folder = prepare(given.out)

    data = load_diabetes(scaled=False)
    x, y = torch.tensor(data.data), torch.tensor(data.target)
    problem = Problem(x, y)
    results: dict[str, Any] = {"strengths": strengths, "seeds": seeds, "all patients": {}, "bootstrap": {}}
    paths = {}
    for title, l1_ratio in L1_RATIOS.items():
        result, *paths[title] = compare(problem, l1_ratio, strengths)
        result["steps_cold"] = path(problem, paths[title][0], l1_ratio, warm=False)[1]
        results["all patients"][title] = result
        results["bootstrap"][title] = []
    for seed in track(range(seeds), "bootstrap samples", console=Console(stderr=True)):
        drawn = torch.randint(len(x), (len(x),), generator=torch.Generator().manual_seed(seed))
        for title, l1_ratio in L1_RATIOS.items():
            results["bootstrap"][title].append(compare(Problem(x[drawn], y[drawn]), l1_ratio, strengths)[0])

    report(results)
    save_results(folder, "path", results)
    print(f"\npicture: {draw(paths, list(data.feature_names), folder)}")
    return results


def report(results: dict[str, Any]) -> None:
    """A column for each penalty: all patients, and below them the bootstrap samples."""
    whole, samples = results["all patients"], results["bootstrap"]
    strengths, seeds = results["strengths"], results["seeds"]

    def row(label: str, runs: dict[str, Any], cell: Callable[[Any], str]) -> None:
        print(f"  {label:42}" + "".join(f"{cell(run):>18}" for run in runs.values()))

    def over(runs: list[dict[str, Any]], key: str) -> list[Any]:
        return [run[key] for run in runs]

    print(f"{f'all patients, {strengths} strengths':44}" + "".join(f"{title:>18}" for title in whole))
    row("largest difference of a coefficient", whole, lambda run: f"{run['largest_difference']:.1e}")
    row("strengths with the same zeros", whole, lambda run: f"{run['same_zeros']} of {strengths}")
    row("optimality missed by: prox_", whole, lambda run: f"{run['violation']:.1e}")
    row("optimality missed by: scikit-learn", whole, lambda run: f"{run['sklearn_violation']:.1e}")
    row("proximal steps: with warm starts", whole, lambda run: str(run["steps"]))
    row("proximal steps: each strength from zero", whole, lambda run: str(run["steps_cold"]))
    print(f"{seeds} bootstrap samples, {strengths} strengths each")
    row("largest difference of a coefficient", samples, lambda runs: f"{max(over(runs, 'largest_difference')):.1e}")
    row(
        "strengths with the same zeros", samples, lambda runs: f"{sum(over(runs, 'same_zeros'))} of {seeds * strengths}"
    )
    row("seconds: prox_", samples, lambda runs: spread(over(runs, "seconds"), 3))
    row("seconds: scikit-learn", samples, lambda runs: spread(over(runs, "sklearn_seconds"), 3))
    row("prox_ / scikit-learn", samples, lambda runs: spread(over(runs, "times_sklearn"), 0))
    row("microseconds of a proximal step", samples, lambda runs: spread(over(runs, "step_microseconds"), 0))


if __name__ == "__main__":
    main()
