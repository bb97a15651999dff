"""The fused calls over a part of a `Regularizer`'s table: one call for all of it, whatever the strengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_reg._arguments import Group
from fused_reg._strengths import Column, is_absent
from fused_reg._table import Entry, Table
from fused_reg.functional import fused_penalty
from fused_reg.in_place import accumulate_grad_, prox_


class _Call:
    """The arguments of one fused call."""

    def __init__(self, entries: Sequence[Entry], places: list[int], group: Group) -> None:
        own = [entries[i] for i in places]
        self.places = places
        self.params = [entry.param for entry in own]
        self.group: Group = group
        self.l1 = Column(entry.l1 for entry in own)
        self.l2 = Column(entry.l2 for entry in own)
        self.l2_norm = Column(entry.l2_norm for entry in own)

    def penalty(self) -> Tensor:
        return fused_penalty(self.params, self.l1.get(), self.l2.get(), l2_norm=self.l2_norm.get(), group=self.group)

    def accumulate_grad_(self, scale: float | Tensor) -> Tensor:
        return accumulate_grad_(
            self.params, self.l1.get(), self.l2.get(), l2_norm=self.l2_norm.get(), group=self.group, scale=scale
        )

    def prox_(self, step: float | Tensor | Sequence[float | Tensor]) -> None:
        if isinstance(step, Sequence):
            step = Column(step[i] for i in self.places).get()
        prox_(self.params, self.l1.get(), self.l2.get(), l2_norm=self.l2_norm.get(), group=self.group, step=step)


class Part:
    """Some entries of a table. What is constant between calls is prepared once; whether a parameter is frozen is seen
    at every call."""

    def __init__(self, table: Table, entries: Sequence[Entry]) -> None:
        self.entries = list(entries)
        self._table = table
        self._params = [entry.param for entry in entries]
        self._version = -1
        self._trained: list[bool] = []
        self._device = torch.device("meta")
        self._calls: list[_Call] = []

    def _current_calls(self) -> list[_Call]:
        trained = [p.requires_grad for p in self._params]
        if trained != self._trained or self._version != self._table.version or self._params[0].device != self._device:
            self._table.place_cells()
            self._calls = list(_calls(self.entries, trained))
            self._trained, self._version, self._device = trained, self._table.version, self._params[0].device
        return self._calls

    def penalty(self) -> Tensor:
        return self._total([call.penalty() for call in self._current_calls()])

    def accumulate_grad_(self, scale: float | Tensor) -> Tensor:
        return self._total([call.accumulate_grad_(scale) for call in self._current_calls()])

    def prox_(self, step: float | Tensor | Sequence[float | Tensor]) -> None:
        for call in self._current_calls():
            call.prox_(step)

    def _total(self, values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        if not values:
            return torch.zeros((), device=self._device)
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
