"""The step that reaches an aim of groups: so many of those with the smallest norms become zero."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fused_reg import _devices, _ops
from fused_reg._terms import Strengths, group_code, group_count, in_groups
from fused_reg.regularizer.aims import Aim
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.smallest import smallest

# So few groups, or so many bytes of each, that filling each run of neighbors takes less time than filling by places.
_FEW, _LONG = 2**6, 2**11


class GroupProjection:
    """That of some pools, each with its aim. What is the same from step to step is kept."""

    def __init__(self, pools: Sequence[tuple[Aim, Sequence[Entry]]]) -> None:
        self._given = pools
        self._params = [entry.param for _, pool in pools for entry in pool]
        self._seen: list[Any] = []  # where these were at the last step
        self._batches: list[_Batch] = []

    def project_(self, found_inf: Tensor | None) -> None:
        seen = [(p.data_ptr(), p.shape, p.stride()) for p in self._params]
        if seen != self._seen:
            with torch.inference_mode(False):  # what is kept is written by steps outside of it too
                self._batches, self._seen = _batches(self._given), seen
        for batch in self._batches:
            batch.project_(found_inf)


def make_zero(w: Tensor, mask: Tensor, found_inf: Tensor | None = None) -> None:
    w.masked_fill_(mask if found_inf is None else mask & (found_inf.to(mask.device) == 0), 0)


class _Part:
    """A parameter, or a run of its rows, whose groups have norms."""

    def __init__(self, entry: Entry, tensor: Tensor) -> None:
        self.tensor, self.weight, self.code = tensor, entry.weight, group_code(entry.group)
        self.size = group_count(tensor, self.code)
        self.groups, self.dim = in_groups(tensor, self.code)
        self._rows = _wide(self.groups) if self.dim == 0 and _devices.is_at_hand(tensor) else None
        self._has_runs = self.size <= _FEW or tensor.numel() * tensor.element_size() >= _LONG * self.size

    def choose(self, mask: Tensor) -> None:
        """The groups that become zero."""
        shape = [1] * self.groups.ndim
        if self.dim is not None:
            shape[self.dim] = -1
        self._mask = mask.reshape(shape)
        self._places: Tensor | None = None  # of rows, when they first become zero,
        self._runs: list[Tensor] = []  # and when they do again, because they may for long

    def make_zero(self, found_inf: Tensor | None) -> None:
        """Rows on the host by their places: with a mask the others would be written too."""
        if self._rows is None:
            make_zero(self.groups, self._mask, found_inf)
        elif found_inf is not None and found_inf != 0:
            return
        elif self._runs:
            torch._foreach_zero_(self._runs)
        else:
            if self._places is None:
                self._places = self._mask.reshape(-1).nonzero().reshape(-1)
            elif self._has_runs and len(self._places) > 0:
                lengths = [len(list(equal)) for _, equal in groupby(self._mask.reshape(-1).tolist())]
                first = 0 if self._places[0] == 0 else 1
                self._runs = list(self.groups.split_with_sizes(lengths))[first::2]
                self._runs.reverse()  # the last ones are in the caches, because norms were read in order
            self._rows.index_fill_(0, self._places, 0)


def _wide(rows: Tensor) -> Tensor:
    """The same memory in elements of 16 bytes, where it has such: torch writes them one at a time."""
    size = 16 // rows.element_size()
    length = rows.numel() // max(len(rows), 1)
    is_aligned = rows.is_contiguous() and rows.data_ptr() % 16 == 0 == rows.storage_offset() % size
    return rows.view(-1, length).view(torch.complex128) if is_aligned and length > 0 == length % size else rows


def _batches(given: Sequence[tuple[Aim, Sequence[Entry]]]) -> list[_Batch]:
    """Pools whose norms the operator has in one call are taken together."""
    alike: dict[Any, list[tuple[Aim, list[_Part]]]] = {}
    for aim, entries in given:
        parts = [_Part(entry, x) for entry in entries for x in entry.cut(entry.param.detach())]
        calls = frozenset((part.code, part.tensor.device) for part in parts)
        alike.setdefault(calls if len(calls) == 1 else id(parts), []).append((aim, parts))
    return [_Batch(pools) for pools in alike.values()]


class _Batch:
    """Pools, in each of which parts reach an aim together. On the host a limit between the norms of the smallest and
    those of the others tells without a search whether they are the smallest still, as they mostly are."""

    def __init__(self, pools: Sequence[tuple[Aim, Sequence[_Part]]]) -> None:
        self._pools, self._parts = pools, [part for _, parts in pools for part in parts]
        self._sizes = [sum(part.size for part in parts) for _, parts in pools]
        self._is_at_hand = all(_devices.is_at_hand(part.tensor) for part in self._parts)
        alike: dict[Any, list[_Part]] = {}
        for part in self._parts:
            alike.setdefault((part.code, part.tensor.device), []).append(part)
        self._calls = [(own, [p.tensor for p in own], Strengths(group=code)) for (code, _), own in alike.items()]
        self._is_one_call = len(alike) == 1 and all(part.weight is None for part in self._parts)
        self._limits = torch.zeros(sum(self._sizes), dtype=torch.float64, device=self._parts[0].tensor.device)
        self._masks = torch.zeros_like(self._limits, dtype=torch.bool)
        self._counts: list[int | None] = [None] * len(pools)  # how many are below each limit; None: other ones

    def project_(self, found_inf: Tensor | None) -> None:
        self._choose()
        for part in reversed(self._parts):  # as the runs of each
            part.make_zero(found_inf)

    def _choose(self) -> None:
        norms, counts = self._norms(), list(map(_count, self._pools, self._sizes))
        if self._is_at_hand and counts == self._counts and torch.equal(norms <= self._limits, self._masks):
            return
        places = (x.split_with_sizes(self._sizes) for x in (norms, self._limits, self._masks))
        for i, (own, limit, mask) in enumerate(zip(*places, strict=True)):
            parts, count = self._pools[i][1], counts[i]
            if self._is_at_hand and count == self._counts[i] and torch.equal(own <= limit, mask):
                continue
            is_found = False
            if self._is_at_hand and count > 0:
                limit.copy_((own.kthvalue(count).values + own.kthvalue(count + 1).values) / 2)
                is_found = bool(torch.le(own, limit, out=mask).count_nonzero() == count)
            if not is_found:  # among them equal ones, or NaN
                mask.copy_(smallest([own], count)[0])
            self._counts[i] = count if is_found else None
            for part, its in zip(parts, mask.split_with_sizes([part.size for part in parts]), strict=True):
                part.choose(its.to(part.tensor.device))

    def _norms(self) -> Tensor:
        """The norm of each group, in the bits that every device gives; divided by its weight, if it has one."""
        norms: dict[int, Tensor] = {}
        for parts, tensors, strengths in self._calls:
            found: Tensor = _ops.norms(tensors, *strengths)
            if self._is_one_call:
                return found
            for part, own in zip(parts, found.split_with_sizes([part.size for part in parts]), strict=True):
                norms[id(part)] = own if part.weight is None else own / part.weight
        return torch.cat([norms[id(part)].to(norms[id(self._parts[0])].device) for part in self._parts])


def _count(pool: tuple[Aim, Sequence[_Part]], size: int) -> int:
    """How many become zero, never all."""
    return min(round(pool[0].share * size), size - 1)
