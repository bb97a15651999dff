"""The tables of a run: ``python -m benchmarks.markdown results.json``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.cases import CASES, Case
from benchmarks.cuda_markdown import cuda_parts, markdown_table
from benchmarks.limits import LIMITS
from benchmarks.optimizers import ATTACHED, ATTACHED_PROX, LOOP_IN_LOSS, NO_PENALTY, WEIGHT_DECAY
from benchmarks.peers import ACCUMULATE, COMPILED_LOOP, FOREACH_ADD, FOREACH_NORM, LOOP, OURS, limited
from benchmarks.rows import COMPILED_MODES, MemoryRow, Mode, Row
from benchmarks.run import Results
from benchmarks.table import LIMITED_TITLES, MODE_TITLES, caption, notable_errors, number

_PEERS = (OURS.name, COMPILED_LOOP.name, LOOP.name, FOREACH_NORM.name)
_COMPILED = (OURS.name, COMPILED_LOOP.name, NO_PENALTY)
_ADDING = (ACCUMULATE.name, *_PEERS, FOREACH_ADD.name)

# The columns of a step, and their heads.
_STEPS = {
    NO_PENALTY: NO_PENALTY,
    WEIGHT_DECAY: f"`{WEIGHT_DECAY}`",
    OURS.name: "step + fused_reg",
    ATTACHED: "attached",
    ATTACHED_PROX: "attached, prox",
    LOOP_IN_LOSS: LOOP_IN_LOSS,
}


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
        _composed(results, "fresh", _PEERS),
        _composed(results, "present", _ADDING),
        *(_composed(results, mode, _COMPILED) for mode in COMPILED_MODES),
        _limits(results),
        _by_family(results, ("prox",), "proximal step, ms"),
        _by_family(results, ("norm_value", "norm_fresh"), "sum of norms, ms"),
        _steps(results),
        _memory(results),
        _absent(results),
        [f"Medians. {caption(results.machine)}."],
    ]


def _cases(results: Results) -> Iterator[Case]:
    present = {row.case for row in results.rows}
    return (case for case in CASES.values() if case.name in present)


def _composed(results: Results, mode: Mode, names: Sequence[str]) -> list[str]:
    names = _measured(results, mode, names)
    rows = []
    for case in _cases(results) if names else ():
        ours, *others = (results.find(case.name, mode, name) for name in names)
        if ours or any(others):
            title = f"{case.title} ({case.tensors:,} tensors, {_count(case.elements)})"
            rows.append([title, _time(ours), *(_time(row, ours) for row in others)])
    return markdown_table([f"{MODE_TITLES[mode]}, ms", *names], rows)


def _by_family(results: Results, modes: Sequence[Mode], head: str) -> list[str]:
    """Of ours and its peers, a line for each case, mode and family."""
    chosen = [row for row in results.rows if row.mode in modes and row.role != "limit"]
    names = list(dict.fromkeys(row.implementation for row in chosen))
    rows = []
    for (case, mode, family), _ in groupby(chosen, key=lambda row: (row.case, row.mode, row.family)):
        label = ", ".join(filter(None, (CASES[case].title, MODE_TITLES[mode] if len(modes) > 1 else "", family)))
        ours, *others = (results.find(case, mode, name, family=family) for name in names)
        rows.append([label, _time(ours), *(_time(row, ours) for row in others)])
    return markdown_table([head, *names], rows)


def _measured(results: Results, mode: Mode, names: Iterable[str]) -> list[str]:
    """Those that the run has."""
    present = {row.implementation for row in results.rows if row.mode == mode}
    return [name for name in names if name in present]


def _limits(results: Results) -> list[str]:
    rows = []
    for row in results.rows:
        is_limited = row.mode in LIMITS["cpu"] and row.implementation == limited(row.mode)
        if is_limited and CASES[row.case].is_large:
            for name in LIMITS["cpu"][row.mode]:
                limit = results.find(row.case, row.mode, name, row.capability)
                if limit is not None:
                    labels = (CASES[row.case].title, LIMITED_TITLES[row.mode], row.family, row.capability)
                    times = [number(row.median_ms), f"{row.gb_per_s:.1f}", f"`{name}`"]
                    ratio = f"{row.median_ms / limit.median_ms:.2f}"
                    rows.append([", ".join(filter(None, labels)), *times, ratio])
    return markdown_table(["against the limits of the machine", "ms", "GB/s", "limit", "of its time"], rows)


def _steps(results: Results) -> list[str]:
    steps = [row for row in results.rows if row.mode == "step"]
    names = _measured(results, "step", _STEPS)
    rows = []
    for (case, family), _ in groupby(steps, key=lambda row: (row.case, row.family)):
        times = [_time(results.find(case, "step", name, family=family)) for name in names]
        rows.append([f"{CASES[case].title}, {family}", *times])
    return markdown_table(["optimizer step, ms", *(_STEPS[name] for name in names)], rows)


def _memory(results: Results) -> list[str]:
    rows = [[f"{CASES[row.case].title}, {row.implementation}", *_megabytes(row)] for row in results.memory]
    return markdown_table(["memory of forward + backward, MB", "peak", "kept without `.grad`"], rows)


def _megabytes(row: MemoryRow) -> list[str]:
    return [f"{size / 1e6:.0f}" for size in (row.peak_bytes, row.kept_bytes)]


def _absent(results: Results) -> list[str]:
    return list(dict.fromkeys(f"{CASES[row.case].title}: {row.implementation} {row.reason}." for row in results.absent))


def _time(row: Row | None, ours: Row | None = None) -> str:
    """Milliseconds; of a peer also how many times our time."""
    if row is None:
        return "-"
    ratio = f" ({row.median_ms / ours.median_ms:.1f}x)" if ours else ""
    error = notable_errors(row)
    return f"{number(row.median_ms)}{ratio}" + (f", {error}" if error else "")


def _count(elements: int) -> str:
    return f"{elements / 1e6:.1f}M" if elements >= 1e6 else f"{elements:,}"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(document(Results.read(source), source.name), end="")
