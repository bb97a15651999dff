"""Shards of parameters (DTensor): what this process holds of each, and how it is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fused_reg._arguments import PLAIN_TYPES, is_dtensor


def is_sharded(params: Sequence[Any]) -> bool:
    """Whether there is a DTensor among them. Cheap where there is none."""
    return not PLAIN_TYPES.issuperset(map(type, params)) and any(map(is_dtensor, params))


def cuts(p: Any) -> int:
    """In how many dimensions of a mesh it is cut: 0 unless it is a DTensor."""
    return p.device_mesh.ndim if is_dtensor(p) else 0


def shards_of(params: list[Tensor]) -> list[Tensor]:
    """What this process holds of each: of a DTensor its shard, outside of autograd."""
    with torch.no_grad():
        return [p.to_local() if is_dtensor(p) else p for p in params]  # type: ignore[attr-defined]


def is_negated(x: Tensor) -> bool:
    """Whether it is a negated view. Compilers know of none."""
    return not is_compiling() and x.is_neg()


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
    return [_with_grad(i, p, skip_missing) for i, p in enumerate(params)]


def _with_grad(i: int, p: Any, skip_missing: bool) -> Tensor:
    if p.requires_grad and not p.is_leaf:
        raise ValueError(f"params[{i}] must be a leaf, as a parameter is, got the result of {p.grad_fn}")
    grad = p.grad if p.requires_grad else None
    if not is_dtensor(p):
        if grad is not None and grad.layout is not torch.strided:
            raise TypeError(
                f"params[{i}].grad must be dense (torch.strided), got {grad.layout}; "
                "build the embedding with sparse=False, use p.grad = p.grad.to_dense(), or attach a Regularizer with "
                "lazy_rows=True"
            )
        if grad is None or not is_negated(grad):  # the dispatcher writes to no negated view: it gets a copy
            return p  # type: ignore[no-any-return]
        shard, own = p.detach(), grad.resolve_neg()
    else:
        shard, own = p.to_local().detach(), None
        if grad is not None:
            if not is_dtensor(grad):
                raise ValueError(f"params[{i}].grad must be a DTensor as its parameter is, got {type(grad).__name__}")
            if grad.placements != p.placements:  # tensor parallel layers leave sums that are pending
                p.grad = grad.redistribute(p.device_mesh, p.placements)
            own = p.grad.to_local()
    shard.requires_grad_(p.requires_grad and not (skip_missing and grad is None))
    if own is not None:
        shard.grad_dtype = None  # any
        shard.grad = own
    return shard  # type: ignore[no-any-return]


def laid_out_as(p: Any, shard: Tensor) -> Tensor:
    """The DTensor that is cut as a parameter and has this shard; for no DTensor the shard."""
    if not is_dtensor(p):
        return shard
    from torch.distributed.tensor import DTensor

    # Torch would derive the shape from even shards.
    layout: dict[str, Any] = {"shape": p.shape, "stride": p.stride(), "run_check": False}
    return DTensor.from_local(shard, p.device_mesh, p.placements, **layout)


def trained_shards(params: list[Tensor]) -> list[Tensor]:
    """`shards_of`, differentiable."""
    shards = shards_of(params)
    places = [i for i, p in enumerate(params) if is_dtensor(p) and p.requires_grad]
    trained = _Shards.apply(*(params[i] for i in places)) if places else ()  # type: ignore[no-untyped-call]
    for i, shard in zip(places, trained, strict=True):
        shards[i] = shard
    return shards


class _Shards(Function):
    """The shards of DTensors."""

    @staticmethod
    def forward(ctx: Any, *params: Any) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*params)
        ctx.set_materialize_grads(False)
        return tuple(shard.detach() for shard in shards_of(list(params)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        params = ctx.saved_tensors  # raises if one was changed in place: torch does not count that in its shard
        return tuple(None if g is None else laid_out_as(p, g) for p, g in zip(params, grads, strict=True))


def plain(value: Tensor) -> Tensor:
    """The value, also in a loss that is a DTensor, whose gradient is one."""
    return _Plain.apply(value)  # type: ignore[no-any-return,no-untyped-call]


class _Plain(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Tensor:
        return upstream.full_tensor() if is_dtensor(upstream) else upstream  # type: ignore[no-any-return]
