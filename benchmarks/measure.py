"""Measures, and writes JSON: ``python -m benchmarks.measure --output results.json``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.cases import CASES
from benchmarks.children import memory_records, rows_with_avx2
from benchmarks.figures import AVX2_CASES, MEMORY_CASES, with_figures
from benchmarks.peers import COMPILED_LOOP, LOOP, OURS, PEERS
from benchmarks.progress import shown
from benchmarks.race import Effort
from benchmarks.rows import MODES, Absent, MemoryRow, Mode, Record, Results, Row
from benchmarks.timing import STRENGTHS, Measurement, Plan

_QUICK_CASES = ("net", "mlp", "small_tensors", "resnet50")
_QUICK_EFFORT = Effort(rounds=15, seconds=1.0)
_FULL_EFFORT = Effort(rounds=30, seconds=60.0)
_QUICK_OUTPUT, _FULL_OUTPUT = Path("build/bench/quick.json"), Path("build/bench/full.json")

# What takes too long to compile, and what --quick leaves out for the same reason.
_MINUTES = "takes minutes to compile: --compile-all"
_NOT_COMPILED: dict[tuple[str, Mode], str] = {("small_tensors", mode): _MINUTES for mode in MODES}
_QUICK_NOT_COMPILED = _NOT_COMPILED | {("resnet50", "value"): "not in --quick"}
_QUICK_NOT_STEPPED = ("net", "mlp", "small_tensors")


@dataclass(frozen=True)
class _Task:
    """A part of the run, with the name that the progress display gives it."""

    title: str
    run: Callable[[], Sequence[Record]]

    def __str__(self) -> str:
        return self.title


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m benchmarks` and of this script."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure fused_reg and its peers.")
    parser.add_argument("--quick", action="store_true", help="the smaller cases, in under three minutes")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; quick: " + ", ".join(_QUICK_CASES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=tuple(PEERS), help="default: all")
    parser.add_argument("--rounds", type=int, help="samples of each time, at most (at least 5)")
    parser.add_argument("--seconds", type=float, help="stop the rounds of a case and mode after this long")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--compile-all", action="store_true", help="also compile what takes minutes to compile")
    parser.add_argument("--no-children", action="store_true", help="neither peak memory nor AVX2")
    parser.add_argument("--output", type=Path, help=f"JSON to write; default: {_FULL_OUTPUT}, {_QUICK_OUTPUT}")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = _QUICK_OUTPUT if options.quick else _FULL_OUTPUT
    if options.rounds is not None and options.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {options.rounds}")
    return options


def measure(options: argparse.Namespace) -> Results:
    """Measure what the options say, and write it.

    Raises:
        WrongResultError: an implementation does not compute the penalty, or ours breaks the contract.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    this = machine.describe()
    records: list[Record] = []
    with _empty_compile_cache():
        for task in shown(_tasks(options)):
            records += task.run()
    results = with_figures(
        Results(
            machine=this,
            l1=STRENGTHS.l1,
            l2=STRENGTHS.l2,
            rows=[record for record in records if isinstance(record, Row)],
            memory=[record for record in records if isinstance(record, MemoryRow)],
            absent=[record for record in records if isinstance(record, Absent)],
            figures=(),
        )
    )
    results.write(options.output)
    return results


def _tasks(options: argparse.Namespace) -> list[_Task]:
    """In order. The memory comes last, when what it compiles is in the cache."""
    effort = _QUICK_EFFORT if options.quick else _FULL_EFFORT
    effort = Effort(
        rounds=effort.rounds if options.rounds is None else options.rounds,
        seconds=effort.seconds if options.seconds is None else options.seconds,
    )
    cases = options.cases or (_QUICK_CASES if options.quick else tuple(CASES))
    plan = Plan(
        cases=cases,
        modes=options.modes,
        effort=effort,
        peers=list(dict.fromkeys([OURS.name, *options.peers])),
        not_compiled={} if options.compile_all else _QUICK_NOT_COMPILED if options.quick else _NOT_COMPILED,
        not_stepped=_QUICK_NOT_STEPPED if options.quick else (),
    )
    measurement = Measurement(plan)
    tasks = [_Task(f"{case.title}: {mode}", partial(measurement.records, case, mode)) for case, mode in plan.items()]
    if options.no_children:
        return tasks
    threads = torch.get_num_threads()
    if not options.quick and machine.capability().startswith("AVX512"):
        for case in [CASES[name] for name in AVX2_CASES if name in cases]:
            tasks.append(_Task(f"{case.title}: AVX2", partial(rows_with_avx2, case, effort, threads)))
    for case in [CASES[name] for name in MEMORY_CASES if name in cases]:
        for peer in (OURS, COMPILED_LOOP, LOOP):
            if peer.name in plan.peers:
                title = f"{case.title}: peak memory of {peer.name}"
                tasks.append(_Task(title, partial(memory_records, case, peer, threads)))
    return tasks


@contextmanager
def _empty_compile_cache() -> Iterator[None]:
    """What torch.compile made in an earlier run would hide how long it takes."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="fused_reg_bench_") as directory:
        os.environ[name] = directory
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


if __name__ == "__main__":
    measure(parse(sys.argv[1:]))
