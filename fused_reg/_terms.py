"""The terms of the penalty, what norms are of, and the strengths of a list, from the argument to the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from fused_reg import _devices

#: The terms, in the order of the arguments. Each has a strength.
TERMS = ("l1", "l2", "l2_norm")

#: What the operators take of a list, in this order (``csrc/penalty.h``).
NUMBERS = (*TERMS, "step")

#: What ``l2_norm`` takes the norm of: a whole tensor, or each of its slices along dimension 0, or 1.
Group: TypeAlias = Literal["tensor", "row", "column"]

#: What the operators call them; 0 is no norms (``csrc/layout.h``).
GROUPS: dict[Group | None, int] = {None: 0, "tensor": 1, "row": 2, "column": 3}

#: The numbers of one kind for a list: floats (none: the term is absent; one; one per parameter), or a tensor of these.
Column: TypeAlias = "tuple[float, ...] | Tensor"

_ROWS = GROUPS["row"]
_IS_TENSOR = -1
_NONE = (0,) * len(NUMBERS)


def check_group(where: str, group: object, has_norms: bool, need: str) -> None:
    """Raises unless it is a group that means something; ``need``: what is said where there are no norms."""
    if not isinstance(group, str) or group not in GROUPS:
        raise ValueError(f'{where}group must be "tensor", "row" or "column", got {group!r}')
    if group != "tensor" and not has_norms:
        raise ValueError(f'{where}group="{group}" must {need}, got none')


class Strengths(NamedTuple):
    """The numbers of a list and its grouping, as the operators take them (``csrc/numbers.h``).

    It has no properties: of a NamedTuple, the compiler of torch 2.10 does not understand them.
    """

    floats: tuple[float, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    counts: tuple[int, ...] = _NONE
    group: int = 0

    @staticmethod
    def of(columns: Sequence[Column], group: int = 0) -> Strengths:
        """Of a column for each of `NUMBERS`, or for the first of them."""
        floats: tuple[float, ...] = ()
        tensors: tuple[Tensor, ...] = ()
        counts = list(_NONE)
        for i, column in enumerate(columns):
            if type(column) is not tuple:  # which takes less time than to look for a Tensor
                tensors += (cast(Tensor, column),)
                counts[i] = _IS_TENSOR
            elif column:
                floats += column
                counts[i] = len(column)
        return Strengths(floats, tensors, tuple(counts), group)

    def columns(self) -> list[Column]:
        floats, tensors = iter(self.floats), iter(self.tensors)
        return [
            next(tensors) if count == _IS_TENSOR else tuple([next(floats) for _ in range(count)])
            for count in self.counts
        ]

    def having(self, **columns: Column) -> Strengths:
        """The same with these columns."""
        pairs = zip(NUMBERS, self.columns(), strict=True)
        return Strengths.of([columns.get(name, column) for name, column in pairs], self.group)

    def with_step(self, step: Column) -> Strengths:
        """The same with the step of a proximal operator, the last of the columns."""
        if isinstance(step, Tensor):
            return Strengths(self.floats, (*self.tensors, step), (*self.counts[:-1], _IS_TENSOR), self.group)
        return Strengths(self.floats + step, self.tensors, (*self.counts[:-1], len(step)), self.group)

    def at(self, places: Sequence[int], device: torch.device) -> Strengths:
        """The strengths of the parameters at these places of the list, for a launch on this device."""
        return Strengths.of([_at(column, places, device) for column in self.columns()], self.group)

    def has_norms(self) -> bool:
        return self.group != 0

    def are_trained(self) -> bool:
        return len(self.tensors) > 0 and any(t.requires_grad for t in self.tensors)

    def named_tensors(self) -> dict[str, Tensor]:
        pairs = zip(NUMBERS, self.columns(), strict=True)
        return {name: column for name, column in pairs if isinstance(column, Tensor)}


def _at(column: Column, places: Sequence[int], device: torch.device) -> Column:
    if not isinstance(column, Tensor):
        return tuple(column[i] for i in places) if len(column) > 1 else column
    column = column if column.ndim == 0 else torch.stack([column[i] for i in places])
    return _devices.reachable(column, device)


def group_count(p: Tensor, group: int) -> int:
    """How many groups a parameter has; an empty one has none."""
    return slots(p, group) if p.numel() > 0 else 0


def slots(p: Tensor, group: int) -> int:
    """The same, also of an empty one."""
    dim = group - _ROWS
    return p.shape[dim] if 0 <= dim < p.ndim else 1


def sliced_dim(p: Tensor, group: int) -> int | None:
    """The dimension whose indices are groups; None where the tensor is one group."""
    dim = group - _ROWS
    return dim if 0 <= dim < p.ndim else None
