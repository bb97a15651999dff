"""The contenders of the sums of norms, of whole tensors and of rows: ours, and the loop that people write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import fused_reg
from benchmarks.checks import Errors, Oracle, demand_elements, demand_value, largest_relative
from benchmarks.groups import FAMILIES, L2_NORM, blocks, groups_of, norms
from benchmarks.limits import addition_flat, sum_flat
from benchmarks.race import Candidate, Contender
from benchmarks.rows import PASSES, Mode, Role
from fused_reg._arguments import Group

_Penalty = Callable[[Sequence[Tensor]], Tensor]


def norm_candidates(oracle: Oracle, mode: Mode) -> list[Candidate]:
    """Ours and the loop's, for each kind of group, and the mode's limit; of `norm_value` or `norm_fresh`."""
    limit = sum_flat(oracle) if mode == "norm_value" else addition_flat(oracle)
    contenders = [limit]
    for group in groups_of(oracle.params):
        ours = partial(fused_reg.fused_penalty, l2_norm=L2_NORM, group=group)
        loop = _loop_of_tensors if group == "tensor" else _loop_of_rows
        contenders += [
            _contender(oracle.params, mode, group, "fused_reg", "ours", ours),
            _contender(oracle.params, mode, group, "loop", "peer", loop),
        ]
    return [Candidate.of(contender) for contender in contenders]


def _loop_of_tensors(params: Sequence[Tensor]) -> Tensor:
    return L2_NORM * sum(torch.norm(p) for p in params)


def _loop_of_rows(params: Sequence[Tensor]) -> Tensor:
    return L2_NORM * sum(torch.linalg.vector_norm(p.reshape(len(p), -1), dim=1).sum() for p in params)


def _contender(
    params: Sequence[Tensor], mode: Mode, group: Group, name: str, role: Role, penalty: _Penalty
) -> Contender:
    def value() -> Tensor:
        with torch.no_grad():
            return penalty(params)

    def fresh() -> None:  # the one who allocated the gradients pays for freeing them
        penalty(params).backward()
        for p in params:
            p.grad = None

    def verify() -> Errors:
        if mode == "norm_value":
            return _check(params, group, role, value())
        result = penalty(params)
        return _check(params, group, role, result, torch.autograd.grad(result, params))

    return Contender(
        name=name,
        role=role,
        bytes=PASSES[mode] * sum(p.nbytes for p in params),
        call=value if mode == "norm_value" else fresh,
        verify=verify,
        family=FAMILIES[group],
    )


def _check(
    params: Sequence[Tensor], group: Group, role: Role, value: Tensor, grads: Sequence[Tensor] | None = None
) -> Errors:
    """Against float64.

    Raises:
        WrongResultError: as `Oracle.check`.
    """
    lengths = [norms(group, p) for p in params]
    exact = L2_NORM * math.fsum(column.sum().item() for column in lengths)
    dtype = params[0].dtype
    value_error = abs(value.item() - exact) / exact
    demand_value(role, dtype, value_error)
    if grads is None:
        return Errors(value_error)

    def compared() -> Iterator[tuple[Tensor, Tensor]]:
        for p, grad, column in zip(params, grads, lengths, strict=True):
            for rows, (w, actual) in blocks(group, p, grad):
                yield actual, L2_NORM * w.double() / column[rows]

    gradient_error = largest_relative(compared())
    if role == "ours":
        demand_elements(role, dtype, gradient_error)
    else:  # off by as much as the norm that it divides by
        demand_value(role, dtype, gradient_error, "gradient error")
    return Errors(value_error, gradient_error)
