"""The tables of a run on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from benchmarks.cases import CASES, title
from benchmarks.rows import Row
from benchmarks.run import Results
from benchmarks.table import (
    COST_HEADS,
    MODE_TITLES,
    absent_line,
    agreement_line,
    caption,
    cost_cells,
    notable_errors,
    number,
    roofline_line,
    target_cells,
)

_HEADS = ("device µs", "GB/s", *COST_HEADS, "to ours", "remarks")

_NOTES = (
    "device µs: medians, by events, with the call in the queue and nothing of it in the L2 cache. GB/s: of the bytes "
    "that the work must move; of roofline: of the bandwidth below. host µs: until the call returns, with an empty "
    "queue. peak MB: above the inputs, of a CUDA graph what its capture allocated. to ours: the device time, divided "
    "by ours. A call of more than about a thousand launches fills the queue: its device µs hold the host's."
)


def cuda_parts(results: Results) -> Iterator[list[str]]:
    """The targets, the bandwidths, every row by case and mode, and what is absent: each a block of lines."""
    yield ["## Targets"]
    yield markdown_table(
        ["target", "measured", "bound", ""], [[figure.claim, *target_cells(figure)] for figure in results.figures]
    )
    yield ["## Measured"]
    yield [_NOTES]
    yield [f"- {roofline_line(roofline)}" for roofline in results.rooflines]
    yield [f"{agreement_line(results.agreement)}."] if results.agreement else []
    yield _cached(results)
    for (case, mode), rows in groupby(results.rows, key=lambda row: (row.case, row.mode)):
        yield [f"### {CASES[case].title}: {MODE_TITLES[mode]}"]
        yield markdown_table(["", *_HEADS], [_cells(row) for row in rows])
    if results.absent:
        yield ["## Absent"]
        yield list(dict.fromkeys(f"- {absent_line(absent)}" for absent in results.absent))
    yield [f"{caption(results.machine)}."]


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first column to the left; none without rows."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines] if rows else []


def _cells(row: Row) -> list[str]:
    compiled = None if row.compile_s is None else f"compiled in {row.compile_s:.0f} s"
    return [
        ", ".join(filter(None, (row.implementation, row.family))),
        number(row.median_ms * 1e3),
        number(row.gb_per_s),
        *cost_cells(row.costs),
        "" if row.ratio_to_ours is None else f"{row.ratio_to_ours:.2f}",
        "; ".join(filter(None, (compiled, notable_errors(row)))),
    ]


def _cached(results: Results) -> list[str]:
    """Which lists the L2 cache could hold."""
    if results.machine.gpu is None:
        return []
    names = dict.fromkeys(row.case for row in results.rows)
    small = [title(name) for name in names if CASES[name].bytes <= results.machine.gpu.l2_bytes]
    return [f"Smaller than the L2 cache, which is flushed before every call: {', '.join(small) or 'none'}."]
