"""The penalty in compiled code as plain operations, which the compiler merges with the model's own.

An operator is a border that nothing is merged across: a gradient that it returns is read again, to be added to the
model's, and on a few small tensors the calls are what a step costs. The operations are those of the specification
(`reference`); the gradient has the bits of the kernels', and the value is summed in float64 too, in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_reg import _devices, _ops, reference
from fused_reg._terms import GROUPS, KINDS, NUMBERS, Column, Strengths

#: Of longer lists the compiler takes minutes.
MOST_TENSORS = 512

# Of lists with more elements, unless they are a few tensors, the operator's gradients are faster: they are in memory
# that is kept from step to step, and the model's in memory that is used for one after the other.
_MOST_ELEMENTS = 1 << 26
_FEW_TENSORS = 16

# In larger ones a call is nothing, and the operator sums faster.
_MOST_SUMMED = 1 << 17


def can_merge(params: Sequence[Tensor], strengths: Strengths) -> bool:
    """Whether a list in compiled code is one for `merged_penalty`."""
    return (
        any(strengths.counts[:2])
        and not any(strengths.counts[2:])
        and 0.0 not in strengths.floats  # a parameter without a term would have no gradient
        and len(params) <= MOST_TENSORS
        and (len(params) <= _FEW_TENSORS or _count(params) <= _MOST_ELEMENTS)
        and all(_devices.row_of(p.device).has_bits_of_kernels for p in params)
        and all(p.dtype is torch.float32 and p.layout is torch.strided for p in params)
    )


def merged_penalty(params: Sequence[Tensor], strengths: Strengths, are_positive: bool) -> Tensor:
    """The differentiable penalty of a list that `can_merge`: the exact value, and the gradient of the loop in float32.

    ``are_positive``: no tensor of strengths has a 0."""
    l1, l2, *_ = strengths.columns()
    constants = [p.detach() for p in params]
    if _count(params) > _MOST_SUMMED:
        value, *_ = _ops.penalty(constants, (), *strengths)
    else:
        value = reference.fused_penalty(*_by_term(constants, l1, l2, are_positive))
    views = [p.view_as(p) for p in params]  # so that the gradients of both terms are one before the model's is added
    terms = _by_term(views, l1, l2, are_positive, torch.float32)
    return _ValueFrom.apply(value, reference.loop(*terms))  # type: ignore[no-any-return,no-untyped-call]


def specified_penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The penalty of any list as it is specified, for ``torch.func`` in compiled code, where no autograd function may
    stand. Its gradient is computed in float64."""
    group = next(name for name, number in GROUPS.items() if number == max(strengths.group, 1))
    columns = dict(zip(NUMBERS, strengths.columns(), strict=True))
    given: dict[str, Any] = {kind: _one_each(columns[kind], len(params), torch.float64) for kind in KINDS}
    return reference.fused_penalty(params, **given, group=group)  # type: ignore[arg-type]


class _ValueFrom(Function):
    """One number's value with another's gradient, which the compiler does not compute the value of."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, differentiable: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, upstream


def _count(params: Sequence[Tensor]) -> int:
    """The number of elements, without those of dynamic sizes: a comparison would fix these."""
    return sum(size for p in params if type(size := p.numel()) is int)


def _by_term(
    params: Sequence[Tensor],
    l1: Column,
    l2: Column,
    are_positive: bool,
    dtype: torch.dtype = torch.float64,
) -> tuple[list[Tensor], list[float | Tensor], list[float | Tensor]]:
    """The list once for each term, with the other's strengths 0."""
    columns = [_one_each(column, len(params), dtype) for column in (l1, l2)]
    none = [0.0] * len(params)
    lists = [params if are_positive else _where_present(params, column) for column in columns]
    return [*lists[0], *lists[1]], columns[0] + none, none + columns[1]


def _one_each(column: Column, count: int, dtype: torch.dtype) -> list[float | Tensor]:
    """One for each parameter."""
    if not isinstance(column, Tensor):
        return [*column] * count if len(column) == 1 else [*column] or [0.0] * count
    column = column.to(dtype)
    return [column] * count if column.ndim == 0 else [*column.unbind()]


def _where_present(params: Sequence[Tensor], strengths: Sequence[float | Tensor]) -> list[Tensor]:
    """The parameters, zero where a strength turns out to be 0: that drops the term, of infinite weights too."""
    pairs = zip(params, strengths, strict=True)
    return [torch.where(s == 0, 0.0, p) if isinstance(s, Tensor) else p for p, s in pairs]
