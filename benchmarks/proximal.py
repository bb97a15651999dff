"""The contenders of the proximal step, in place: ours, and the soft thresholds that people write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fused_reg
from benchmarks.checks import Errors, Oracle, Strengths, WrongResultError, demand_elements, largest_relative
from benchmarks.groups import FAMILIES, L2_NORM, blocks, groups_of, norms
from benchmarks.limits import limits
from benchmarks.race import Candidate, Contender
from benchmarks.rows import PASSES, Role
from fused_reg import reference
from fused_reg._arguments import Group

# One step moves the weights far enough to be checked; the one that is timed leaves them as they are, or they would
# be zeros before long.
_CHECKED_STEP, _TIMED_STEP = 100.0, 1e-9

# Of the elements that are exactly zero: those whose threshold is a rounding away may differ.
_ZEROS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Penalty:
    """What the step is of: the elastic net, with norms if there is a group."""

    strengths: Strengths
    group: Group | None

    @property
    def l2_norm(self) -> float:
        return L2_NORM if self.group else 0.0


_Prox = Callable[[Sequence[Tensor], _Penalty, float], None]


def prox_candidates(oracle: Oracle, flat: bool) -> list[Candidate]:
    """Ours and the peers, without norms and with those of each kind of group, and the limits; all of ours and the peers
    step the same copy of the parameters."""
    weights = [p.detach().clone() for p in oracle.params]
    contenders = limits(oracle, "prox", flat)
    for group in (None, *groups_of(weights)):
        penalty = _Penalty(oracle.strengths, group)
        contenders.append(_contender(oracle.params, weights, penalty, "fused_reg", "ours", _ours))
        contenders.append(_contender(oracle.params, weights, penalty, "loop", "peer", _loop))
        if group is None:
            contenders.append(_contender(oracle.params, weights, penalty, "loop, softshrink", "peer", _softshrink))
    return [Candidate.of(contender) for contender in contenders]


def _ours(weights: Sequence[Tensor], penalty: _Penalty, step: float) -> None:
    l1, l2 = penalty.strengths.l1, penalty.strengths.l2
    fused_reg.prox_(weights, l1, l2, l2_norm=penalty.l2_norm, group=penalty.group or "tensor", step=step)


def _loop(weights: Sequence[Tensor], penalty: _Penalty, step: float) -> None:
    for w in weights:
        w.copy_(w.sign() * (w.abs() - step * penalty.strengths.l1).clamp_(min=0))
        if penalty.group == "tensor":
            w.mul_((1 - step * penalty.l2_norm / torch.norm(w)).clamp_(min=0))
        elif penalty.group == "row":
            rows = w.view(len(w), -1)
            rows.mul_((1 - step * penalty.l2_norm / rows.norm(dim=1, keepdim=True)).clamp_(min=0))
        w.div_(1 + 2 * step * penalty.strengths.l2)


def _softshrink(weights: Sequence[Tensor], penalty: _Penalty, step: float) -> None:
    threshold, shrink = step * penalty.strengths.l1, 1 + 2 * step * penalty.strengths.l2
    for w in weights:
        w.copy_(torch.nn.functional.softshrink(w, threshold)).div_(shrink)


def _contender(
    source: Sequence[Tensor], weights: Sequence[Tensor], penalty: _Penalty, name: str, role: Role, prox: _Prox
) -> Contender:
    def restart() -> None:
        for w, p in zip(weights, source, strict=True):
            w.copy_(p.detach())

    def verify() -> Errors:
        restart()
        prox(weights, penalty, _CHECKED_STEP)
        try:
            return _check(source, weights, penalty, role)
        finally:
            restart()

    return Contender(
        name=name,
        role=role,
        bytes=(PASSES["prox"] + bool(penalty.group)) * sum(w.nbytes for w in weights),  # norms are known after a pass
        call=partial(prox, weights, penalty, _TIMED_STEP),
        verify=verify,
        family=FAMILIES[penalty.group] if penalty.group else "",
    )


def _check(source: Sequence[Tensor], weights: Sequence[Tensor], penalty: _Penalty, role: Role) -> Errors:
    """Against the reference in float64, and the block threshold of the norms.

    Raises:
        WrongResultError: the weights are others, or ours has not their zeros.
    """
    zeros = expected_zeros = 0

    def compared() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal zeros, expected_zeros
        for p, w in zip(source, weights, strict=True):
            for piece, expected in _expected(p, w, penalty):
                zeros += int((piece == 0).sum())
                expected_zeros += int((expected == 0).sum())
                yield piece, expected

    error = largest_relative(compared())
    demand_elements(role, weights[0].dtype, error, "weight error")
    elements = sum(w.numel() for w in weights)
    if role == "ours" and abs(zeros - expected_zeros) > _ZEROS_TOLERANCE * elements:
        raise WrongResultError(f"{zeros} of {elements} weights are zero instead of {expected_zeros}")
    return Errors(gradient=error)


def _expected(p: Tensor, w: Tensor, penalty: _Penalty) -> Iterator[tuple[Tensor, Tensor]]:
    """Each piece of the weights with what the step makes of the parameter's."""
    l1, l2 = penalty.strengths.l1, penalty.strengths.l2

    def stepped(piece: Tensor, l2: float) -> Tensor:
        copy = piece.to(torch.float64, copy=True)
        reference.prox_(copy, l1, l2, step=_CHECKED_STEP)
        return copy

    group: Group = penalty.group or "tensor"
    lengths = norms(group, p, lambda piece: stepped(piece, 0.0)) if penalty.group else torch.ones(1, 1, device=p.device)
    kept = (1 - _CHECKED_STEP * penalty.l2_norm / lengths).clamp(min=0)  # of each group
    for rows, (before, after) in blocks(group, p, w):
        yield after, stepped(before, l2) * kept[rows]
