"""The contenders of each mode that computes a penalty, with the limits of the machine measured beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

import fused_reg
from benchmarks.checks import Errors, Oracle, Strengths
from benchmarks.peers import Compiled, Peer, Penalty
from benchmarks.race import Contender
from benchmarks.rows import PASSES, Mode, Role

# Of all elements in one tensor; tensor by tensor; into memory allocated for it, and into the same memory every time.
SUM_FLAT = "x.sum(), one tensor"
SUM_LIST = "x.sum(), list"
COPY_FRESH = "y.copy_(x), fresh y"
COPY_WARM = "y.copy_(x), warm y"
ADD = "g.add_(x, alpha=a)"

#: What bounds the modes without autograd; the first is what ratios are to.
LIMITS: dict[Mode, tuple[str, ...]] = {"value": (SUM_FLAT, SUM_LIST), "value_and_grad": (COPY_FRESH, COPY_WARM)}


@dataclass(frozen=True)
class Problem:
    """A parameter list with its strengths, and what its contenders share."""

    params: Sequence[Tensor]
    strengths: Strengths
    _compiled: dict[str, Compiled] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(p.nbytes for p in self.params)

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.params, self.strengths)

    def compiled(self, peer: Peer) -> Compiled:
        if peer.name not in self._compiled:
            self._compiled[peer.name] = Compiled(peer.penalty)
        return self._compiled[peer.name]


def penalty_contenders(problem: Problem, mode: Mode, peers: Sequence[Peer]) -> list[Contender]:
    """The peers that have the mode, and the mode's limits."""
    contenders = [_composed(problem, mode, peer) for peer in peers if mode in peer.modes]
    if mode == "value":
        return contenders + _sums(problem)
    if mode == "value_and_grad":
        return [_value_and_grad(problem), *_copies(problem)]
    if mode == "fresh":
        return contenders + _copies(problem)
    return [*contenders, _addition(problem)]


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


def _composed(problem: Problem, mode: Mode, peer: Peer) -> Contender:
    penalty = problem.compiled(peer).penalty if peer.compiled else peer.penalty
    once = partial(compute, penalty, problem.params, problem.strengths, mode)

    def call() -> None:
        once()
        if mode == "fresh":  # the one who allocated them pays for freeing them
            clear(problem.params)

    def verify() -> Errors:
        if mode == "value":
            return problem.oracle.check(peer.role, once())
        clear(problem.params)
        base = None
        if mode == "present":
            base = [p.detach() * 0.5 for p in problem.params]
            for p, gradient in zip(problem.params, base, strict=True):
                p.grad = gradient.clone()
        value = once()
        errors = problem.oracle.check(peer.role, value.detach(), _gradients(problem.params), base)
        if mode == "fresh":
            clear(problem.params)
        return errors

    compile_s = None
    if peer.compiled:
        compile_s = problem.compiled(peer).compile(once, wants_grad=mode != "value")
    return _contender(problem, peer.name, peer.role, mode, call, verify, compile_s=compile_s)


def _gradients(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _value_and_grad(problem: Problem) -> Contender:
    params, strengths = problem.params, problem.strengths

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        return fused_reg.value_and_grad(params, strengths.l1, strengths.l2)

    return _contender(
        problem, "fused_reg", "ours", "value_and_grad", call, lambda: problem.oracle.check("ours", *call())
    )


def _sums(problem: Problem) -> list[Contender]:
    tensors = [p.detach() for p in problem.params]
    flat = torch.cat([t.reshape(-1) for t in tensors])

    def sum_list() -> list[Tensor]:
        return [t.sum() for t in tensors]

    def verify_list() -> Errors:
        return problem.oracle.check_sum(torch.stack(sum_list()).double().sum())

    return [
        _limit(problem, SUM_FLAT, "value", flat.sum, lambda: problem.oracle.check_sum(flat.sum()), reference=True),
        _limit(problem, SUM_LIST, "value", sum_list, verify_list),
    ]


def _copies(problem: Problem) -> list[Contender]:
    tensors = [p.detach() for p in problem.params]
    warm = [torch.empty_like(t) for t in tensors]

    def copy_fresh() -> list[Tensor]:
        return [torch.empty_like(t).copy_(t) for t in tensors]

    def copy_warm() -> list[Tensor]:
        return [y.copy_(t) for y, t in zip(warm, tensors, strict=True)]

    check = problem.oracle.check_copy
    return [
        _limit(problem, COPY_FRESH, "fresh", copy_fresh, lambda: check(copy_fresh()), reference=True),
        _limit(problem, COPY_WARM, "fresh", copy_warm, lambda: check(copy_warm())),
    ]


def _addition(problem: Problem) -> Contender:
    tensors = [p.detach() for p in problem.params]
    sums = [torch.zeros_like(t) for t in tensors]
    alpha = 2 * problem.strengths.l2

    def add() -> None:
        for g, t in zip(sums, tensors, strict=True):
            g.add_(t, alpha=alpha)

    def verify() -> Errors:
        before = [g.clone() for g in sums]
        add()
        return problem.oracle.check_addition(sums, before, alpha)

    return _limit(problem, ADD, "present", add, verify, reference=True)


def _limit(
    problem: Problem,
    name: str,
    mode: Mode,
    call: Callable[[], object],
    verify: Callable[[], Errors],
    reference: bool = False,
) -> Contender:
    return _contender(problem, name, "limit", mode, call, verify, is_reference_limit=reference)


def _contender(
    problem: Problem,
    name: str,
    role: Role,
    mode: Mode,
    call: Callable[[], object],
    verify: Callable[[], Errors],
    *,
    is_reference_limit: bool = False,
    compile_s: float | None = None,
) -> Contender:
    return Contender(
        name=name,
        role=role,
        bytes=PASSES[mode] * problem.bytes,
        call=call,
        verify=verify,
        is_reference_limit=is_reference_limit,
        compile_s=compile_s,
    )
