"""The contenders of each mode that computes a penalty: ours and its peers, called, and replayed by a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import fused_reg
from benchmarks.checks import Errors, Oracle, Strengths
from benchmarks.compiling import CompileBudget, Compiled
from benchmarks.graphs import capture
from benchmarks.limits import limits
from benchmarks.peers import OURS, Peer, Penalty
from benchmarks.race import Candidate, Contender
from benchmarks.rows import CUDA_GRAPH, PASSES, Mode

#: A penalty, and gradients, if the mode has them.
Result = tuple[Tensor, Sequence[Tensor] | None]


@dataclass(frozen=True)
class Problem:
    """A parameter list with its strengths, and what its contenders share."""

    params: Sequence[Tensor]
    strengths: Strengths
    budget: CompileBudget = field(default_factory=CompileBudget)
    _compiled: dict[str, Compiled] = field(default_factory=dict)

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.params, self.strengths)

    @cached_property
    def _oracle_without_l1(self) -> Oracle:
        return Oracle(self.params, Strengths(l1=0.0, l2=self.strengths.l2))

    @property
    def is_on_cuda(self) -> bool:
        return self.params[0].device.type == "cuda"

    def oracle_of(self, peer: Peer) -> Oracle:
        return self.oracle if peer.has_l1 else self._oracle_without_l1

    def compiled(self, name: str, function: Callable[..., Any], options: Iterable[tuple[str, Any]] = ()) -> Compiled:
        """The function compiled, once for all modes under this name."""
        if name not in self._compiled:
            self._compiled[name] = Compiled(function, options, self.budget)
        return self._compiled[name]


@dataclass(frozen=True)
class _Work:
    """What an implementation computes in a mode."""

    problem: Problem
    mode: Mode
    peer: Peer
    once: Callable[[], object]  # what is timed
    run: Callable[[], Result]  # the same, with its result
    compile_s: float | None = None


def penalty_candidates(problem: Problem, mode: Mode, peers: Sequence[Peer]) -> list[Candidate]:
    """The peers that have the mode, on a GPU each also in a CUDA graph, and the mode's limits."""
    if mode == "value_and_grad":
        peers, work = [OURS], _value_and_grad
    else:
        peers, work = [peer for peer in peers if mode in peer.modes], _composed
    called = [Candidate(peer.name, peer.role, partial(_called, work, problem, mode, peer)) for peer in peers]
    bounds = [Candidate.of(limit) for limit in limits(problem.oracle, mode, flat=problem.is_on_cuda)]
    replayed = [
        Candidate(peer.name, peer.role, partial(_replayed, work, problem, mode, peer), CUDA_GRAPH) for peer in peers
    ]
    return [*called, *bounds, *(replayed if problem.is_on_cuda else ())]


def compute(penalty: Penalty, params: Sequence[Tensor], strengths: Strengths, mode: Mode) -> Tensor:
    """The value, or forward and backward into the `.grad` that there is, or is not."""
    if mode == "value":
        with torch.no_grad():
            return penalty(params, strengths.l1, strengths.l2)
    value = penalty(params, strengths.l1, strengths.l2)
    value.backward()
    return value


def clear(params: Sequence[Tensor]) -> None:
    """Free the gradients."""
    for p in params:
        p.grad = None


def _composed(problem: Problem, mode: Mode, peer: Peer) -> _Work:
    compiled = problem.compiled(peer.name, peer.penalty, peer.options) if peer.compiled else None
    penalty = compiled.function if compiled else peer.penalty
    once: Callable[[], Tensor] = partial(compute, penalty, problem.params, problem.strengths, mode)
    if not peer.has_backward:
        once = partial(penalty, problem.params, problem.strengths.l1, problem.strengths.l2)

    def run() -> Result:
        value = once().detach()
        return value, None if mode == "value" else [p.grad for p in problem.params if p.grad is not None]

    compile_s = compiled.compile(once, wants_grad=mode != "value") if compiled else None
    return _Work(problem, mode, peer, once, run, compile_s)


def _value_and_grad(problem: Problem, mode: Mode, peer: Peer) -> _Work:
    params, strengths = problem.params, problem.strengths

    def run() -> Result:
        return fused_reg.value_and_grad(params, strengths.l1, strengths.l2)

    return _Work(problem, mode, peer, run, run)


def _called(work_of: Callable[[Problem, Mode, Peer], _Work], problem: Problem, mode: Mode, peer: Peer) -> Contender:
    work = work_of(problem, mode, peer)

    def call() -> None:
        work.once()
        if mode == "fresh":  # the one who allocated them pays for freeing them
            clear(problem.params)

    return _contender(work, call, work.run)


def _replayed(work_of: Callable[[Problem, Mode, Peer], _Work], problem: Problem, mode: Mode, peer: Peer) -> Contender:
    work = work_of(problem, mode, peer)

    def run() -> Result:
        if mode == "fresh":  # of the call before; in the graph the gradients are written anew, to the same memory
            clear(problem.params)
        return work.run()

    set_gradients(problem.params, mode)
    captured = capture(run)
    if mode == "fresh":
        clear(problem.params)

    def replay() -> Result:
        captured.replay()
        return captured.result

    return _contender(work, captured.replay, replay, CUDA_GRAPH, captured.bytes)


def _contender(
    work: _Work,
    call: Callable[[], object],
    run: Callable[[], Result],
    family: str = "",
    capture_bytes: int | None = None,
) -> Contender:
    params, mode, peer = work.problem.params, work.mode, work.peer

    def verify() -> Errors:
        base = set_gradients(params, mode)
        value, grads = run()
        errors = work.problem.oracle_of(peer).check(peer.role, value, grads, base, in_one_pass=not peer.has_backward)
        if mode == "fresh":
            clear(params)
        return errors

    return Contender(
        name=peer.name,
        role=peer.role,
        bytes=PASSES[mode] * sum(p.nbytes for p in params),
        call=call,
        verify=verify,
        family=family,
        compile_s=work.compile_s,
        capture_bytes=capture_bytes,
    )


def set_gradients(params: Sequence[Tensor], mode: Mode) -> list[Tensor] | None:
    """What the mode finds in `.grad`: a copy of the gradients returned, in the same memory every time; or nothing."""
    if mode != "present":
        clear(params)
        return None
    base = [p.detach() * 0.5 for p in params]
    for p, gradient in zip(params, base, strict=True):
        if p.grad is None:
            p.grad = torch.empty_like(gradient)
        p.grad.copy_(gradient)
    return base
