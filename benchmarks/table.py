"""Prints every row of a run on the terminal: ``python -m benchmarks.table results.json``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.checks import NOTABLE_ERROR
from benchmarks.rows import Figure, Machine, MemoryRow, Results, Row

MODE_TITLES = {
    "value": "value",
    "value_and_grad": "value and gradient without autograd",
    "fresh": "forward + backward, .grad None",
    "present": "forward + backward, .grad present",
    "step": "optimizer step",
}

_STYLES = {"ours": "bold", "peer": "", "limit": "dim"}
_WIDTH = 120  # where there is no terminal to ask


def caption(machine: Machine) -> str:
    """The machine in one line."""
    commit = machine.commit[:10] + (" with changes" if machine.dirty else "")
    return (
        f"{machine.cpu}, {machine.threads} threads, {machine.capability}, torch {machine.torch}, "
        f"fused_reg {machine.fused_reg} ({commit}), {machine.date}"
    )


def number(x: float) -> str:
    """Three digits, never an exponent."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def notable_errors(row: Row) -> str:
    """The errors of a peer that a reader must know; empty if there are none."""
    errors = {"value": row.value_error, "gradient": row.gradient_error}
    return ", ".join(f"{name} {100 * e:.2g} % off" for name, e in errors.items() if e is not None and e > NOTABLE_ERROR)


def show(results: Results) -> None:
    """Every row, the memory and the figures."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(caption(results.machine))
    console.print("to ours, to limit: the time, divided by ours and by the first limit's. GB/s: of the least bytes")
    for case, rows in groupby(results.rows, key=lambda row: row.case):
        console.print(_case_table(case, list(rows), results.machine.capability))
    for memory in results.memory:
        console.print(_memory_line(memory))
    for absent in results.absent:
        console.print(f"{CASES[absent.case].title}, {absent.what}, {absent.implementation}: {absent.reason}")
    console.print("\n".join(_figure_lines(results)))


def _case_table(case: str, rows: list[Row], capability: str) -> Table:
    table = Table(title=f"\n{CASES[case].title}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in ("median ms", "p20", "p80", "GB/s", "to ours", "to limit"):
        table.add_column(name, justify="right")
    table.add_column("")
    for (mode, family, used), group in groupby(rows, key=lambda row: (row.mode, row.family, row.capability)):
        heading = [MODE_TITLES[mode], family, used if used != capability else ""]
        table.add_row(", ".join(filter(None, heading)), style="italic")
        for row in group:
            table.add_row(f"  {row.implementation}", *_numbers(row), _remark(row), style=_STYLES[row.role])
    return table


def _numbers(row: Row) -> Iterator[str]:
    yield from map(number, (row.median_ms, row.p20_ms, row.p80_ms, row.gb_per_s))
    for ratio in (row.ratio_to_ours, row.ratio_to_limit):
        yield "" if ratio is None else f"{ratio:.2f}"


def _remark(row: Row) -> str:
    compiled = None if row.compile_s is None else f"compiled in {row.compile_s:.0f} s"
    return "; ".join(filter(None, (compiled, notable_errors(row))))


def _memory_line(row: MemoryRow) -> str:
    title = f"{CASES[row.case].title}, peak memory of forward + backward, {row.implementation}"
    return f"{title}: {row.peak_bytes / 1e6:.0f} MB, of which {row.kept_bytes / 1e6:.0f} MB kept"


def _figure_lines(results: Results) -> Iterator[str]:
    yield "\nTargets"
    measured = [figure for figure in results.figures if figure.measured is not None]
    for figure in measured:
        yield _figure_line(figure)
    if len(measured) < len(results.figures):
        yield f"{len(results.figures) - len(measured)} more are not measured by this run"


def _figure_line(figure: Figure) -> str:
    mark = "[green]met   [/]" if figure.passed else "[red]missed[/]"
    bound = "at least" if figure.at_least else "at most"
    return f"{mark} {figure.claim}: {figure.measured:.2f} ({bound} {figure.target:g})"


if __name__ == "__main__":
    show(Results.read(Path(sys.argv[1])))
