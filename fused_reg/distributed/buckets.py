"""Buckets: the parts of a list that are on one device and cut along the same dimensions of a mesh.

One all-gather brings the float64 sums of a bucket to every process, which adds them in the order of the ranks, so that
all have the same bits. What is replicated, or no DTensor, counts once.

A norm of ``l2_norm`` whose elements are cut comes from those of its pieces. They travel in the same all-gather, or in
one before it where a parameter is also cut between its groups (its rows along one dimension, each row along another).
Groups that are in several tensors, or have weights, follow on that (`joint`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_reg import _devices, _one_device, _ops
from fused_reg._arguments import is_dtensor, value_dtype
from fused_reg._references import of_places, with_one_more
from fused_reg._terms import GROUPS, Strengths, group_count, group_length, is_block, sliced_dim, slots
from fused_reg.autograd import functions
from fused_reg.autograd.composed import group_norms, table_of
from fused_reg.distributed.collectives import gathered, hypot, processes, shared, total
from fused_reg.distributed.joint import Joint, JointNorms, units_of
from fused_reg.distributed.shards import shards_of

#: A sum as a penalty, whose order is the same on every device.
_SUM = Strengths.of([(1.0,)])


def buckets(
    params: Sequence[Tensor], shards: Sequence[Tensor], strengths: Strengths, joint: Joint | None = None
) -> Iterator[Bucket]:
    """The buckets of a list, in an order that is the same in every process."""
    places: dict[Any, list[int]] = {}
    for i, (p, shard) in enumerate(zip(params, shards, strict=True)):
        places.setdefault((shard.device, *_cut_of(i, p, strengths)), []).append(i)
    if joint is not None:
        check_sets("", params, joint)
    for (device, sharing_groups, sharing_rest), own in places.items():
        exact = torch.empty(0, dtype=torch.float64, device=device)
        given = strengths.at([*own, own[0]], device)
        if strengths.is_relative():
            references = [shards_of(of_places(xs, own)) for xs in strengths.references()]
            given = given.relative(*(with_one_more(xs, exact) for xs in references))
        bucket = Bucket(own, [*(shards[i] for i in own), exact], given, sharing_groups, sharing_rest)
        if joint is not None:
            bucket = bucket._replace(joint=joint.at(own, bucket._slots(), device))
        yield bucket


def value_of(values: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The penalty of a list from the float64 penalties of its parts: on its first device, rounded once."""
    value = torch.stack([value.to(params[0].device) for value in values]).sum()
    return value.to(value_dtype(params))


def _cut_of(i: int, p: Any, strengths: Strengths) -> tuple[Any, Any]:
    """The processes over which groups of ``l2_norm`` of a parameter are cut, and those over which the rest is."""
    if not is_dtensor(p):
        return None, None
    mesh = p.device_mesh
    if mesh.get_coordinate() is None:
        raise ValueError(f"params[{i}] must be on a mesh with this process, got {mesh}")
    groups: list[int] = []
    rest: list[int] = []
    for d, placement in enumerate(p.placements):
        if placement.is_partial():
            raise ValueError(
                f"params[{i}] must be sharded or replicated, got {placement!r}; use `.redistribute(placements=...)`"
            )
        if not placement.is_replicate() and mesh.size(d) > 1:
            kept = 0 if is_block(strengths.group) else sliced_dim(p, strengths.group)
            cuts_groups = strengths.has_norms() and placement.dim != kept
            (groups if cuts_groups else rest).append(d)
    parts = 1
    for d in rest:
        parts *= mesh.size(d)
    _check_cuts(i, p, strengths.group, len(groups), parts)
    return processes(mesh, tuple(groups)), processes(mesh, tuple(rest))


def _check_cuts(i: int, p: Any, group: int, cuts: int, parts: int) -> None:
    """Raises where a run of slices, or a block, is cut; ``cuts``: how often the slices themselves are, which a block
    must not be."""
    dim, n = sliced_dim(p, group), group_length(group)
    if is_block(group):
        is_cut = cuts > 0 or p.shape[:1].numel() % parts != 0 or p.numel() % (n * parts) != 0
    else:
        is_cut = n > 1 and dim is not None and p.shape[dim] % (n * parts) != 0
    if is_cut:
        raise ValueError(f"params[{i}] must be sharded between groups of {n}, got {p.placements} of {tuple(p.shape)}")


def check_sets(where: str, params: Sequence[Any], joint: Joint) -> None:
    """Raises where parameters whose groups are one are not on one device, or not cut alike."""
    first: dict[int, int] = {}
    for i, (p, own) in enumerate(zip(params, joint.sets, strict=True)):
        j = first.setdefault(own, i)
        for what, got, wanted in (
            ("be on the device of", p.device, params[j].device),
            ("be cut as", _layout_of(p), _layout_of(params[j])),
        ):
            if got != wanted:
                raise ValueError(f"{where}params[{i}] must {what} params[{j}], because their groups are one, got {got}")


def _layout_of(p: Any) -> Any:
    """How a parameter is cut; None where every process has all of it."""
    if not is_dtensor(p) or all(placement.is_replicate() for placement in p.placements):
        return None
    return p.device_mesh, p.placements


def sharing(p: Any) -> Any:
    """The processes that have a part of a DTensor each; None if there are none."""
    return _cut_of(0, p, Strengths())[1]


class Bucket(NamedTuple):
    """The shards of a bucket; an empty float64 tensor ends them, so that sums are float64."""

    places: list[int]  # in the list
    shards: list[Tensor]
    strengths: Strengths
    sharing_groups: Any  # the processes over which groups of l2_norm are cut, if any
    sharing_rest: Any  # the processes over which the rest is
    joint: JointNorms | None = None

    def _has_own_norms(self) -> bool:
        """Whether the norms of its groups are those that the operators find."""
        return self.sharing_groups is None and self.joint is None

    def penalty(self, of_list: Callable[..., Tensor]) -> Tensor:
        """Of the whole bucket, on every process; ``of_list``: as `functions.penalty`."""
        if self._has_own_norms():
            value = of_list(self.shards, self._shared_strengths())
        elif self.strengths.are_trained() or (self.joint is not None and functions.transforms_active()):
            value = self._composed_penalty(self.shards, self._shared_strengths())
        else:
            # Of norms that are cut over processes there is no second derivative.
            general = self._composed_penalty if self.sharing_groups is None else None
            value = functions.penalty(self.shards, self.strengths, self._measure, general)
        return total(value, self.sharing_rest)

    def value_and_grad(self) -> tuple[Tensor, Sequence[Tensor]]:
        grads: Sequence[Tensor]
        if self._has_own_norms():
            value, grads = _one_device.value_and_grad(self.shards, self.strengths)
        else:
            value, grads = self._directed(1.0, [True] * len(self.shards))
        return total(value, self.sharing_rest), grads

    def accumulate_grad_(self, factor: tuple[float, Tensor | None], skip_missing: bool) -> Tensor:
        scale, tensor = factor
        if tensor is not None:
            tensor = _devices.reachable(tensor, self.shards[0].device)
        if self._has_own_norms():
            value = _one_device.accumulate_grad_(self.shards, self.strengths, (scale, tensor), skip_missing)
        else:
            needs_grad = [p.requires_grad and not (skip_missing and p.grad is None) for p in self.shards]
            value, grads = self._directed(scale if tensor is None else tensor, needs_grad)
            for p, grad in zip(compress(self.shards, needs_grad), grads, strict=True):
                if p.grad is None:
                    _one_device.set_grad(p, grad)
                else:
                    p.grad.add_(grad)
        return total(value, self.sharing_rest)

    def _directed(self, upstream: float | Tensor, needs_grad: list[bool]) -> tuple[Tensor, Sequence[Tensor]]:
        """The penalty of all that share groups, and gradients, by norms that are not those of the pieces."""
        value, norms, first_groups = self._measure(self.shards, self.strengths)
        trained = list(compress(self.shards, needs_grad))
        if not trained:
            return value, []
        first_groups = list(compress(first_groups, needs_grad))
        if not isinstance(upstream, Tensor):
            upstream = torch.full_like(value, upstream)
        return value, _ops.penalty_grad(upstream, trained, needs_grad, norms, first_groups, *self.strengths)

    def prox_(self) -> None:
        if self._has_own_norms():
            _one_device.prox_(self.shards, self.strengths)
        else:
            norms = self._in_slots(_ops.norms(self.shards, *self.strengths))
            if self.sharing_groups is not None:
                norms = hypot(gathered(norms, self.sharing_groups))
            if self.joint is not None:
                norms = self.joint.in_slots(self.joint.of_groups(norms))
            _ops.prox_(self.shards, norms, self._first_slots(), *self.strengths)

    def _measure(self, shards: Sequence[Tensor], strengths: Strengths) -> tuple[Tensor, Tensor, Sequence[int]]:
        """The penalty of all that share groups, the norm of every group, and where those of each parameter begin."""
        value, _, (own,) = _ops.penalty(shards, (), *strengths.having(l2_norm=()))
        norms, weights = self._in_slots(own), self._weights_of_groups(strengths)
        if self.sharing_groups is not None:
            parts = gathered(torch.cat((value[None], norms)), self.sharing_groups)
            value, norms = parts[:, 0].sum(), hypot(parts[:, 1:])
        if self.joint is None:
            return value + torch.where(weights == 0, 0, weights * norms).sum(), norms, self._first_slots()
        norms = self.joint.of_groups(norms)
        penalties = torch.where(weights == 0, 0, weights * norms)
        return value + _ops.penalty([penalties], (), *_SUM)[0], self.joint.in_slots(norms), self._first_slots()

    def _shared_strengths(self) -> Strengths:
        """What trains strengths is the sum of what each process finds."""
        return _shared(self.strengths, self.sharing_rest) if self.strengths.are_trained() else self.strengths

    def _composed_penalty(self, shards: Sequence[Tensor], strengths: Strengths) -> Tensor:
        """The penalty of all that share groups, for strengths that require grad, and to any order."""
        if strengths.is_relative():
            raise NotImplementedError(
                "toward must come with constant strengths where groups of l2_norm are cut over processes"
            )
        pieces = _shared(strengths, self.sharing_groups).having(l2_norm=())._replace(group=0)
        own = self._in_slots(group_norms(shards, self.strengths.group))
        largest = own.detach()
        if self.sharing_groups is not None:
            largest = gathered(largest, self.sharing_groups).amax(0)
        units = units_of(largest if self.joint is None else self.joint.largest(largest))
        squares = (own / (units if self.joint is None else units[self.joint.groups])).square()
        sums = total(torch.cat((functions.general_penalty(shards, pieces)[None], squares)), self.sharing_groups)
        value, squares = sums[0], sums[1:]
        if self.joint is not None:
            squares = self.joint.sums(squares)
        is_zero = squares == 0
        norms = torch.where(is_zero, 0, torch.where(is_zero, 1, squares).sqrt()) * units
        return value + (self._weights_of_groups(strengths) * norms).sum()

    def over_rest(self, x: Tensor) -> Tensor:
        """The sum over the processes that share no groups."""
        return total(x, self.sharing_rest)

    def over_all(self, x: Tensor) -> Tensor:
        """The sum over all that share the bucket."""
        return total(total(x, self.sharing_groups), self.sharing_rest)

    def norms_of_tensors(self) -> Tensor:
        """Of each parameter, on every process."""
        tensors = GROUPS["tensor"]
        own = _ops.norms(self.shards, *Strengths(group=tensors))
        norms = _in_slots(own, self.shards, [*[1] * len(self.places), 0], tensors)
        for group in (self.sharing_groups, self.sharing_rest):
            norms = norms if group is None else hypot(gathered(norms, group))
        return norms

    def sums_of_slices(self) -> Tensor:
        """[2, parameters]: the sum of the norms of its slices, and how many of these are 0; of groups that are in
        several parameters at the first."""
        norms = self._in_slots(_ops.norms(self.shards, *Strengths(group=self.strengths.group)))
        if self.sharing_groups is not None:
            norms = hypot(gathered(norms, self.sharing_groups))
        sums = norms.new_zeros(2, len(self.places))
        slots = torch.tensor(self._slots(), device=norms.device)
        owner = torch.repeat_interleave(slots, output_size=len(norms))
        weighted = norms
        if self.joint is not None:
            norms, owner = self.joint.of_groups(norms), self.joint.first(owner)
            weighted = self.joint.weighted(norms)
        return sums.index_add_(1, owner, torch.stack([weighted, (norms == 0).double()]))

    # Every process that shares groups has a slot for each, also where its own piece is empty.

    def _slots(self) -> list[int]:
        """How many groups each parameter has."""
        group = self.strengths.group
        if self.sharing_groups is None:
            return [group_count(p, group) for p in self.shards]
        return [*(slots(p, group) for p in self.shards[:-1]), 0]

    def _first_slots(self) -> list[int]:
        return [0, *accumulate(self._slots())][:-1]

    def _in_slots(self, norms: Tensor) -> Tensor:
        return _in_slots(norms, self.shards, self._slots(), self.strengths.group)

    def _weights_of_groups(self, strengths: Strengths) -> Tensor:
        """The strength of the norm of each group."""
        weights = table_of(strengths, len(self.shards), self.shards[0].device)[:, -1]
        in_slots = torch.cat([w.expand(n) for w, n in zip(weights.unbind(), self._slots(), strict=True)])
        return in_slots if self.joint is None else self.joint.weighted(self.joint.first(in_slots))


def _in_slots(norms: Tensor, shards: list[Tensor], sizes: list[int], group: int) -> Tensor:
    """The norms that the operators give of shards, with zeros for the groups of empty ones."""
    pieces = torch.functional.split(norms, [group_count(p, group) for p in shards])
    return torch.cat([x if len(x) == n else x.new_zeros(n) for x, n in zip(pieces, sizes, strict=True)])


def _shared(strengths: Strengths, processes_of_it: Any) -> Strengths:
    return strengths._replace(tensors=tuple(shared(t, processes_of_it) for t in strengths.tensors))
