"""A list in parts, on several devices or cut into shards (DTensor): launches for each bucket, one number out.

Each process works on what it holds. The gradient needs no communication: it is that of the shard, laid out as its
parameter. What is wrong with the list is found before it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling

from fused_reg import _devices, _ops
from fused_reg._arguments import check_numbers, check_params, check_values, is_dtensor
from fused_reg._one_device import ADD, SKIP, WRITE, grads_of
from fused_reg._terms import Strengths
from fused_reg.autograd import functions
from fused_reg.distributed.buckets import Bucket, buckets, value_of
from fused_reg.distributed.joint import Joint
from fused_reg.distributed.shards import (
    check_distinct,
    is_negated,
    is_sharded,
    laid_out_as,
    plain,
    shards_of,
    trained_shards,
    with_grads,
)


def are_mixed(params: Sequence[Tensor]) -> bool:
    """Whether these are on several devices that may be in one list."""
    return _devices.can_mix({p.device for p in params})


def penalty(
    params: list[Tensor],
    strengths: Strengths,
    joint: Joint | None = None,
    *,
    of_list: Callable[..., Tensor] = functions.penalty,
) -> Tensor:
    """The differentiable penalty; ``of_list``: that of a list on one device."""
    own = checked_buckets(params, trained_shards(params), strengths, joint)
    value = value_of([b.penalty(of_list) for b in own], params)
    return plain(value) if is_sharded(params) else value


@torch.no_grad()
def value_and_grad(params: list[Tensor], strengths: Strengths) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and its gradients."""
    values = []
    grads = list(params)
    for bucket in checked_buckets(params, shards_of(params), strengths):
        value, own = bucket.value_and_grad()
        values.append(value)
        for place, grad in zip(bucket.places, own, strict=False):  # without that of the empty tensor
            grads[place] = laid_out_as(params[place], grad)
    return value_of(values, params), tuple(grads)


def checked_buckets(
    params: list[Tensor], shards: list[Tensor], strengths: Strengths, joint: Joint | None = None
) -> Iterator[Bucket]:
    if not is_compiling():
        check_params("", shards)
        _ops.library.check_dtypes(params)
        check_values(strengths.named_tensors())
    return buckets(params, shards, strengths, joint)


@torch.no_grad()
def accumulate_grad_(
    params: list[Tensor],
    strengths: Strengths,
    factor: tuple[float, Tensor | None],
    skip_missing: bool,
    joint: Joint | None = None,
) -> Tensor:
    """Adds the gradients to ``.grad``, and returns the penalty. Nothing is written unless all of it can be."""
    shards = check_accumulation(params, strengths, factor, skip_missing)
    own = buckets(params, shards, strengths, joint)
    value = value_of([b.accumulate_grad_(factor, skip_missing) for b in own], params)
    for p, shard in zip(params, shards, strict=True):
        if shard is not p and p.grad is None and shard.grad is not None:
            p.grad = laid_out_as(p, shard.grad)
        elif shard is not p and p.grad is not None and is_negated(p.grad):  # the shard has a copy
            p.grad.copy_(cast(Tensor, shard.grad))
    increment_version([p.grad for p in params if p.grad is not None and is_dtensor(p.grad)])
    return value


def check_accumulation(
    params: list[Tensor], strengths: Strengths, factor: tuple[float, Tensor | None], skip_missing: bool
) -> list[Tensor]:
    """Raises where `accumulate_grad_` would, also of a list on one device; the shards with their gradients."""
    shards = with_grads(params, skip_missing)
    check_numbers(shards, {**strengths.named_tensors(), "scale": factor[1]})
    modes, grads = grads_of(shards, WRITE)
    _ops.check_writable(shards, grads, [mode if mode == ADD else SKIP for mode in modes])
    return shards


def prox_(params: list[Tensor], strengths: Strengths, joint: Joint | None = None) -> None:
    """The proximal step. Nothing is written unless all of it can be."""
    shards = check_prox(params, strengths)
    with torch.no_grad():
        # The dispatcher writes to no negated view. The step is odd: it may take the memory behind as it is.
        shards = [torch._neg_view(shard) if is_negated(shard) else shard for shard in shards]
        for bucket in buckets(params, shards, strengths, joint):
            bucket.prox_()
    increment_version([p for p in params if is_dtensor(p)])


def check_prox(params: list[Tensor], strengths: Strengths) -> list[Tensor]:
    """Raises where `prox_` would, also of a list on one device; the shards."""
    check_distinct(params)
    _ops.check_not_in_graph("", params)  # the operators see the shards only
    shards = shards_of(params)
    check_numbers(shards, strengths.named_tensors())
    _ops.check_writable(shards, (), ())
    return shards
