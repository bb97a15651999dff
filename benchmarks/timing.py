"""From a plan to rows: verify every contender, race them, and relate the times to ours and to the limit."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from benchmarks import machine
from benchmarks.cases import CASES, Case
from benchmarks.checks import Errors, Strengths, WrongResultError
from benchmarks.optimizers import step_contenders
from benchmarks.peers import PEERS, Peer
from benchmarks.penalties import Problem, clear, penalty_contenders
from benchmarks.race import Contender, Effort, Timing, race
from benchmarks.rows import Absent, Circumstances, Mode, Record, Row

#: An elastic net.
STRENGTHS = Strengths(l1=1e-4, l2=1e-3)

#: One mode of one case.
Item = tuple[Case, Mode]


@dataclass(frozen=True)
class Plan:
    """What to measure, and how long."""

    cases: Sequence[str]
    modes: Sequence[Mode]
    effort: Effort
    peers: Sequence[str] = tuple(PEERS)
    not_compiled: dict[tuple[str, Mode], str] = field(default_factory=dict)  # -> the reason
    not_stepped: Sequence[str] = ()  # cases without the optimizers
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def items(self) -> Iterator[Item]:
        for name in self.cases:
            for mode in self.modes:
                if mode != "step" or name not in self.not_stepped:
                    yield CASES[name], mode


class Measurement:
    """Measures the items of a plan. The parameters, and what is compiled, live as long as their case lasts."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._case: Case | None = None
        self._problem: Problem

    def records(self, case: Case, mode: Mode) -> list[Record]:
        """One item, verified and timed.

        Raises:
            WrongResultError: an implementation does not compute the penalty, or ours breaks the contract.
        """
        if case != self._case:
            self._problem = Problem(case.make_params(torch.device(self._plan.device), self._plan.dtype), STRENGTHS)
            self._case = case
        peers = [peer for peer in map(PEERS.__getitem__, self._plan.peers) if mode in peer.modes]
        skipped = [peer for peer in peers if peer.compiled and (case.name, mode) in self._plan.not_compiled]
        contenders = self._contenders(mode, [peer for peer in peers if peer not in skipped])
        errors = [_verified(case, mode, contender) for contender in contenders]
        # A compilation within the times would look like a slow call.
        with torch.compiler.set_stance("fail_on_recompile"):
            timings = race(contenders, self._plan.effort)
        circumstances = asdict(self._circumstances(case, mode))
        rows = [_row(circumstances, *one) for one in zip(contenders, errors, timings, strict=True)]
        clear(self._problem.params)
        gc.collect()
        reason = self._plan.not_compiled.get((case.name, mode), "")
        return [*_related(rows), *(Absent(case.name, mode, peer.name, reason) for peer in skipped)]

    def _contenders(self, mode: Mode, peers: Sequence[Peer]) -> list[Contender]:
        if mode == "step":
            return step_contenders(self._problem.params)
        return penalty_contenders(self._problem, mode, peers)

    def _circumstances(self, case: Case, mode: Mode) -> Circumstances:
        return Circumstances(
            case=case.name,
            mode=mode,
            device=self._plan.device,
            dtype=str(self._plan.dtype).removeprefix("torch."),
            capability=machine.capability(),
            threads=torch.get_num_threads(),
            tensors=case.tensors,
            elements=case.elements,
        )


def _row(circumstances: dict[str, Any], contender: Contender, errors: Errors, timing: Timing) -> Row:
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
    )


def _verified(case: Case, mode: Mode, contender: Contender) -> Errors:
    try:
        return contender.verify()
    except WrongResultError as error:
        raise WrongResultError(f"{case.title}, {mode}: {contender.family or contender.name}: {error}") from error


def _related(rows: Sequence[Row]) -> list[Row]:
    """The rows with their ratios to our time and to the limit's, each within its family."""
    ours = {row.family: row.median_ms for row in rows if row.role == "ours"}
    limits = {row.family: row.median_ms for row in rows if row.is_reference_limit}
    return [
        replace(
            row,
            ratio_to_ours=row.median_ms / ours[row.family] if row.family in ours else None,
            ratio_to_limit=row.median_ms / limits[row.family] if row.family in limits else None,
        )
        for row in rows
    ]
