"""From a case and mode to rows: make and check every contender, race them, relate the times to ours and the limit."""

import argparse
import re

import torch

from benchmarks.cases import CASES, COMPILED_MODES, MODES, NORM_MODES, Case
from benchmarks.checks import WrongResultError
from benchmarks.compiled_steps import compiled_steps
from benchmarks.compiling import Compiler, UnavailableError
from benchmarks.contenders import COMPILED_LOOP, PEERS, Contender, Peer, Problem, clear, penalties
from benchmarks.devices import Device, race
from benchmarks.limits import limits
from benchmarks.optimizers import optimizer_steps
from benchmarks.proximal import prox_steps
from benchmarks.results import Record, Results

_MINUTES, _NOT_QUICK = "takes minutes to compile: --compile-all", "is not in --quick"
_ON_CPU = "has its compiled training step measured on a CPU only: --compile-all"

# What --quick compiles, by the device: the rest takes minutes.
_QUICKLY_COMPILED = {"cpu": ("mlp",), "cuda": ("resnet50", "one_tensor", "tinyllama_bf16")}

# Cases without steps. A bfloat16 parameter moves by less than its rounding: a step of it cannot be checked.
_NOT_STEPPED = {"cpu": ("tinyllama_bf16",), "cuda": ("small_tensors", "vit_b16", "one_tensor", "tinyllama_bf16")}


def reason_to_skip(options: argparse.Namespace, peer: Peer, case: str, mode: str) -> str | None:
    """Why a compiled peer is left out of a case and mode; None: it is not."""
    if options.quick and options.chooses_peers and peer.options:
        return _NOT_QUICK
    if peer.options is None or options.compile_all:
        return None
    if case == "small_tensors":
        return _MINUTES
    if mode in COMPILED_MODES and options.device == "cuda":
        return _ON_CPU
    is_quick = case in _QUICKLY_COMPILED[options.device] and mode in ("fresh", "present")
    return None if is_quick or not options.quick else _NOT_QUICK


def contenders_of(problem: Problem, mode: str, peers: list[Peer]) -> list[Contender]:
    """All of a mode."""
    if mode in COMPILED_MODES:
        return list(compiled_steps(problem, mode, peers))
    if mode == "step":
        return list(optimizer_steps(problem))
    own = prox_steps(problem) if mode == "prox" else penalties(problem, mode, peers)
    return [*own, *limits(problem, mode)]


class Measurement:
    """Measures cases and modes. The parameters, and what is compiled, live as long as their case lasts."""

    def __init__(self, options: argparse.Namespace, device: Device, results: Results) -> None:
        self._options, self._device, self._results = options, device, results
        self._compiler = Compiler(options.compile_seconds)
        self._case: Case | None = None

    def add(self, case: str, mode: str) -> None:
        """The rows of a case and mode. A wrong result, and on a CPU any failure, is raised."""
        options = self._options
        if CASES[case] != self._case:
            self._problem = None  # its memory
            self._device.release()
            self._compiler.reset()
            self._case = CASES[case]
            self._problem = Problem(self._case.make_params(self._device.name), self._compiler)
        peers = [p for p in PEERS if mode in p.modes and (p.name in options.peers or mode in NORM_MODES)]
        considered = [p for p in PEERS if p.name == COMPILED_LOOP] if mode in COMPILED_MODES else peers
        skipped = {p.name: reason for p in considered if (reason := reason_to_skip(options, p, case, mode))}
        is_left_out = mode == "step" and case in _NOT_STEPPED[options.device]
        if not (is_left_out or (mode in COMPILED_MODES and skipped)):
            self._race(mode, contenders_of(self._problem, mode, [p for p in peers if p.name not in skipped]))
        for name, reason in skipped.items():
            self._results.add_absent(case, mode, name, reason)
        clear(self._problem.params)
        self._device.release()

    def _race(self, mode: str, contenders: list[Contender]) -> None:
        case, results, rows, works = self._case, self._results, [], []
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
                rows.append(self._row(mode, contender) | errors._asdict() | {"compile_s": work.compile_s})
        # A compilation within the times would look like a slow call.
        with torch.compiler.set_stance("fail_on_recompile"):
            timings = race([work.call for work in works], self._options.rounds, self._options.seconds, self._device)
            for row, work, timing in zip(rows, works, timings, strict=True):
                row |= timing._asdict()
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
        results.rows += rows

    def _row(self, mode: str, contender: Contender) -> Record:
        """What a time is a time of."""
        case, machine = self._case, self._results.machine
        row = {"case": case.name, "mode": mode, "device": self._device.name, "dtype": str(case.dtype).split(".")[1]}
        row |= {"capability": machine["capability"], "threads": machine["threads"], "tensors": len(case.shapes)}
        row |= {"elements": case.elements, "implementation": contender.name, "role": contender.role}
        row |= {"family": contender.family, "is_reference_limit": contender.is_reference_limit}
        return row | {"bytes": (contender.passes or MODES[mode].passes) * case.bytes}


def reason_of(error: Exception) -> str:
    """Why something is absent: the error in a line, without the machine's paths."""
    if isinstance(error, UnavailableError):
        return str(error)
    text = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
    text = re.sub(r"(?:/[^\s/:'\",]+){2,}", "...", text)
    return text if len(text) <= 200 else text[:200] + "..."
