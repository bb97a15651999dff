"""What needs a process of its own: peak memory, and another instruction set, which torch chooses once.

A child is ``python -m benchmarks.children TASK ARGUMENT...``; the last line of its output is JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case
from benchmarks.checks import Strengths
from benchmarks.compiling import Compiled
from benchmarks.peers import COMPILED_LOOP, OURS, PEERS, Peer
from benchmarks.penalties import clear, compute
from benchmarks.race import Effort
from benchmarks.rows import Absent, MemoryRow, Record, Row
from benchmarks.timing import STRENGTHS, Measurement, Plan

# Freed blocks go back to the system at once, so that none is reused unseen.
_RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def memory_records(case: Case, peer: Peer, threads: int) -> list[Record]:
    """The peak of one forward and backward with `.grad` None, above what was there before; read in a child."""
    if not _CLEAR_REFS.exists():
        return [Absent(case.name, "memory", peer.name, "only Linux tells the peak of a single call")]
    (sizes,) = _child(["memory", case.name, peer.name, str(threads)], _RETURN_FREED_MEMORY)
    return [MemoryRow(case.name, peer.name, peer.role, case.bytes, **sizes)]


def rows_with_avx2(case: Case, effort: Effort, threads: int) -> list[Row]:
    """Our value and gradient outside of autograd, and the machine's limits, with AVX2 at most; timed in a child."""
    arguments = ["avx2", case.name, str(effort.rounds), str(effort.seconds), str(threads)]
    return [Row(**row) for row in _child(arguments, {"ATEN_CPU_CAPABILITY": "avx2"})]


def _child(arguments: Sequence[str], environment: dict[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.children", *arguments]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return records


def _memory(case: Case, peer: Peer, strengths: Strengths) -> dict[str, int]:
    params = case.make_params(torch.device("cpu"))
    # Every child compiles and runs the compiled loop first, so that all start from the same heap: what compiling
    # leaves free in it would count for torch.compile alone.
    compiled = Compiled(COMPILED_LOOP.penalty).function
    compute(compiled, params, strengths, "fresh")
    penalty = compiled if peer.compiled else peer.penalty
    if not peer.compiled:  # a smaller list starts the threads; the real one would leave us with gradients to reuse
        compute(penalty, CASES["mlp"].make_params(torch.device("cpu")), strengths, "fresh")
    clear(params)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compiling left behind
    _CLEAR_REFS.write_text("5")  # the peak restarts at what is there now
    before = _resident("VmRSS")
    compute(penalty, params, strengths, "fresh")
    peak = _resident("VmHWM") - before
    clear(params)
    return {"peak_bytes": peak, "kept_bytes": max(0, _resident("VmRSS") - before)}


def _resident(name: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at most (`VmHWM`)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def main(task: str, case: str, *arguments: str) -> None:
    """The child."""
    *options, threads = arguments
    torch.set_num_threads(int(threads))
    records: list[dict[str, Any]]
    if task == "memory":
        (peer,) = options
        records = [_memory(CASES[case], PEERS[peer], STRENGTHS)]
    else:
        rounds, seconds = options
        plan = Plan([case], ["value", "value_and_grad"], Effort(int(rounds), float(seconds)), peers=[OURS.name])
        measurement = Measurement(plan)
        records = [asdict(row) for item in plan.items() for row in measurement.records(*item)]
    print(json.dumps(records))


if __name__ == "__main__":
    main(*sys.argv[1:])
