"""Draws a run: ``python -m benchmarks.draw results.json picture.png``."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from benchmarks.cases import CASES, Case
from benchmarks.limits import ADD_FLAT, COPY_FLAT, COPY_FRESH, COPY_WARM, MUL_FLAT, SUM_FLAT
from benchmarks.peers import COMPILED_LOOP, FOREACH_NORM, LOOP, OURS, limited
from benchmarks.rows import Mode, Row
from benchmarks.run import Results
from benchmarks.table import caption, notable_errors, number

# Colours that people who see fewer colours can tell apart (Okabe and Ito 2008).
_COLOURS = {
    OURS.name: "#0072B2",
    COMPILED_LOOP.name: "#E69F00",
    LOOP.name: "#999999",
    FOREACH_NORM.name: "#CC79A7",
}

_IN_PLACE: tuple[tuple[Mode, str, str, str], ...] = (
    ("present", ADD_FLAT, "accumulate_grad_ / g.add_(x, alpha=a)", "#D55E00"),
    ("prox", MUL_FLAT, "prox_ / x.mul_(a)", "#F0C987"),
)

# What our time is divided by, by the kind of device.
_LIMITS: dict[str, tuple[tuple[Mode, str, str, str], ...]] = {
    "cpu": (
        ("value", SUM_FLAT, "value / x.sum()", "#56B4E9"),
        ("value_and_grad", COPY_FRESH, "value + gradient / copy into fresh memory", "#009E73"),
        ("value_and_grad", COPY_WARM, "value + gradient / copy into warm memory", "#8FD0B5"),
        *_IN_PLACE,
    ),
    "cuda": (
        ("value", SUM_FLAT, "value / x.sum()", "#56B4E9"),
        ("value_and_grad", COPY_FLAT, "value + gradient / copy", "#009E73"),
        *_IN_PLACE,
    ),
}

_BAR_HEIGHT = 0.8  # of all bars of a case

_Bar = tuple[float, str]  # its width, its label


def draw(results: Results, path: Path) -> None:
    """Write the picture: forward and backward of every case, and what the large ones reach of the machine's limits."""
    cases = [case for case in CASES.values() if results.find(case.name, "fresh", OURS.name)]
    large = [case for case in CASES.values() if case.is_large and results.find(case.name, "value_and_grad", OURS.name)]
    places = max(len(cases), len(large), 1)
    figure = Figure(figsize=(14, 2.2 + 0.9 * places), layout="constrained")
    halves = figure.subfigures(1, 2, width_ratios=(7, 6))
    _draw_times(halves[0], results, cases, places)
    _draw_limits(halves[1], results, large, places)
    figure.supxlabel(caption(results.machine), fontsize=8, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_times(figure: SubFigure, results: Results, cases: list[Case], places: int) -> None:
    axes = figure.subplots()
    for k, (name, colour) in enumerate(_COLOURS.items()):
        bars = [_relative_to_ours(results.find(case.name, "fresh", name)) for case in cases]
        _draw_bars(axes, bars, k, len(_COLOURS), colour, name)
    longest = max((row.ratio_to_ours or 1 for row in results.rows if row.mode == "fresh"), default=1)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 7 * longest)  # room for the labels
    axes.set_xlabel("time relative to fused_reg (logarithmic); less is better")
    device = ", device time" if results.machine.gpu else ""
    axes.set_title(f"Penalty, forward + backward, .grad None{device}", loc="left")
    _finish(figure, axes, cases, places)


def _draw_limits(figure: SubFigure, results: Results, cases: list[Case], places: int) -> None:
    axes = figure.subplots()
    longest = 1.0
    measured = {(row.mode, row.implementation) for row in results.rows}
    bounds = _LIMITS["cuda" if results.machine.gpu else "cpu"]
    limits = [bound for bound in bounds if (bound[0], limited(bound[0])) in measured]
    for k, (mode, name, label, colour) in enumerate(limits):
        bars = [
            _relative_to_limit(results.find(case.name, mode, limited(mode)), results.find(case.name, mode, name))
            for case in cases
        ]
        _draw_bars(axes, bars, k, len(limits), colour, label)
        longest = max([longest, *(width for width, _ in bars)])
    axes.axvline(1, color="0.2", linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.8 * longest)  # room for the labels
    axes.set_xlabel("time of fused_reg relative to the machine's limit; less is better")
    axes.set_title("Against the speed of memory", loc="left")
    _finish(figure, axes, cases, places)


def _relative_to_ours(row: Row | None) -> _Bar:
    if row is None or row.ratio_to_ours is None:
        return 0.0, "not measured"
    error = notable_errors(row)
    return row.ratio_to_ours, f"{number(row.median_ms)} ms" + (f" ({error})" if error else "")


def _relative_to_limit(row: Row | None, limit: Row | None) -> _Bar:
    if row is None or limit is None:
        return 0.0, "not measured"
    ratio = row.median_ms / limit.median_ms
    return ratio, f"{ratio:.2f}x: {number(row.median_ms)} ms, {row.gb_per_s:.1f} GB/s"


def _draw_bars(axes: Axes, bars: list[_Bar], k: int, of: int, colour: str, label: str) -> None:
    """The k-th bar of each case."""
    height = _BAR_HEIGHT / of
    heights = [i + (k - (of - 1) / 2) * height for i in range(len(bars))]
    axes.barh(heights, [width for width, _ in bars], 0.92 * height, color=colour, label=label)
    for y, (width, text) in zip(heights, bars, strict=True):
        # Beyond 1, where a line is.
        axes.annotate(text, (max(width, 1), y), (4, 0), textcoords="offset points", va="center", fontsize=8)


def _finish(figure: SubFigure, axes: Axes, cases: list[Case], places: int) -> None:
    titles = [f"{case.title}\n{_size(case)}" for case in cases]
    axes.set_yticks(range(len(cases)), titles, fontsize=9)
    axes.set_ylim(places - 0.4, -0.6)  # bars of one height on both sides
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)


def _size(case: Case) -> str:
    elements = f"{case.elements / 1e6:.1f}M" if case.elements >= 1e6 else f"{case.elements:,}"
    return f"{case.tensors:,} tensor{'s' * (case.tensors > 1)}, {elements}"


if __name__ == "__main__":
    draw(Results.read(Path(sys.argv[1])), Path(sys.argv[2]))
