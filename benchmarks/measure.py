"""Measures, and writes JSON: ``python -m benchmarks.measure --output results.json``."""

import argparse
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.bandwidths import measure_agreement, measure_rooflines
from benchmarks.cases import CASES, DEVICE_CASES, MODES
from benchmarks.contenders import ACCUMULATE, COMPILED_LOOP, ELASTIC_NET, LOOP, OURS, PEERS
from benchmarks.devices import CudaDevice, Device
from benchmarks.machine import describe
from benchmarks.memory import measure_memory
from benchmarks.results import Results
from benchmarks.targets import AVX2_CASES, MEMORY_CASES, targets
from benchmarks.timing import Measurement, reason_of

_RESULTS, _BUILD = Path("benchmarks/results"), Path("build/bench")
_QUICK_MODES = ("value", "value_and_grad", "fresh", "present", "prox", "step")
_QUICK_GPU_CASES = ("small_tensors", "resnet50", "one_tensor", "tinyllama_bf16")

#: What a run measures unless its options say otherwise, by the kind of device and whether it is quick.
_OPTIONS = ("cases", "modes", "rounds", "seconds", "compile_seconds")
PRESETS = {
    ("cpu", False): (DEVICE_CASES["cpu"], tuple(MODES), 30, 60.0, math.inf),
    ("cpu", True): (("net", "mlp", "small_tensors", "resnet50"), _QUICK_MODES, 15, 1.0, math.inf),
    ("cuda", False): (DEVICE_CASES["cuda"], tuple(MODES), 50, 3.0, 200.0),
    ("cuda", True): (_QUICK_GPU_CASES, tuple(MODES), 20, 1.0, 70.0),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of `python -m benchmarks` and of this script, with the presets for what it leaves open."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure fused_reg and its peers.")
    add, names = parser.add_argument, list(dict.fromkeys(peer.name for peer in PEERS))
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure; default: cpu")
    add("--quick", action="store_true", help="fewer cases, modes, peers and rounds, in under two minutes")
    add("--cases", nargs="+", choices=CASES, help="default: those of the device; quick: fewer")
    add("--modes", nargs="+", choices=MODES, help="default: all; quick: fewer")
    add("--peers", nargs="*", choices=names, help="default: all that the device has; quick: fewer")
    add("--rounds", type=int, help="samples of each time, at most (at least 5)")
    add("--seconds", type=float, help="stop the rounds of a case and mode after this long")
    add("--threads", type=int, help="default: as torch chooses")
    add("--compile-all", action="store_true", help="also compile what takes minutes to compile")
    add("--compile-seconds", type=float, help="of the run, for compiling; default on a GPU: 200, quick 70")
    add("--no-children", action="store_true", help="on a CPU: neither peak memory nor AVX2")
    add("--output", type=Path, help=f"JSON to write; default: in {_BUILD}, of a whole GPU {_RESULTS}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.rounds is not None and options.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {options.rounds}")
    options.output = options.output or _output(options.device, options.quick)
    options.chooses_peers = options.peers is None
    peers = [p.name for p in PEERS if options.device in p.devices] if options.chooses_peers else options.peers
    options.peers = list(dict.fromkeys([OURS, ACCUMULATE, *peers]))
    for name, value in zip(_OPTIONS, PRESETS[options.device, options.quick], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def _output(device: str, quick: bool) -> Path:
    if device == "cpu":
        return _BUILD / ("quick.json" if quick else "full.json")
    name = slug(torch.cuda.get_device_name())
    return _BUILD / f"{name}-quick.json" if quick else _RESULTS / f"{name}.json"


def slug(name: str) -> str:
    """The name of a device as a file's: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure(options: argparse.Namespace, device: Device | None = None) -> Results:
    """Measure what the options say, and write it. On a GPU what is done is written after every task, and what fails is
    absent with its reason; on a CPU a wrong result is raised."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = device or (CudaDevice() if options.device == "cuda" else Device())
    results = Results(describe(device), **ELASTIC_NET)
    progress = Progress(console=Console(stderr=True, log_path=False), transient=True)
    # What an earlier run compiled would hide how long it takes.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache), progress:
        for title, task in progress.track(list(_tasks(options, device, results).items())):
            progress.console.log(title)
            run_task(results, title, task)
            if results.gpu:
                _finish(results, options.output)
    _finish(results, options.output)
    return results


def run_task(results: Results, title: str, task: Callable[[], None]) -> None:
    """Run a part of the run; on a GPU, if it fails, note that."""
    try:
        task()
    except Exception as error:
        if not results.gpu:
            raise
        results.add_absent(title, "all of it", "", reason_of(error))


def _finish(results: Results, output: Path) -> None:
    results.targets = targets(results)
    results.write(output)


def _tasks(options: argparse.Namespace, device: Device, results: Results) -> dict[str, Callable[[], None]]:
    """In order. On a CPU the memory comes last, when what it compiles is in the cache."""
    measurement, tasks = Measurement(options, device, results), {}
    if results.gpu:
        tasks["random lists"] = partial(measure_agreement, results, device.name)
        tasks["rooflines"] = partial(measure_rooflines, results, device)
    for case in options.cases:
        for mode in options.modes:
            tasks[f"{CASES[case].title}: {mode}"] = partial(measurement.add, case, mode)
    if options.quick or options.no_children or results.gpu:
        return tasks
    for case in [name for name in AVX2_CASES if name in options.cases]:
        if results.machine["capability"].startswith("AVX512"):
            tasks[f"{CASES[case].title}: AVX2"] = partial(_measure_avx2, options, results, case)
    for case in [name for name in MEMORY_CASES if name in options.cases]:
        for name in [name for name in (OURS, COMPILED_LOOP, LOOP) if name in options.peers]:
            tasks[f"{CASES[case].title}: peak memory of {name}"] = partial(measure_memory, results, case, name)
    return tasks


def _measure_avx2(options: argparse.Namespace, results: Results, case: str) -> None:
    """Our value and gradient outside of autograd, and the machine's limits, with AVX2 at most; in a process of its own,
    because torch chooses an instruction set once."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "avx2.json")
        arguments = f"--cases {case} --modes value value_and_grad --peers --no-children --rounds {options.rounds}"
        arguments += f" --seconds {options.seconds} --threads {torch.get_num_threads()}"
        command = [sys.executable, "-m", "benchmarks.measure", *arguments.split(), "--output", str(output)]
        subprocess.run(command, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "TERM": "dumb"}, check=True)
        results.rows += Results.read(output).rows


if __name__ == "__main__":
    measure(parse())
