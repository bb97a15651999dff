"""The step that reaches an aim of groups: so many of those with the smallest norms become zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_reg import _devices, _ops
from fused_reg._terms import Strengths, group_code, group_count, in_groups
from fused_reg.regularizer.aims import Aim
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.smallest import SHORT, smallest


class GroupProjection:
    """That of some pools, each with its aim. What is the same from step to step is kept."""

    def __init__(self, pools: Sequence[tuple[Aim, Sequence[Entry]]]) -> None:
        self._given = pools
        self._params = [entry.param for _, pool in pools for entry in pool]
        self._seen: list[Any] = []  # where these were at the last step
        self._pools: list[_Pool | _Alone] = []

    def project_(self, found_inf: Tensor | None) -> None:
        seen = [(p.data_ptr(), p.shape, p.stride()) for p in self._params]
        if seen != self._seen:
            with torch.inference_mode(False):  # what is kept is written by steps outside of it too
                self._pools, self._seen = _pools(self._given), seen
        for pool in self._pools:
            pool.project_(found_inf)


def make_zero(w: Tensor, mask: Tensor, found_inf: Tensor | None = None) -> None:
    w.masked_fill_(mask if found_inf is None else mask & (found_inf.to(mask.device) == 0), 0)


class _Part:
    """A parameter, or a run of its rows, whose groups have norms."""

    def __init__(self, entry: Entry, tensor: Tensor) -> None:
        self.tensor, self.weight, self.code = tensor, entry.weight, group_code(entry.group)
        self.size = group_count(tensor, self.code)
        self.groups, self.dim = in_groups(tensor, self.code)
        self.has_rows = self.dim == 0 and _devices.is_at_hand(tensor)
        self._rows = _wide(self.groups) if self.has_rows else self.groups

    def make_rows_zero(self, places: Tensor) -> None:
        """On the host, where it takes half the time of a mask, with which all that stays is written too."""
        self._rows.index_fill_(0, places, 0)

    def make_zero(self, mask: Tensor, found_inf: Tensor | None) -> None:
        shape = [1] * self.groups.ndim
        if self.dim is not None:
            shape[self.dim] = -1
        make_zero(self.groups, mask.reshape(shape), found_inf)


def _wide(rows: Tensor) -> Tensor:
    """The same memory in elements of 16 bytes, where it has such: torch writes them one at a time."""
    size = 16 // rows.element_size()
    length = rows.numel() // max(len(rows), 1)
    is_aligned = rows.is_contiguous() and rows.data_ptr() % 16 == 0 == rows.storage_offset() % size
    return rows.view(-1, length).view(torch.complex128) if is_aligned and length > 0 == length % size else rows


def _pools(given: Sequence[tuple[Aim, Sequence[Entry]]]) -> list[_Pool | _Alone]:
    """Those of one part with few rows are taken together, where the operator can take them in one call."""
    pools: list[_Pool | _Alone] = []
    alone: dict[Any, list[tuple[Aim, _Part]]] = {}
    for aim, entries in given:
        parts = [_Part(entry, x) for entry in entries for x in entry.cut(entry.param.detach())]
        first = parts[0]
        if len(parts) == 1 and first.has_rows and 0 < first.size <= SHORT:
            alone.setdefault((first.code, first.tensor.device), []).append((aim, first))
        else:
            pools.append(_Pool(aim, parts))
    return pools + [_Alone(*zip(*own, strict=True)) for own in alone.values()]


class _Pool:
    """Parts that reach an aim together."""

    def __init__(self, aim: Aim, parts: Sequence[_Part]) -> None:
        self._aim, self._parts = aim, parts
        self._size = sum(part.size for part in parts)
        alike: dict[Any, list[int]] = {}
        for i, part in enumerate(parts):
            alike.setdefault((part.code, part.tensor.device), []).append(i)
        self._calls = [(Strengths(group=code), places) for (code, _), places in alike.items()]

    def project_(self, found_inf: Tensor | None) -> None:
        count = _count(self._aim, self._size)
        for part, mask in zip(self._parts, smallest(self._norms(), count), strict=True):
            if not part.has_rows:
                part.make_zero(mask, found_inf)
            elif found_inf is None or found_inf == 0:
                part.make_rows_zero(mask.nonzero().reshape(-1))

    def _norms(self) -> list[Tensor]:
        """The norm of each group, in the bits that every device gives; divided by its weight, if it has one."""
        norms: dict[int, Tensor] = {}
        for strengths, places in self._calls:
            parts = [self._parts[i] for i in places]
            found = _ops.norms([part.tensor for part in parts], *strengths)
            for i, part, own in zip(places, parts, found.split_with_sizes([p.size for p in parts]), strict=True):
                norms[i] = own if part.weight is None else own / part.weight
        return [norms[i] for i in range(len(self._parts))]


class _Alone:
    """Parts on the host with few rows, each with an aim of its own: one call has all norms, and one sort all orders."""

    def __init__(self, aims: Sequence[Aim], parts: Sequence[_Part]) -> None:
        self._aims, self._parts = aims, parts
        self._tensors, sizes = [part.tensor for part in parts], [part.size for part in parts]
        self._strengths = Strengths(group=parts[0].code)
        shape = len(parts), max(sizes)
        self._places = torch.cat([torch.arange(n) + i * shape[1] for i, n in enumerate(sizes)])
        found = _ops.norms(self._tensors, *self._strengths)
        self._weights: Tensor | None = None
        if any(part.weight is not None for part in parts):
            self._weights = found.new_tensor([part.weight or 1.0 for part in parts for _ in range(part.size)])
        self._norms = found.new_full(shape, torch.nan)  # behind the norms of a part, and last in its order
        self._order = torch.empty_like(self._norms), torch.empty(shape, dtype=torch.long)
        self._counts: list[int] = []
        self._smallest: list[Tensor] = []  # so many of each order

    def project_(self, found_inf: Tensor | None) -> None:
        if found_inf is not None and found_inf != 0:
            return
        norms = _ops.norms(self._tensors, *self._strengths)
        self._norms.view(-1).index_copy_(0, self._places, norms if self._weights is None else norms / self._weights)
        counts = [_count(aim, part.size) for aim, part in zip(self._aims, self._parts, strict=True)]
        if math.isnan(norms.sum().item()):  # one of them is NaN, which stays
            counts = list(map(min, counts, (self._norms == self._norms).sum(1).tolist()))
        if counts != self._counts:
            self._counts = counts
            self._smallest = [row[:count] for row, count in zip(self._order[1], counts, strict=True)]
        torch.sort(self._norms, dim=1, stable=True, out=self._order)
        for part, places in zip(self._parts, self._smallest, strict=True):
            part.make_rows_zero(places)


def _count(aim: Aim, size: int) -> int:
    """How many become zero, never all."""
    return min(round(aim.share * size), size - 1)
