"""Norms of groups that are in several tensors of a list, as a neuron's row and its bias, and of groups with weights, by
which their strength is multiplied.

The operators take both as norms from outside: a gradient and a threshold depend on ``l2_norm / norm`` alone, so that a
norm divided by a weight is a strength multiplied by it. They have a slot for each group of each parameter, in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Joint:
    """Of a list: for each parameter the number of its set, whose groups are one, and the weights of its groups, or
    None. The first of a set has those of the set."""

    def __init__(self, sets: Sequence[int], weights: Sequence[Tensor | None]) -> None:
        self.sets = sets
        self._weights = weights
        self._known: dict[tuple[tuple[int, ...], tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, places: Sequence[int], counts: Sequence[int], device: torch.device) -> JointNorms:
        """Of the parameters at these places of the list, which have so many groups."""
        key = tuple(places), tuple(counts), device
        if key not in self._known:
            self._known[key] = _tables([self.sets[i] for i in places], counts, device)
        members, groups = self._known[key]
        weights = [self._weights[i] for i in places]
        if all(w is None for w in weights):
            return JointNorms(members, groups, None)
        ones = [torch.ones(n, dtype=torch.float64, device=device) for n in counts]
        in_slots = torch.cat([one if w is None else w.double() for w, one in zip(weights, ones, strict=False)])
        return JointNorms(members, groups, in_slots[members[0]])


def _tables(sets: Sequence[int], counts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The slots of each group, and the group of each slot; as `JointNorms` has them."""
    first = [*accumulate(counts, initial=0)]
    places: dict[int, list[int]] = {}
    for i, own in enumerate(sets):
        places.setdefault(own, []).append(i)
    most, begin = max(map(len, places.values())), 0
    with torch.inference_mode(False):  # they serve later calls, whatever the mode of the first
        members = torch.full((most, sum(counts[each[0]] for each in places.values())), sum(counts))
        groups = torch.empty(sum(counts), dtype=torch.int64)
        for together in places.values():
            end = begin + counts[together[0]]
            for k, i in enumerate(together):
                members[k, begin:end] = torch.arange(first[i], first[i + 1])
                groups[first[i] : first[i + 1]] = torch.arange(begin, end)
            begin = end
        return members.to(device), groups.to(device)


class JointNorms(NamedTuple):
    """How norms of slots are norms of groups, and these again norms of slots."""

    members: Tensor  # [most, groups]: the slots of each group; where it has fewer, the one behind the last
    groups: Tensor  # [slots]: the group of each
    weights: Tensor | None  # [groups] float64

    def of_groups(self, norms: Tensor) -> Tensor:
        """[groups]: the norm of each, without overflow."""
        unit = units_of(self.largest(norms))
        return self.sums((norms / unit[self.groups]).square()).sqrt() * unit

    def largest(self, norms: Tensor) -> Tensor:
        """[groups]: the largest of each."""
        return self._parts(norms).amax(0)

    def sums(self, x: Tensor) -> Tensor:
        """[groups]: the sum of what is in the slots of each."""
        return _sum(self._parts(x))

    def first(self, x: Tensor) -> Tensor:
        """[groups]: what is in the first slot of each."""
        return x[self.members[0]]

    def in_slots(self, norms: Tensor) -> Tensor:
        """[slots]: the norms of groups, divided by their weights, as the operators take them."""
        if self.weights is not None:
            norms = torch.where(self.weights == 0, torch.inf, norms / self.weights)
        return norms[self.groups]

    def weighted(self, x: Tensor) -> Tensor:
        return x if self.weights is None else x * self.weights

    def _parts(self, x: Tensor) -> Tensor:
        return pad(x, (0, 1))[self.members]


def units_of(largest: Tensor) -> Tensor:
    """Of the largest norms that are added, what these are taken as multiples of, so that they have squares: themselves;
    1 where they are 0, infinite or NaN. (Powers of two are by an operation that the compiler of torch 2.13 does not
    write for AVX-512.)"""
    return torch.where((largest > 0) & (largest < torch.inf), largest, 1)


def _sum(parts: Tensor) -> Tensor:
    """One after the other, which has the same bits on every device."""
    return reduce(add, parts.unbind())
