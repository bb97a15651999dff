"""Measures, and writes JSON: ``python -m benchmarks.measure --output results.json``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.agreement import LISTS, measure_agreement
from benchmarks.cases import CASES
from benchmarks.children import memory_records, rows_with_avx2
from benchmarks.cuda import CudaDevice
from benchmarks.devices import Device
from benchmarks.figures import AVX2_CASES, MEMORY_CASES, with_figures
from benchmarks.peers import ACCUMULATE, COMPILED_LOOP, LOOP, OURS, PEERS, peers_of
from benchmarks.presets import PRESETS
from benchmarks.progress import shown
from benchmarks.race import Effort
from benchmarks.rooflines import measure_rooflines, roofline_bytes, with_percents
from benchmarks.rows import MODES, Absent, Agreement, MemoryRow, Record, Roofline, Row
from benchmarks.run import Machine, Results
from benchmarks.timing import STRENGTHS, Measurement, Plan, reason_of

_RESULTS, _BUILD = Path("benchmarks/results"), Path("build/bench")


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure; default: cpu")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds, in under three minutes")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: those of the device; quick: fewer")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="default: all")
    parser.add_argument("--peers", nargs="*", choices=PEERS, help="default: all that the device has; quick: fewer")
    parser.add_argument("--rounds", type=int, help="samples of each time, at most (at least 5)")
    parser.add_argument("--seconds", type=float, help="stop the rounds of a case and mode after this long")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--compile-all", action="store_true", help="also compile what takes minutes to compile")
    parser.add_argument(
        "--compile-seconds", type=float, help="of the run, for compiling; default on a GPU: 200, quick 70"
    )
    parser.add_argument("--no-children", action="store_true", help="on a CPU: neither peak memory nor AVX2")
    parser.add_argument("--output", type=Path, help=f"JSON to write; default: in {_BUILD}, of a whole GPU {_RESULTS}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.rounds is not None and options.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {options.rounds}")
    if options.output is None:
        options.output = _output(options.device, options.quick)
    return options


def measure(options: argparse.Namespace, device: Device | None = None) -> Results:
    """Measure what the options say, and write it. On a GPU what is done is written after every task.

    Raises:
        WrongResultError: on a CPU, an implementation does not compute the penalty, or ours breaks the contract.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if device is None:
        device = CudaDevice() if options.device == "cuda" else Device()
    this = machine.describe(device.gpu())
    records: list[Record] = []
    with _empty_compile_cache():
        for task in shown(_tasks(options, device)):
            records += _outcome(task, keeps_going=this.gpu is not None)
            if this.gpu:
                _results(this, records).write(options.output)
    results = _results(this, records)
    results.write(options.output)
    return results


def slug(name: str) -> str:
    """The name of a device as a file's: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _output(device: str, quick: bool) -> Path:
    if device == "cpu":
        return _BUILD / ("quick.json" if quick else "full.json")
    name = slug(torch.cuda.get_device_name())
    return _BUILD / f"{name}-quick.json" if quick else _RESULTS / f"{name}.json"


def _outcome(task: _Task, keeps_going: bool) -> Sequence[Record]:
    """What a task measured; if it failed and the run goes on, that it failed."""
    try:
        return task.run()
    except Exception as error:
        if not keeps_going:
            raise
        return [Absent(task.title, "all of it", "", reason_of(error))]


def _results(this: Machine, records: Sequence[Record]) -> Results:
    rooflines = tuple(record for record in records if isinstance(record, Roofline))
    return with_figures(
        Results(
            machine=this,
            l1=STRENGTHS.l1,
            l2=STRENGTHS.l2,
            rows=with_percents([record for record in records if isinstance(record, Row)], rooflines),
            memory=[record for record in records if isinstance(record, MemoryRow)],
            absent=[record for record in records if isinstance(record, Absent)],
            figures=(),
            rooflines=rooflines,
            agreement=next((record for record in records if isinstance(record, Agreement)), None),
        )
    )


def _tasks(options: argparse.Namespace, device: Device) -> list[_Task]:
    """In order. On a CPU the memory comes last, when what it compiles is in the cache."""
    plan = _plan(options, device)
    measurement = Measurement(plan)
    tasks = [_Task(f"{case.title}: {mode}", partial(measurement.records, case, mode)) for case, mode in plan.items()]
    if isinstance(device, CudaDevice):
        return [*_tasks_before(device), *tasks]
    return tasks if options.no_children else [*tasks, *_children(options, plan)]


def _plan(options: argparse.Namespace, device: Device) -> Plan:
    preset = PRESETS[options.device, options.quick]
    peers = peers_of(options.device) if options.peers is None else options.peers
    return Plan(
        cases=options.cases or preset.cases,
        modes=options.modes,
        effort=Effort(
            rounds=preset.effort.rounds if options.rounds is None else options.rounds,
            seconds=preset.effort.seconds if options.seconds is None else options.seconds,
        ),
        peers=list(dict.fromkeys([OURS.name, ACCUMULATE.name, *peers])),
        not_raced=preset.not_raced if options.peers is None else {},
        not_compiled={} if options.compile_all else preset.not_compiled,
        not_stepped=preset.not_stepped,
        device=device,
        compile_seconds=preset.compile_seconds if options.compile_seconds is None else options.compile_seconds,
        keeps_going=options.device == "cuda",
    )


def _tasks_before(device: CudaDevice) -> list[_Task]:
    size = roofline_bytes(device.l2_bytes)
    return [
        _Task(f"{LISTS:,} random lists", lambda: [measure_agreement(device.name, LISTS)]),
        _Task("rooflines", lambda: measure_rooflines(device, size)),
    ]


def _children(options: argparse.Namespace, plan: Plan) -> list[_Task]:
    tasks = []
    threads = torch.get_num_threads()
    if not options.quick and machine.capability().startswith("AVX512"):
        for case in [CASES[name] for name in AVX2_CASES if name in plan.cases]:
            tasks.append(_Task(f"{case.title}: AVX2", partial(rows_with_avx2, case, plan.effort, threads)))
    for case in [CASES[name] for name in MEMORY_CASES if name in plan.cases]:
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
