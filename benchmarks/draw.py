"""Draws a run: ``python -m benchmarks.draw results.json picture.png``."""

import sys
import textwrap
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.cases import CASES
from benchmarks.contenders import COMPILED_LOOP, FOREACH_NORM, LOOP, OURS, limited
from benchmarks.limits import COPY_WARM, LIMITS
from benchmarks.markdown import caption, count, joined, notable_errors, number
from benchmarks.results import Results

# Colours that people who see fewer colours can tell apart (Okabe and Ito 2008).
_PEERS = {COMPILED_LOOP: "#E69F00", LOOP: "#999999", FOREACH_NORM: "#CC79A7"}
_LIMITED = {
    "value": ("value / x.sum()", "#56B4E9"),
    "value_and_grad": ("value, gradient / y.copy_(x)", "#009E73"),
    "present": ("accumulate_grad_ / g.add_(x)", "#D55E00"),
    "prox": ("prox_ / x.mul_(a)", "#E8B84A"),
}

# Inches. For a column of 390 to 700 pixels: narrow, in large letters, a panel below the other.
_WIDTH, _BAR, _FRAME = 5.6, 0.2, 1.6


def draw(results: Results, path: Path) -> None:
    """Write the picture: forward and backward of every case, and what the large ones reach of the machine's limits."""
    times = {case: row for case in CASES if (row := results.find(case, "fresh", OURS))}
    large = {case: None for case in CASES if CASES[case].is_large and results.find(case, "value_and_grad", OURS)}
    to_ours = {name: (colour, [_to_ours(results, case, name) for case in times]) for name, colour in _PEERS.items()}
    to_limit = {label: (c, [_to_limit(results, case, mode) for case in large]) for mode, (label, c) in _LIMITED.items()}
    panels = [
        ("Penalty, forward + backward, .grad None", "times fused_reg's time, logarithmic", times, to_ours),
        ("fused_reg against the speed of memory", "times the plain operation's time", large, to_limit),
    ]
    heights = [_FRAME + _BAR * (len(bars) + 1.5) * len(cases) for *_, cases, bars in panels]
    with rc_context({"font.size": 10.5}):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        for row, panel in zip(figure.subfigures(2, 1, height_ratios=heights), panels, strict=True):
            _draw_panel(row, *panel)
        figure.supxlabel(textwrap.fill(caption(results), 72), fontsize=8, color="0.35")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def _draw_panel(row, title, unit, cases, bars) -> None:
    """Under the name of each case a bar of each kind: its width, and a text behind it."""
    axes, group = row.subplots(), len(bars) + 1.5
    for k, (label, (colour, of_cases)) in enumerate(bars.items()):
        places = [i * group + k + 1 for i in range(len(cases))]
        axes.barh(places, [width for width, _ in of_cases], 0.9, color=colour, label=label)
        for y, (width, text) in zip(places, of_cases, strict=True):  # beyond 1, where a line is
            axes.annotate(text, (max(width, 1), y), (5, 0), textcoords="offset points", va="center")
    for i, (case, ours) in enumerate(cases.items()):
        tensors, elements = len(CASES[case].shapes), count(CASES[case].elements)
        name = f"{CASES[case].title} ({tensors:,} tensor{'s' * (tensors > 1)}, {elements})"
        name = joined(name, f"fused_reg {number(ours['median_ms'])} ms" if ours else "")
        axes.annotate(name, (0, i * group), (2, 0), ("axes fraction", "data"), "offset points", va="center")
    if "logarithmic" in unit:
        axes.set_xscale("log")
        axes.set_xlim(left=min([1, *(width for _, of_cases in bars.values() for width, _ in of_cases if width)]))
    else:
        axes.axvline(1, color="0.2", linewidth=1, linestyle="--")
    axes.set_ylim(len(cases) * group - 0.9, -0.8)
    axes.set_yticks([])
    axes.set_xlabel(f"{unit}; less is better")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.spines[["top", "right"]].set_visible(False)
    row.suptitle(title, x=0.01, ha="left", weight="bold")
    row.legend(loc="outside lower left", ncols=3 - len(bars) % 3, frameon=False, columnspacing=1)


def _to_ours(results: Results, case: str, name: str) -> tuple[float, str]:
    row = results.find(case, "fresh", name)
    if row is None or row["ratio_to_ours"] is None:
        return 0.0, f"{name} not measured"
    return row["ratio_to_ours"], joined(
        f"{row['ratio_to_ours']:.1f}x, {number(row['median_ms'])} ms", notable_errors(row)
    )


def _to_limit(results: Results, case: str, mode: str) -> tuple[float, str]:
    limit = LIMITS["cuda" if results.gpu else "cpu"][mode][0]
    if mode == "value_and_grad" and not results.gpu:
        limit = COPY_WARM  # fresh memory costs page faults, which are not the memory's speed
    row, bound = results.find(case, mode, limited(mode)), results.find(case, mode, limit.name)
    if row is None or bound is None:
        return 0.0, "not measured"
    ratio = row["median_ms"] / bound["median_ms"]
    return ratio, f"{ratio:.2f}x, {row['gb_per_s']:.0f} GB/s"


if __name__ == "__main__":
    draw(Results.read(Path(sys.argv[1])), Path(sys.argv[2]))
