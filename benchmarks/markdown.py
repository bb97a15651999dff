"""The tables of a run: ``python -m benchmarks.markdown results.json``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.cases import CASES, Case
from benchmarks.cuda_markdown import cuda_parts, markdown_table
from benchmarks.limits import LIMITS
from benchmarks.peers import COMPILED_LOOP, FOREACH_NORM, LOOP, OURS
from benchmarks.rows import MemoryRow, Mode, Row
from benchmarks.run import Results
from benchmarks.table import MODE_TITLES, caption, notable_errors, number

_PEERS = (OURS.name, COMPILED_LOOP.name, LOOP.name, FOREACH_NORM.name)


def document(results: Results, name: str) -> str:
    """The tables under a title; `name` is that of the run's JSON."""
    device = results.machine.gpu.name if results.machine.gpu else "CPU"
    origin = f"Written by `python -m benchmarks.markdown benchmarks/results/{name}`."
    brackets = "" if results.machine.gpu else " In brackets: how many times our time."
    return f"# Measured on the {device}\n\n{origin}{brackets}\n\n{markdown(results)}\n"


def markdown(results: Results) -> str:
    """The times of forward and backward, of what the machine limits, of optimizer steps, and the peak memory; of a run
    on a GPU every row, with the targets."""
    parts = cuda_parts(results) if results.machine.gpu else _cpu_parts(results)
    return "\n\n".join("\n".join(part) for part in parts if part)


def _cpu_parts(results: Results) -> list[list[str]]:
    return [
        _composed(results, "fresh"),
        _composed(results, "present"),
        _limits(results),
        _steps(results),
        _memory(results),
        _absent(results),
        [f"Medians. {caption(results.machine)}."],
    ]


def _cases(results: Results) -> Iterator[Case]:
    present = {row.case for row in results.rows}
    return (case for case in CASES.values() if case.name in present)


def _composed(results: Results, mode: Mode) -> list[str]:
    rows = []
    for case in _cases(results):
        times = [results.find(case.name, mode, name) for name in _PEERS]
        if any(times):
            rows.append([f"{case.title} ({case.tensors:,} tensors, {_count(case.elements)})", *map(_time, times)])
    return markdown_table([f"{MODE_TITLES[mode]}, ms", *_PEERS], rows)


def _limits(results: Results) -> list[str]:
    rows = []
    for row in results.rows:
        if row.role == "ours" and row.mode in LIMITS["cpu"] and CASES[row.case].is_large:
            for name in LIMITS["cpu"][row.mode]:
                limit = results.find(row.case, row.mode, name, row.capability)
                if limit is not None:
                    case = f"{CASES[row.case].title}, {MODE_TITLES[row.mode]}, {row.capability}"
                    ratio = f"{row.median_ms / limit.median_ms:.2f}"
                    rows.append([case, number(row.median_ms), f"{row.gb_per_s:.1f}", f"`{name}`", ratio])
    return markdown_table(["against the limits of the machine", "ms", "GB/s", "limit", "of its time"], rows)


def _steps(results: Results) -> list[str]:
    steps = [row for row in results.rows if row.mode == "step"]
    rows = []
    for (case, family), group in groupby(steps, key=lambda row: (row.case, row.family)):
        times = {row.implementation: row.median_ms for row in group}
        cells = [number(times[name]) for name in ("no penalty", "weight_decay", OURS.name)]
        rows.append([f"{CASES[case].title}, {family}", *cells])
    return markdown_table(["optimizer step, ms", "no penalty", "`weight_decay`", "step + fused_reg"], rows)


def _memory(results: Results) -> list[str]:
    rows = [[f"{CASES[row.case].title}, {row.implementation}", *_megabytes(row)] for row in results.memory]
    return markdown_table(["memory of forward + backward, MB", "peak", "kept without `.grad`"], rows)


def _megabytes(row: MemoryRow) -> list[str]:
    return [f"{size / 1e6:.0f}" for size in (row.peak_bytes, row.kept_bytes)]


def _absent(results: Results) -> list[str]:
    return list(dict.fromkeys(f"{CASES[row.case].title}: {row.implementation} {row.reason}." for row in results.absent))


def _time(row: Row | None) -> str:
    if row is None:
        return "-"
    ratio = "" if row.role == "ours" else f" ({row.ratio_to_ours:.1f}x)"
    error = notable_errors(row)
    return f"{number(row.median_ms)}{ratio}" + (f", {error}" if error else "")


def _count(elements: int) -> str:
    return f"{elements / 1e6:.1f}M" if elements >= 1e6 else f"{elements:,}"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(document(Results.read(source), source.name), end="")
