"""The peak memory of one forward and backward, in a process of its own: ``python -m benchmarks.memory CASE NAME``, of
which the last line is JSON."""

import ctypes
import gc
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from benchmarks.checks import CASES
from benchmarks.contenders import COMPILED_LOOP, ELASTIC_NET, OURS, PEERS, Compiler, clear, forward_backward
from benchmarks.results import Record, Results

# Freed blocks go back to the system at once, so that none is reused unseen.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def measure_memory(results: Results, case: str, name: str) -> None:
    """The peak of one forward and backward with `.grad` None, above what was there before, and what of it the process
    keeps when the gradients are freed, for the next step or for the system to take."""
    if not CLEAR_REFS.exists():
        return results.add_absent(case, "memory", name, "only Linux tells the peak of a single call")
    environment = os.environ | RETURN_FREED_MEMORY | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "benchmarks.memory", case, name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    row = {"case": case, "implementation": name, "role": "ours" if name == OURS else "peer"}
    results.memory.append(row | {"parameter_bytes": CASES[case].bytes} | json.loads(done.stdout.splitlines()[-1]))


def _measured(case: str, name: str) -> Record:
    params, penalties = CASES[case].make_params("cpu"), {p.name: p.penalty for p in PEERS if "fresh" in p.modes}
    # Every child compiles and runs the compiled loop first, so that all start from the same heap: what compiling leaves
    # free in it would count for torch.compile alone.
    compiled = Compiler().function(COMPILED_LOOP, penalties[COMPILED_LOOP])
    forward_backward(partial(compiled, params, **ELASTIC_NET))
    penalty = compiled if name == COMPILED_LOOP else penalties[name]
    if name != COMPILED_LOOP:  # a smaller list starts the threads; the real one would leave us with gradients to reuse
        forward_backward(partial(penalty, CASES["mlp"].make_params("cpu"), **ELASTIC_NET))
    clear(params)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what compiling left behind
    CLEAR_REFS.write_text("5")  # the peak restarts at what is there now
    before = resident("VmRSS")
    forward_backward(partial(penalty, params, **ELASTIC_NET))
    peak = resident("VmHWM") - before
    clear(params)
    return {"peak_bytes": peak, "kept_bytes": max(0, resident("VmRSS") - before)}


def resident(name: str) -> int:
    """Bytes of this process in memory, now (`VmRSS`) or at most (`VmHWM`)."""
    (kilobytes,) = (line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(kilobytes)


if __name__ == "__main__":
    print(json.dumps(_measured(*sys.argv[1:])))
