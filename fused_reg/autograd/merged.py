"""The penalty in compiled code as plain operations, which the compiler merges with the model's own.

An operator is a border that nothing is merged across: a gradient that it returns is read again, to be added to the
model's, and on a few small tensors the calls are what a step costs. The gradient has the bits of the kernels', and the
value is summed in float64 too, in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fused_reg import _devices, _ops
from fused_reg._terms import NUMBERS, Column, Strengths, group_of
from fused_reg.reference import penalty_of

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
        value = _summed(constants, l1, l2, are_positive, torch.float64).float()
    views = [p.view_as(p) for p in params]  # so that the gradients of both terms are one before the model's is added
    summed = _summed(views, l1, l2, are_positive, torch.float32)
    return _ValueFrom.apply(value, summed)  # type: ignore[no-any-return,no-untyped-call]


def specified_penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The penalty of any list as it is specified, for ``torch.func`` in compiled code, where no autograd function may
    stand, and wherever terms are relative and no kernel has what is wanted. Its gradient is computed in float64."""
    columns = (_one_each(column, len(params), torch.float64) for column in strengths.columns())
    references = (x or [None] * len(params) for x in strengths.references())
    total: Any = 0
    for p, toward, importance, *numbers in zip(params, *references, *columns, strict=True):
        given = {kind: 0.0 if x is None else x for kind, x in zip(NUMBERS, numbers, strict=True)}
        group = group_of(strengths.group)
        total = total + penalty_of(p, {**given, "group": group, "toward": toward, "importance": importance})
    return total if any(p.dtype is torch.float64 for p in params) else total.float()  # type: ignore[no-any-return]


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


def _summed(params: Sequence[Tensor], l1: Column, l2: Column, are_positive: bool, dtype: torch.dtype) -> Tensor:
    """``sum(l1 * |w|) + sum(l2 * w^2)`` in a dtype, first of the one term and then of the other, so that all of a term
    is one for the compiler."""
    total: Any = 0
    for column, of_elements in ((l1, torch.abs), (l2, torch.square)):
        for p, strength in zip(params, _one_each(column, len(params), dtype), strict=True):
            if strength is not None:
                w = p if are_positive or not isinstance(strength, Tensor) else torch.where(strength == 0, 0.0, p)
                total = total + strength * of_elements(w.to(dtype)).sum()
    return torch.as_tensor(total, dtype=dtype, device=params[0].device)


def _one_each(column: Column, count: int, dtype: torch.dtype) -> list[float | Tensor | None]:
    """One for each parameter; None of a number that is 0, which drops the term."""
    if not isinstance(column, Tensor):
        return [number or None for number in (column if len(column) > 1 else (column or (0.0,)) * count)]
    column = column.to(dtype)
    return [column] * count if column.ndim == 0 else [*column.unbind()]
