"""The fused calls over a part of a `Regularizer`'s table: one call for all of it, whatever the strengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_reg._arguments import Group, Strengths, as_scale, as_step, as_strengths, relabelled
from fused_reg._partitioned import check_whole
from fused_reg._strengths import Column, is_absent
from fused_reg._table import Entry, Table
from fused_reg.functional import fused_penalty
from fused_reg.in_place import accumulate, check_accumulation, check_writable, shrink

_T = TypeVar("_T")


class _Call:
    """The arguments of one fused call."""

    def __init__(self, entries: Sequence[Entry], places: list[int], group: Group) -> None:
        own = [entries[i] for i in places]
        self._places = places
        self._params = [entry.param for entry in own]
        self._names = [entry.name for entry in own]
        self._group: Group = group
        self._columns = [Column(strengths) for strengths in zip(*(entry.strengths for entry in own), strict=True)]
        is_fixed = all(column.is_fixed for column in self._columns) and not is_compiling()
        self._fixed = self._as_strengths() if is_fixed else None
        self._steps: Column | None = None  # the last ones of `prox_`

    def _as_strengths(self) -> Strengths:
        l1, l2, l2_norm = (column.get() for column in self._columns)
        return as_strengths("Regularizer", l1, l2, l2_norm, self._group, self._params)

    def _strengths(self) -> Strengths:
        return self._fixed or self._as_strengths()

    def penalty(self) -> Tensor:
        l1, l2, l2_norm = (column.get() for column in self._columns)
        return self._run(lambda: fused_penalty(self._params, l1, l2, l2_norm=l2_norm, group=self._group))

    def accumulate_grad_(self, scale: float | Tensor) -> Tensor:
        name = "accumulate_grad_"
        return self._run(accumulate, name, self._params, self._strengths(), as_scale(name, scale, self._params))

    def check_accumulation(self, scale: float | Tensor) -> None:
        """Raises what `accumulate_grad_` would, before anything is written."""
        name = "accumulate_grad_"
        self._run(check_accumulation, name, self._params, self._strengths(), as_scale(name, scale, self._params))

    def prox_(self, step: float | Tensor | list[float | Tensor]) -> None:
        self._run(shrink, *self._shrinkage(step))

    def check_writable(self, step: float | Tensor | list[float | Tensor]) -> None:
        """Raises what `prox_` would, before anything is written."""
        self._run(check_writable, *self._shrinkage(step))

    def _shrinkage(self, step: float | Tensor | list[float | Tensor]) -> tuple[Any, ...]:
        if isinstance(step, list):
            self._steps = Column((step[i] for i in self._places), like=self._steps)
            step = self._steps.get()
        return "prox_", self._params, self._strengths(), as_step("prox_", step, self._params)

    def _run(self, function: Callable[..., _T], *args: Any) -> _T:
        """``function(*args)``, whose errors have ``params['fc.weight']`` for ``params[3]`` of this call's list."""
        try:
            return function(*args)
        except (TypeError, ValueError) as error:
            raise named(error, self._names) from error


def named(error: Exception, names: Sequence[str]) -> Exception:
    """The error with ``params['fc.weight']`` for ``params[3]``, where these are the names of a call's parameters."""
    return relabelled(error, list(map(repr, names)))


class Part:
    """Some entries of a table. What is constant between calls is prepared once; whether a parameter is frozen is seen
    at every call."""

    def __init__(self, table: Table, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self._table = table
        self._params = [entry.param for entry in entries]
        self._names = [entry.name for entry in entries]
        self._version = -1
        self._trained: list[bool] = []
        self._device = torch.device("meta")
        self._calls: list[_Call] = []
        self._current_calls()  # now, not inside a graph that is being compiled

    def _current_calls(self) -> list[_Call]:
        check_whole("Regularizer", self._params, self._names)
        trained = [p.requires_grad for p in self._params]
        if trained != self._trained or self._version != self._table.version or self._params[0].device != self._device:
            self._table.place_cells()
            self._calls = list(_calls(self.entries, trained))
            self._trained, self._version, self._device = trained, self._table.version, self._params[0].device
        return self._calls

    def penalty(self) -> Tensor:
        return self._total([call.penalty() for call in self._current_calls()])

    def accumulate_grad_(self, scale: float | Tensor) -> Tensor:
        calls = self._current_calls()
        if len(calls) == 1:
            return calls[0].accumulate_grad_(scale)
        self.check_accumulation(scale)
        return self._total([call.accumulate_grad_(scale) for call in calls])

    def prox_(self, step: float | Tensor | list[float | Tensor]) -> None:
        """``step``: one, or a list with one for each entry."""
        calls = self._current_calls()
        if len(calls) > 1:
            for call in calls:
                call.check_writable(step)
        for call in calls:
            call.prox_(step)

    def check_accumulation(self, scale: float | Tensor) -> None:
        """Of several calls the first must not write if a later one will fail."""
        for call in self._current_calls():
            call.check_accumulation(scale)

    def _total(self, values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        if not values:
            return torch.zeros((), dtype=torch.float32, device=self._device)
        return torch.stack([value.to(values[0].device) for value in values]).sum()


def _calls(entries: Sequence[Entry], trained: Sequence[bool]) -> list[_Call]:
    """One call; two where there are norms of tensors as well as norms of rows. A parameter without any strength is not
    even read."""
    places = [i for i, entry in enumerate(entries) if trained[i] and not all(map(is_absent, entry.strengths))]
    kinds = list(dict.fromkeys(entries[i].group for i in places if not is_absent(entries[i].l2_norm))) or ["tensor"]
    calls = []
    for kind in kinds:
        own = [i for i in places if (kinds[0] if is_absent(entries[i].l2_norm) else entries[i].group) == kind]
        if own:
            calls.append(_Call(entries, own, kind))
    return calls
