"""Sums over the processes along some dimensions of a mesh: one all-gather each, added in the order of the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from fused_reg.autograd.composed import exponent_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Its name from torch 2.13 on, or before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

# The processes along several dimensions of a mesh, by the default group that was there when they were needed.
_groups: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def processes(mesh: DeviceMesh, dims: tuple[int, ...]) -> Any:
    """Those that differ from this one only along these dimensions; None if there are none."""
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    known = _groups.setdefault(dist.group.WORLD, {})
    if (mesh, dims) not in known:
        here = mesh.get_coordinate()
        assert here is not None
        along = tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))
        ranks = mesh.mesh[along].flatten().tolist()
        is_world = sorted(ranks) == list(range(dist.get_world_size()))
        known[mesh, dims] = dist.group.WORLD if is_world else dist.new_group(ranks, use_local_synchronization=True)
    return known[mesh, dims]


# As torch.compiler.assume_constant_result, which imports the compiler: that cannot trace how a group is made.
processes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def gathered(x: Tensor, group: Any) -> Tensor:
    """[processes, numbers]: the numbers of every process."""
    out = x.new_empty((dist.get_world_size(group), x.numel()))
    _all_gather(out, x.reshape(1, -1).contiguous(), group=group)
    return out


def total(x: Tensor, group: Any) -> Tensor:
    """The sum over the processes, differentiable to any order: each has a part of it, and all have the same use of it.
    (The derivative of ``torch.distributed``'s own sums is for a use on each, and so too large by their number.)"""
    return x if group is None else _Total.apply(x, group)  # type: ignore[no-untyped-call]


def shared(x: Tensor, group: Any) -> Tensor:
    """What all processes have the same of. Its derivative is the sum of what each finds."""
    return x if group is None else _Shared.apply(x, group)  # type: ignore[no-untyped-call]


def hypot(norms: Tensor) -> Tensor:
    """``(norms ** 2).sum(0).sqrt()`` without overflow."""
    # By a power of two that takes the largest of each column near 1.
    scale = torch.exp2(-exponent_of(norms.amax(0)).clamp(-1000, 1000).double())
    return (norms * scale).square().sum(0).sqrt() / scale


class _Total(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return gathered(x, group).sum(0).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return shared(upstream, ctx.group), None


class _Shared(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return total(upstream, ctx.group), None
