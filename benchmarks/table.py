"""Prints every row of a run on the terminal: ``python -m benchmarks.table results.json``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, title
from benchmarks.checks import NOTABLE_ERRORS
from benchmarks.rows import Absent, Agreement, Costs, Figure, MemoryRow, Roofline, Row
from benchmarks.run import Gpu, Machine, Results

MODE_TITLES = {
    "value": "value",
    "value_and_grad": "value and gradient without autograd",
    "fresh": "forward + backward, .grad None",
    "present": "forward + backward, .grad present",
    "norm_value": "sum of norms, value",
    "norm_fresh": "sum of norms, forward + backward",
    "prox": "proximal step",
    "step": "optimizer step",
    "compiled_fresh": "compiled training step, .grad None",
    "compiled_present": "compiled training step, .grad present",
}

#: Of what the limits of the machine bound.
LIMITED_TITLES = MODE_TITLES | {"present": "accumulate_grad_", "prox": "prox_"}

#: Of what a GPU's rows have besides the times.
COST_HEADS = ("of roofline", "launches", "copies + fills", "host µs", "peak MB")

_CPU_HEADS = ("median ms", "p20", "p80", "GB/s", "to ours", "to limit")
_GPU_HEADS = ("device µs", "GB/s", "to ours", "to limit", *COST_HEADS)

_STYLES = {"ours": "bold", "peer": "", "limit": "dim"}
_WIDTH = 160  # where there is no terminal to ask


def caption(machine: Machine) -> str:
    """The machine in one line."""
    commit = machine.commit[:10] + (" with changes" if machine.dirty else "")
    device = _gpu(machine.gpu) if machine.gpu else f"{machine.cpu}, {machine.threads} threads, {machine.capability}"
    return f"{device}, torch {machine.torch}, fused_reg {machine.fused_reg} ({commit}), {machine.date}"


def _gpu(gpu: Gpu) -> str:
    return (
        f"{gpu.name}, {gpu.capability}, {gpu.multiprocessors} multiprocessors, {gpu.l2_bytes / 2**20:.0f} MiB L2, "
        f"driver {gpu.driver}, CUDA {gpu.cuda}"
    )


def number(x: float) -> str:
    """Three digits, never an exponent."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def notable_errors(row: Row) -> str:
    """The errors of a peer that a reader must know; empty if there are none."""
    errors = {"value": row.value_error, "gradient": row.gradient_error}
    notable = NOTABLE_ERRORS[row.dtype]
    return ", ".join(f"{name} {100 * e:.2g} % off" for name, e in errors.items() if e is not None and e > notable)


def cost_cells(costs: Costs | None) -> list[str]:
    """What `COST_HEADS` name, without their heads."""
    if costs is None:
        return [""] * len(COST_HEADS)
    counts = ["?" if n is None else f"{n:,}" for n in (costs.launches, costs.copies, costs.fills)]
    percent = "" if costs.percent_of_roofline is None else f"{costs.percent_of_roofline:.0f} %"
    return [percent, counts[0], " + ".join(counts[1:]), number(costs.host_us), f"{costs.peak_bytes / 1e6:.1f}"]


def roofline_line(roofline: Roofline) -> str:
    """The bandwidth in a line."""
    return (
        f"{roofline.name}: {roofline.gb_per_s:.0f} GB/s, {roofline.bytes / 1e9:.2f} GB in {roofline.median_us:.0f} µs"
    )


def agreement_line(agreement: Agreement) -> str:
    """How the values compare, in a line."""
    return (
        f"Values of {agreement.lists:,} random lists: {agreement.equal:,} have the CPU's bits, "
        f"the others are at most {agreement.max_ulp} ulp apart"
    )


def absent_line(absent: Absent) -> str:
    """What is absent, and why, in a line."""
    return f"{', '.join(filter(None, (title(absent.case), absent.what, absent.implementation)))}: {absent.reason}"


def target_cells(figure: Figure) -> list[str]:
    """What was measured, the bound, and whether it is met."""
    bound = f"{'at least' if figure.at_least else 'at most'} {figure.target:g}"
    if figure.measured is None:
        return ["-", bound, "not measured"]
    return [f"{figure.measured:.2f}", bound, "met" if figure.passed else "missed"]


def show(results: Results) -> None:
    """Every row, the memory and the figures."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    console.print(caption(results.machine))
    console.print("to ours, to limit: the time, divided by ours and by the first limit's. GB/s: of the least bytes")
    for case, rows in groupby(results.rows, key=lambda row: row.case):
        console.print(_case_table(case, list(rows), results.machine.capability))
    for memory in results.memory:
        console.print(_memory_line(memory))
    for roofline in results.rooflines:
        console.print(roofline_line(roofline))
    if results.agreement:
        console.print(agreement_line(results.agreement))
    for absent in results.absent:
        console.print(absent_line(absent), markup=False)
    console.print("\n".join(_figure_lines(results)))


def _case_table(case: str, rows: list[Row], capability: str) -> Table:
    table = Table(title=f"\n{CASES[case].title}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for name in _GPU_HEADS if rows[0].costs else _CPU_HEADS:
        table.add_column(name, justify="right")
    table.add_column("")
    for (mode, family, used), group in groupby(rows, key=lambda row: (row.mode, row.family, row.capability)):
        heading = [MODE_TITLES[mode], family, used if used != capability else ""]
        table.add_row(", ".join(filter(None, heading)), style="italic")
        for row in group:
            table.add_row(f"  {row.implementation}", *_numbers(row), _remark(row), style=_STYLES[row.role])
    return table


def _numbers(row: Row) -> Iterator[str]:
    times = (row.median_ms * 1e3,) if row.costs else (row.median_ms, row.p20_ms, row.p80_ms)
    yield from map(number, (*times, row.gb_per_s))
    for ratio in (row.ratio_to_ours, row.ratio_to_limit):
        yield "" if ratio is None else f"{ratio:.2f}"
    if row.costs:
        yield from cost_cells(row.costs)


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
    measured, bound, verdict = target_cells(figure)
    return f"[{'green' if figure.passed else 'red'}]{verdict:6}[/] {figure.claim}: {measured} ({bound})"


if __name__ == "__main__":
    show(Results.read(Path(sys.argv[1])))
