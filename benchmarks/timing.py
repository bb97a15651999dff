"""From a plan to rows: verify every contender, race them, and relate the times to ours and to the limit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import CASES, Case
from benchmarks.checks import Errors, Strengths, WrongResultError
from benchmarks.compiled_steps import compiled_step_candidates
from benchmarks.compiling import CompileBudget
from benchmarks.devices import Device
from benchmarks.norms import norm_candidates
from benchmarks.optimizers import step_candidates
from benchmarks.peers import COMPILED_LOOP, PEERS, Peer, peers_of
from benchmarks.penalties import Problem, clear, penalty_candidates
from benchmarks.proximal import prox_candidates
from benchmarks.race import Candidate, Contender, Effort, Timing, race
from benchmarks.rows import COMPILED_MODES, Absent, Circumstances, Costs, Mode, Record, Row, UnavailableError

#: An elastic net.
STRENGTHS = Strengths(l1=1e-4, l2=1e-3)

_PATH = re.compile(r"(?:/[^\s/:'\",]+){2,}")
_LONGEST_REASON = 200

#: One mode of one case.
Item = tuple[Case, Mode]


@dataclass(frozen=True)
class Plan:
    """What to measure, on what, and how long."""

    cases: Sequence[str]
    modes: Sequence[Mode]
    effort: Effort
    peers: Sequence[str] = peers_of("cpu")
    not_raced: dict[str, str] = field(default_factory=dict)  # peer -> the reason
    not_compiled: dict[tuple[str, Mode], str] = field(default_factory=dict)  # -> the reason
    not_stepped: Sequence[str] = ()  # cases without the optimizers
    device: Device = field(default_factory=Device)
    compile_seconds: float = math.inf  # of all cases together
    keeps_going: bool = False  # past a contender that fails, as one on a GPU may

    def items(self) -> Iterator[Item]:
        for name in self.cases:
            for mode in self.modes:
                if mode != "step" or name not in self.not_stepped:
                    yield CASES[name], mode

    def reason_to_skip(self, peer: Peer, case: Case, mode: Mode) -> str | None:
        """Why a peer is left out of an item; None: it is not."""
        if peer.name in self.not_raced:
            return self.not_raced[peer.name]
        return self.not_compiled.get((case.name, mode)) if peer.compiled else None


class Measurement:
    """Measures the items of a plan. The parameters, and what is compiled, live as long as their case lasts."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._budget = CompileBudget(plan.compile_seconds)
        self._case: Case | None = None
        self._problem: Problem | None = None

    def records(self, case: Case, mode: Mode) -> list[Record]:
        """One item, verified and timed.

        Raises:
            WrongResultError: an implementation does not compute the penalty, or ours breaks the contract.
        """
        problem = self._problem_of(case)
        if mode in COMPILED_MODES and (case.name, mode) in self._plan.not_compiled:
            return [Absent(case.name, mode, COMPILED_LOOP.name, self._plan.not_compiled[case.name, mode])]
        peers = [peer for peer in map(PEERS.__getitem__, self._plan.peers) if mode in peer.modes]
        skipped = {peer.name: reason for peer in peers if (reason := self._plan.reason_to_skip(peer, case, mode))}
        peers = [peer for peer in peers if peer.name not in skipped]
        records = self._measured(case, mode, _candidates(problem, mode, peers))
        clear(problem.params)
        self._plan.device.release()
        return [*records, *(Absent(case.name, mode, name, reason) for name, reason in skipped.items())]

    def _problem_of(self, case: Case) -> Problem:
        if case != self._case or self._problem is None:
            self._problem = None  # its memory
            self._plan.device.release()
            torch._dynamo.reset()  # what was compiled for the last case
            params = case.make_params(torch.device(self._plan.device.name))
            self._problem = Problem(params, STRENGTHS, self._budget)
            self._case = case
        return self._problem

    def _measured(self, case: Case, mode: Mode, candidates: Sequence[Candidate]) -> list[Record]:
        device = self._plan.device
        absent: list[Record] = []
        verified: list[tuple[Contender, Errors]] = []
        for candidate in candidates:
            try:
                verified.append(_verified(case, mode, candidate))
            except Exception as error:
                if not self._plan.keeps_going:
                    raise
                absent.append(Absent(case.name, mode, str(candidate), reason_of(error)))
        contenders = [contender for contender, _ in verified]
        # A compilation within the times would look like a slow call.
        with torch.compiler.set_stance("fail_on_recompile"):
            timings = race(contenders, self._plan.effort, device)
            costs = [
                device.costs(contender.call, timing.host, contender.capture_bytes)
                for contender, timing in zip(contenders, timings, strict=True)
            ]
        circumstances = asdict(self._circumstances(case, mode))
        rows = [
            _row(circumstances, contender, errors, timing, cost)
            for (contender, errors), timing, cost in zip(verified, timings, costs, strict=True)
        ]
        return [*_related(rows), *absent]

    def _circumstances(self, case: Case, mode: Mode) -> Circumstances:
        return Circumstances(
            case=case.name,
            mode=mode,
            device=self._plan.device.name,
            dtype=str(case.dtype).removeprefix("torch."),
            capability=machine.capability(),
            threads=torch.get_num_threads(),
            tensors=case.tensors,
            elements=case.elements,
        )


def reason_of(error: Exception) -> str:
    """Why something is absent: the error in a line, without the machine's paths."""
    if isinstance(error, UnavailableError):
        return str(error)
    message = " ".join(str(error).split())
    text = _PATH.sub("...", f"failed: {type(error).__name__}: {message}")
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def _candidates(problem: Problem, mode: Mode, peers: Sequence[Peer]) -> list[Candidate]:
    if mode in COMPILED_MODES:
        return compiled_step_candidates(problem, mode, [peer.name for peer in peers])
    if mode == "step":
        return step_candidates(problem.params)
    if mode == "prox":
        return prox_candidates(problem.oracle, flat=problem.is_on_cuda)
    if mode in ("norm_value", "norm_fresh"):
        return norm_candidates(problem.oracle, mode)
    return penalty_candidates(problem, mode, peers)


def _row(
    circumstances: dict[str, Any], contender: Contender, errors: Errors, timing: Timing, costs: Costs | None
) -> Row:
    return Row(
        **circumstances,
        implementation=contender.name,
        role=contender.role,
        family=contender.family,
        is_reference_limit=contender.is_reference_limit,
        bytes=contender.bytes,
        median_ms=timing.median * 1e3,
        p20_ms=timing.p20 * 1e3,
        p80_ms=timing.p80 * 1e3,
        samples=timing.samples,
        calls_per_sample=timing.calls,
        gb_per_s=contender.bytes / timing.median / 1e9,
        ratio_to_ours=None,
        ratio_to_limit=None,
        value_error=errors.value,
        gradient_error=errors.gradient,
        compile_s=contender.compile_s,
        costs=costs,
    )


def _verified(case: Case, mode: Mode, candidate: Candidate) -> tuple[Contender, Errors]:
    try:
        contender = candidate.build()
        return contender, contender.verify()
    except WrongResultError as error:
        raise WrongResultError(f"{case.title}, {mode}: {candidate}: {error}") from error


def _related(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratios to the first of ours within the family, and to the limit, which families share."""
    ours = {row.family: row.median_ms for row in reversed(rows) if row.role == "ours"}
    limits = {row.family: row.median_ms for row in rows if row.is_reference_limit}
    return [
        replace(
            row,
            ratio_to_ours=row.median_ms / ours[row.family] if row.family in ours else None,
            ratio_to_limit=row.median_ms / limit if (limit := limits.get(row.family, limits.get(""))) else None,
        )
        for row in rows
    ]
