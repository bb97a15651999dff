"""Parameters that are cut into shards (DTensor: ``fully_shard``, tensor parallel): shards in, one number out.

Each process works on what it holds. The parameters that are cut along the same dimensions of a mesh are a bucket: one
all-gather brings its float64 sums to every process, which adds them in the order of the ranks, so that all have the
same bits. What is replicated, or no DTensor, counts once. The gradient needs no communication: it is that of the shard,
laid out as its parameter.

A norm of ``l2_norm`` whose elements are cut comes from those of its pieces. They travel in the same all-gather, or in
one before it where a parameter is also cut between its groups (its rows along one dimension, each row along another).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, compress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import increment_version

from fused_reg import _devices, _ops
from fused_reg._arguments import PLAIN_TYPES, is_dtensor, relabelled
from fused_reg._terms import GROUPS, Strengths, group_count, sliced_dim, slots
from fused_reg.autograd import functions
from fused_reg.autograd.composed import composed_penalty, group_norms, table_of
from fused_reg.distributed import by_device
from fused_reg.distributed.collectives import gathered, hypot, processes, scale_of, shared, total

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_Scale: TypeAlias = "tuple[float, Tensor | None]"


def is_sharded(params: Sequence[Any]) -> bool:
    """Whether there is a DTensor among them. Cheap where there is none."""
    return not PLAIN_TYPES.issuperset(map(type, params)) and any(map(is_dtensor, params))


# The functions, for a list that is_sharded.


def penalty(params: list[Tensor], strengths: Strengths) -> Tensor:
    """The differentiable penalty."""
    shards = shards_of(params)
    places = [i for i, p in enumerate(params) if is_dtensor(p) and p.requires_grad]
    trained = _apply(_Shards, *(params[i] for i in places)) if places else ()
    for i, shard in zip(places, trained, strict=True):
        shards[i] = shard
    value = by_device.total([bucket.penalty() for bucket in buckets(params, shards, strengths)], params)
    return _apply(_Plain, value)  # type: ignore[no-any-return]


@torch.no_grad()
def value_and_grad(params: list[Tensor], strengths: Strengths) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and its gradients."""
    values = []
    grads = list(params)
    for bucket in buckets(params, shards_of(params), strengths):
        value, own = bucket.value_and_grad()
        values.append(value)
        for place, grad in zip(bucket.places, own, strict=False):  # without that of the empty tensor
            grads[place] = _laid_out_as(params[place], grad)
    return by_device.total(values, params), tuple(grads)


@torch.no_grad()
def accumulate_grad_(
    on_shards: Callable[[list[Tensor], Strengths, _Scale], Tensor],
    params: list[Tensor],
    shards: list[Tensor],
    strengths: Strengths,
    factor: _Scale,
) -> Tensor:
    """Adds the gradients to ``.grad``, with a function that does so for a bucket's shards, which are `with_grads`."""
    own = buckets(params, shards, strengths)
    value = by_device.total([bucket.accumulate_grad_(on_shards, factor) for bucket in own], params)
    for p, shard in zip(params, shards, strict=True):
        if shard is not p and p.grad is None and shard.grad is not None:
            p.grad = _laid_out_as(p, shard.grad)
    increment_version([p.grad for p in params if p.grad is not None and is_dtensor(p.grad)])
    return value


@torch.no_grad()
def prox_(on_shards: Callable[[list[Tensor], Strengths], None], params: list[Tensor], strengths: Strengths) -> None:
    """The proximal step, with a function that takes it for the shards of a bucket."""
    for bucket in buckets(params, shards_of(params), strengths):
        bucket.prox_(on_shards)
    increment_version([p for p in params if is_dtensor(p)])


def cuts(p: Any) -> int:
    """In how many dimensions of a mesh it is cut: 0 unless it is a DTensor."""
    return p.device_mesh.ndim if is_dtensor(p) else 0


# Shards.


def shards_of(params: list[Tensor]) -> list[Tensor]:
    """What this process holds of each: of a DTensor its shard, outside of autograd."""
    with torch.no_grad():
        return [p.to_local() if is_dtensor(p) else p for p in params]  # type: ignore[attr-defined]


def check_distinct(params: list[Tensor]) -> None:
    """Raises where a DTensor is there twice. The operators would find it only where its shard is not empty, and the
    other processes would wait for the rest."""
    seen: dict[int, int] = {}
    for i, p in enumerate(params):
        if is_dtensor(p) and seen.setdefault(id(p), i) != i:
            raise ValueError(f"params[{i}] must not share memory with params[{seen[id(p)]}]")


@torch.no_grad()
def with_grads(params: list[Tensor], skip_missing: bool) -> list[Tensor]:
    """The same, with the shards of ``.grad`` in theirs; ``skip_missing``: without one a shard is frozen."""
    check_distinct(params)
    return [_with_grad(i, p, skip_missing) if is_dtensor(p) else p for i, p in enumerate(params)]


def _with_grad(i: int, p: Any, skip_missing: bool) -> Tensor:
    shard: Tensor = p.to_local().detach()
    if p.requires_grad and not p.is_leaf:
        raise ValueError(f"params[{i}] must be a leaf, as a parameter is, got the result of {p.grad_fn}")
    if p.requires_grad and p.grad is not None:
        if not is_dtensor(p.grad):
            raise ValueError(f"params[{i}].grad must be a DTensor as its parameter is, got {type(p.grad).__name__}")
        if p.grad.placements != p.placements:  # tensor parallel layers leave sums that are pending
            p.grad = p.grad.redistribute(p.device_mesh, p.placements)
        shard.requires_grad_()
        shard.grad_dtype = None  # any
        shard.grad = p.grad.to_local()
    return shard.requires_grad_(p.requires_grad and not (skip_missing and p.grad is None))


class _Layout(NamedTuple):
    """How a DTensor is cut, and what of."""

    mesh: DeviceMesh
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, shard: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        # Torch would derive the shape from even shards.
        layout: dict[str, Any] = {"shape": self.shape, "stride": self.stride, "run_check": False}
        return DTensor.from_local(shard, self.mesh, self.placements, **layout)


def _layout_of(p: Any) -> _Layout:
    return _Layout(p.device_mesh, p.placements, p.shape, p.stride())


def _laid_out_as(p: Tensor, shard: Tensor) -> Tensor:
    """The DTensor that is cut as a parameter and has this shard; for no DTensor the shard."""
    return _layout_of(p).of(shard) if is_dtensor(p) else shard


class _Shards(Function):
    """The shards of DTensors."""

    @staticmethod
    def forward(ctx: Any, *params: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*params)
        ctx.layouts = list(map(_layout_of, params))
        ctx.set_materialize_grads(False)
        return tuple(shard.detach() for shard in shards_of(list(params)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors  # raises if one was changed in place: torch does not count that in its shard
        return tuple(None if g is None else layout.of(g) for layout, g in zip(ctx.layouts, grads, strict=True))


class _Plain(Function):
    """The value, also in a loss that is a DTensor, whose gradient is one."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Tensor:
        return upstream.full_tensor() if is_dtensor(upstream) else upstream  # type: ignore[no-any-return]


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


# Buckets.


def buckets(params: list[Tensor], shards: list[Tensor], strengths: Strengths) -> Iterator[Bucket]:
    """The buckets of a list, in an order that is the same in every process."""
    keys = [(shard.device, *_cut_of(i, p, strengths)) for i, (p, shard) in enumerate(zip(params, shards, strict=True))]
    for (_, groups, rest), part in by_device.parts(shards, strengths, keys):
        yield Bucket(*part, groups, rest)


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
            cuts_groups = strengths.has_norms() and placement.dim != sliced_dim(p, strengths.group)
            (groups if cuts_groups else rest).append(d)
    return processes(mesh, tuple(groups)), processes(mesh, tuple(rest))


class Bucket(NamedTuple):
    """The shards of one device that are cut in the same way; an empty float64 tensor ends them, so that sums are
    float64."""

    places: list[int]  # in the list
    shards: list[Tensor]
    strengths: Strengths
    sharing_groups: Any  # the processes over which groups of l2_norm are cut, if any
    sharing_rest: Any  # the processes over which the rest is

    def penalty(self) -> Tensor:
        """Of the whole bucket, on every process."""
        with self._places_in_errors():
            if self.strengths.are_trained():
                return self._composed_penalty()
            measure = None if self.sharing_groups is None else self._measure
            return total(functions.penalty(self.shards, self.strengths, measure), self.sharing_rest)

    def value_and_grad(self) -> tuple[Tensor, Sequence[Tensor]]:
        needs_grad = [True] * len(self.shards)
        with self._places_in_errors():
            if self.sharing_groups is None:
                value, grads, _ = _ops.penalty(self.shards, needs_grad, *self.strengths)
            else:
                value, norms, first_groups = self._measure(self.shards, self.strengths)
                one = torch.ones((), dtype=torch.float64, device=value.device)
                grads = _ops.penalty_grad(one, self.shards, needs_grad, norms, first_groups, *self.strengths)
        return total(value, self.sharing_rest), grads

    def accumulate_grad_(
        self, on_shards: Callable[[list[Tensor], Strengths, _Scale], Tensor], factor: _Scale
    ) -> Tensor:
        scale, tensor = factor
        if tensor is not None:
            tensor = _devices.reachable(tensor, self.shards[0].device)
        with self._places_in_errors():
            if self.sharing_groups is None:
                value = on_shards(self.shards, self.strengths, (scale, tensor))
            else:
                value = self._accumulate_directed(scale, tensor)
        return total(value, self.sharing_rest)

    def _accumulate_directed(self, scale: float, tensor: Tensor | None) -> Tensor:
        value, norms, first_groups = self._measure(self.shards, self.strengths)
        needs_grad = [p.requires_grad for p in self.shards]
        trained = list(compress(self.shards, needs_grad))
        if trained:
            upstream = torch.full_like(value, scale) if tensor is None else tensor
            first_groups = list(compress(first_groups, needs_grad))
            grads = _ops.penalty_grad(upstream, trained, needs_grad, norms, first_groups, *self.strengths)
            for p, grad in zip(trained, grads, strict=True):
                if p.grad is None:
                    p.grad = grad
                else:
                    p.grad.add_(grad)
        return value

    def prox_(self, on_shards: Callable[[list[Tensor], Strengths], None]) -> None:
        with self._places_in_errors():
            if self.sharing_groups is None:
                on_shards(self.shards, self.strengths)
            else:
                own = _ops.norms(self.shards, *self.strengths)
                norms = hypot(gathered(self._in_slots(own), self.sharing_groups))
                _ops.prox_(self.shards, norms, self._first_slots(), *self.strengths)

    def _measure(self, shards: Sequence[Tensor], strengths: Strengths) -> tuple[Tensor, Tensor, Sequence[int]]:
        """The penalty of all that share groups, the norm of every group, and where those of each parameter begin."""
        value, _, (own,) = _ops.penalty(shards, (), *strengths.having(l2_norm=()))
        parts = gathered(torch.cat((value[None], self._in_slots(own))), self.sharing_groups)
        norms = hypot(parts[:, 1:])
        weights = self._weights_of_slots(strengths)
        return parts[:, 0].sum() + torch.where(weights == 0, 0, weights * norms).sum(), norms, self._first_slots()

    def _composed_penalty(self) -> Tensor:
        """The penalty for strengths that require grad."""
        strengths = _shared(self.strengths, self.sharing_rest)
        if self.sharing_groups is None:
            return total(composed_penalty(self.shards, strengths), self.sharing_rest)
        pieces = _shared(strengths, self.sharing_groups).having(l2_norm=())._replace(group=0)
        own = self._in_slots(group_norms(self.shards, self.strengths.group))
        scale = scale_of(gathered(own.detach(), self.sharing_groups))
        squares = (own * scale).square()
        sums = total(torch.cat((composed_penalty(self.shards, pieces)[None], squares)), self.sharing_groups)
        is_zero = sums[1:] == 0
        norms = torch.where(is_zero, 0, torch.where(is_zero, 1, sums[1:]).sqrt()) / scale
        return total(sums[0] + (self._weights_of_slots(strengths) * norms).sum(), self.sharing_rest)

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
        """[2, parameters]: the sum of the norms of its slices, and how many of these are 0."""
        norms = self._in_slots(_ops.norms(self.shards, *Strengths(group=self.strengths.group)))
        if self.sharing_groups is not None:
            norms = hypot(gathered(norms, self.sharing_groups))
        sums = norms.new_zeros(2, len(self.places))
        slots = torch.tensor(self._slots(), device=norms.device)
        owner = torch.repeat_interleave(slots, output_size=len(norms))
        return sums.index_add_(1, owner, torch.stack([norms, (norms == 0).double()]))

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

    def _weights_of_slots(self, strengths: Strengths) -> Tensor:
        weights = table_of(strengths, len(self.shards), self.shards[0].device)[:, -1]
        return torch.cat([w.expand(n) for w, n in zip(weights.unbind(), self._slots(), strict=True)])

    @contextmanager
    def _places_in_errors(self) -> Iterator[None]:
        try:
            yield
        except (TypeError, ValueError) as error:
            raise relabelled(error, self.places) from error


def _in_slots(norms: Tensor, shards: list[Tensor], sizes: list[int], group: int) -> Tensor:
    """The norms that the operators give of shards, with zeros for the groups of empty ones."""
    pieces = torch.functional.split(norms, [group_count(p, group) for p in shards])
    return torch.cat([x if len(x) == n else x.new_zeros(n) for x, n in zip(pieces, sizes, strict=True)])


def _shared(strengths: Strengths, processes_of_it: Any) -> Strengths:
    return strengths._replace(tensors=tuple(shared(t, processes_of_it) for t in strengths.tensors))
