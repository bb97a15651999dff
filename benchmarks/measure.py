"""A run: from its options to results. Each contender is made and checked, those of a case and mode are raced, and their
times are related to ours and to the limit."""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import Progress

import fused_reg
from benchmarks import contenders as c
from benchmarks.checks import CASES, COMPILED_MODES, MODES, RELATIVE_MODES, STEP_MODES, Case, Problem, WrongResultError
from benchmarks.devices import CudaDevice, Device, race
from benchmarks.limits import limits, rooflines
from benchmarks.memory import measure_memory
from benchmarks.optimizers import optimizer_steps
from benchmarks.relative import relative_penalties
from benchmarks.results import Record, Results, targets
from benchmarks.steps import compiled_steps, prox_steps
from fused_reg import _ops

#: Who competes in a mode, besides its limits; of the modes that are not here `penalties`.
CONTENDERS = {"prox": prox_steps} | dict.fromkeys(STEP_MODES, optimizer_steps)
CONTENDERS |= dict.fromkeys(COMPILED_MODES, compiled_steps) | dict.fromkeys(RELATIVE_MODES, relative_penalties)

_MEMORY_CASES = ("resnet50", "gpt2")
# What --quick compiles, by the device, of cases and modes: the rest takes minutes.
_QUICKLY_COMPILED = {
    "cpu": (("mlp",), ("fresh", "present")),
    "cuda": (("resnet50", "tinyllama_bf16"), ("fresh",)),
}


def contenders_of(problem: Problem, mode: str, peers: list[c.Peer]) -> list[c.Contender]:
    return [*CONTENDERS.get(mode, c.penalties)(problem, mode, peers), *limits(problem, mode)]


def takes_minutes(options: argparse.Namespace, peer: c.Peer, case: str, mode: str) -> bool:
    """Whether a peer is left out because of what it takes to compile."""
    if peer.options is None or options.compile_all:
        return False
    cases, modes = _QUICKLY_COMPILED[options.device]
    is_quick = case in cases and mode in modes and not peer.options
    is_gpus_step = mode in (*STEP_MODES, *COMPILED_MODES) and options.device == "cuda"
    return case.startswith("small_tensors") or is_gpus_step or (options.quick and not is_quick)


class Run:
    """What is measured. The parameters, and what is compiled, live as long as their case lasts."""

    def __init__(self, options: argparse.Namespace, device: Device | None = None) -> None:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self._options, self._compiler = options, c.Compiler(options.compile_seconds)
        self._device = device or (CudaDevice() if options.device == "cuda" else Device())
        self._case: Case | None = None
        self.results = Results(describe(self._device), **c.ELASTIC_NET)

    def measure(self) -> Results:
        """Measure what the options say. What is done is written after every task, so that a run which is cut keeps it.
        On a GPU what fails is absent with its reason; on a CPU a wrong result is raised."""
        progress = Progress(console=Console(stderr=True, log_path=False), transient=True)
        # What an earlier run compiled would hide how long it takes.
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache), progress:
            for title, task in progress.track(list(self._tasks().items())):
                progress.console.log(title)
                try:
                    task()
                except Exception as error:
                    if not self.results.gpu:
                        raise
                    self.results.add_absent(title, "all of it", "", reason_of(error))
                self._write()
        return self.results

    def _write(self) -> None:
        self.results.targets = targets(self.results)
        self.results.write(self._options.output)

    def _tasks(self) -> dict[str, Callable[[], None]]:
        options, results, tasks = self._options, self.results, {}
        if results.gpu:
            tasks["rooflines"] = lambda: results.rooflines.extend(rooflines(self._device))
        for part in options.parts or [{}]:  # of presets.json; what compiles measures once more what is there without
            compiles = part.get("compiles", True)
            for case in [case for case in part.get("cases", options.cases) if case in options.cases]:
                for mode in [mode for mode in part.get("modes", options.modes) if mode in options.modes]:
                    title = f"{CASES[case].title}: {mode}" + ", without a compiler" * (not compiles)
                    tasks[title] = partial(self.add, case, mode, compiles)
        if options.quick or options.no_children or results.gpu:
            return tasks
        for also in options.also:
            child = {k: [x for x in getattr(options, k) if x in also.get(k, [x])] for k in ("cases", "modes", "peers")}
            is_possible = "capability" not in also or results.machine["capability"].startswith("AVX512")
            if is_possible and child["cases"] and child["modes"]:
                tasks[f"with {also}"] = partial(self._add_child, also | child)
        for case in [name for name in _MEMORY_CASES if name in options.cases]:  # what these compile is in the cache now
            for name in [name for name in (c.OURS, c.COMPILED_LOOP, c.LOOP) if name in options.peers]:
                tasks[f"{CASES[case].title}: peak memory of {name}"] = partial(measure_memory, results, case, name)
        return tasks

    def _add_child(self, also: Mapping[str, Any]) -> None:
        """With other instructions or threads, and without what is compiled; in a process of its own, because torch
        chooses an instruction set once."""
        options = self._options
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "child.json")
            environment = os.environ | {"TERM": "dumb"}
            if "capability" in also:
                environment["ATEN_CPU_CAPABILITY"] = also["capability"].lower()
            words = f"--no-children --rounds={options.rounds} --seconds={options.seconds}"
            words += f" --threads={also.get('threads', torch.get_num_threads())}"
            peers = [name for name in also["peers"] if not name.startswith(c.COMPILED_LOOP)]
            command = [sys.executable, "-m", "benchmarks", *words.split(), f"--output={output}", "--peers", *peers]
            command += ["--cases", *also["cases"], "--modes", *also["modes"], "--optimizers", *options.optimizers]
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            self.results.rows += Results.read(output).rows

    def add(self, case: str, mode: str, compiles: bool = True) -> None:
        """The rows of a case and mode, in the place of those that are there; with peers that compile, or without. A
        wrong result, and on a CPU any failure, is raised."""
        options = self._options
        if CASES[case] != self._case:
            self._problem = None  # its memory
            self._device.release()
            self._compiler.reset()
            self._case = CASES[case]
            self._problem = Problem(self._case.make_params(self._device.name), self._compiler)
        peers = [p for p in c.PEERS if mode in p.modes and (p.name in options.peers or p.family or p.role == "limit")]
        skipped = [p for p in peers if takes_minutes(options, p, case, mode)]
        peers = [p for p in peers if compiles or p in skipped or p.options is None]
        if not (mode in COMPILED_MODES and skipped):
            contenders = contenders_of(self._problem, mode, [p for p in peers if p not in skipped])
            left = [x for x in contenders if mode not in STEP_MODES or x.family in options.optimizers]
            self._race(mode, left)
        for peer in skipped:
            self.results.add_absent(case, mode, peer.name, "takes minutes to compile: --compile-all")
        c.clear(self._problem.params)
        self._device.release()

    def _race(self, mode: str, contenders: list[c.Contender]) -> None:
        case, results, rows, works = self._case, self.results, [], []
        shared = {"case": case.name, "mode": mode, "device": self._device.name, "dtype": str(case.dtype).split(".")[1]}
        shared |= {name: results.machine[name] for name in ("capability", "threads")}
        shared |= {"tensors": len(case.shapes), "elements": case.elements}
        for contender in contenders:
            label = ", ".join(filter(None, (contender.name, contender.family)))
            try:
                work = contender.make()
                errors = work.verify()
            except Exception as error:
                if isinstance(error, WrongResultError):
                    error = WrongResultError(f"{case.title}, {mode}: {label}: {error}")
                if not results.gpu:
                    raise error from None
                results.add_absent(case.name, mode, label, reason_of(error))
            else:
                works.append(work)
                errors = dict(zip(("value_error", "gradient_error"), errors, strict=True))
                row = shared | {"implementation": contender.name, "role": contender.role, "family": contender.family}
                row["is_reference_limit"] = contender.is_reference_limit
                row["bytes"] = (contender.passes or MODES[mode].passes) * case.bytes
                rows.append(row | errors | {"compile_s": work.compile_s})
        # A compilation within the times would look like a slow call.
        is_compiled = any(row["compile_s"] is not None for row in rows)
        with torch.compiler.set_stance("fail_on_recompile") if is_compiled else nullcontext():
            timings = race([work.call for work in works], self._options.rounds, self._options.seconds, self._device)
            for row, work, timing in zip(rows, works, timings, strict=True):
                row |= timing
                row["costs"] = self._device.costs(work.call, row.pop("host_us"), work.capture_bytes)
        bandwidth = next((r["gb_per_s"] for r in results.rooflines if mode in r["modes"]), None)
        ours = {row["family"]: row["median_ms"] for row in reversed(rows) if row["role"] == "ours"}
        bounds = {row["family"]: row["median_ms"] for row in rows if row["is_reference_limit"]}
        for row in rows:
            family, median = row["family"], row["median_ms"]
            bound = bounds.get(family, bounds.get(""))  # families share a limit that has none
            row["gb_per_s"] = row["bytes"] / median / 1e6
            row["ratio_to_ours"] = median / ours[family] if family in ours else None
            row["ratio_to_limit"] = median / bound if bound else None
            if row["costs"]:
                row["costs"]["percent_of_roofline"] = 100 * row["gb_per_s"] / bandwidth if bandwidth else None
        results.rows = [row for row in results.rows if not shared.items() <= row.items()] + rows


def reason_of(error: Exception) -> str:
    """Why something is absent: the error in a line, without the machine's paths."""
    text = " ".join(f"failed: {type(error).__name__}: {error}".split())
    text = re.sub(r"(?:/[^\s/:'\",]+){2,}", "...", text)
    return text if len(text) <= 200 else text[:200] + "..."


def describe(device: Device) -> Record:
    """What the times depend on, read before the run; nothing says whose machine it is."""
    here = ("git", "-C", str(Path(__file__).parent))
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
    return {
        "cpu": _found("/proc/cpuinfo", r"model name\s*: (.*)") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),  # which `ATEN_CPU_CAPABILITY` may have lowered
        # Whether fresh memory comes in pages of 4 KiB or of 2 MiB: it sets the speed of a fresh copy.
        "huge_pages": _found("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(.*)\]") or "unknown",
        "os": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_reg": fused_reg.__version__,
        "build": dict(_ops.library.build_info()),
        # A copy of the sources that has no history names its commit in a variable.
        "commit": output_of(*here, "rev-parse", "HEAD") or os.environ.get("FUSED_REG_COMMIT") or "unknown",
        "dirty": bool(output_of(*here, "status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # over the minute before
        "gpu": device.gpu and device.gpu | {"driver": driver},
    }


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _found(file: str, pattern: str) -> str:
    found = re.search(pattern, Path(file).read_text()) if Path(file).exists() else None
    return found[1] if found else ""
