"""The autograd of the penalty.

Two ways lead to the same numbers:

- `penalty` is the fast one, for constant strengths: one launch in the forward computes value and gradients, and the
  backward hands them over. In compiled code, and with ``l2_norm`` on a GPU, the forward computes the value (and the
  norms), and one launch in the backward the gradients. In compiled code many lists are merged with the model
  (`merged`).
- `composed_penalty` is the general one (`composed`), for strengths that require grad and for ``torch.func``. The fast
  one falls back on it for higher derivatives. Where terms are relative, or not proportional to their strengths,
  `specified_penalty` stands in its place.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, compress
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fused_reg import _devices, _ops
from fused_reg._arguments import PLAIN_TYPES, check_values
from fused_reg._terms import Strengths, group_count
from fused_reg.autograd.composed import composed_penalty, gradient, rows_of, scattered, table_of
from fused_reg.autograd.merged import can_merge, merged_penalty, specified_penalty

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


#: The penalty of a list, the norm of every group, and where those of each parameter begin.
Measure: TypeAlias = Callable[[Sequence[Tensor], Strengths], tuple[Tensor, Tensor, Sequence[int]]]
#: The penalty alone, differentiable to any order.
General: TypeAlias = Callable[[Sequence[Tensor], Strengths], Tensor]


def penalty(
    params: Sequence[Tensor],
    strengths: Strengths,
    measure: Measure | None = None,
    general: General | None = None,
    *,
    is_traced: bool = False,
    are_positive: bool = False,
) -> Tensor:
    """The differentiable penalty of a list on one device.

    ``measure``: by other norms than the list's own; ``general``: the same, differentiable to any order, if it is.
    ``is_traced``: for a compiler's tracer, which takes plain operations apart and merges them; ``are_positive``: no
    tensor of strengths has a 0."""
    if measure is not None:
        return _in_two_launches(params, strengths, measure, general)
    if transforms_active():
        return specified_penalty(params, strengths) if is_traced else general_penalty(params, strengths)
    if not torch.is_grad_enabled():
        return _ops.penalty(params, (), *strengths)[0]
    if strengths.are_trained():
        check_values(strengths.named_tensors())
        return general_penalty(params, strengths)
    if is_traced and can_merge(params, strengths):
        return merged_penalty(params, strengths, are_positive)
    # Compiled code comes here with shards only.
    gives_all = not strengths.has_norms() or _devices.row_of(params[0].device).gives_gradients_of_norms
    if is_traced or is_compiling() or not gives_all:
        return _in_two_launches(params, strengths)
    return _apply_penalty(strengths, *params)


def general_penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The penalty of any list, differentiable to any order, also in its strengths."""
    return (composed_penalty if _is_composed(strengths) else specified_penalty)(params, strengths)


def _is_composed(strengths: Strengths) -> bool:
    return not strengths.is_relative() and not strengths.has_bent()


class _Penalty(Function):
    """Value and gradient in one launch. First derivatives; `_Gradient` has the higher ones."""

    @staticmethod
    def forward(ctx: Any, strengths: Strengths, *params: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[1:]
        if not any(needs_grad):
            return _ops.penalty(params, (), *strengths)[0]
        value, ctx.grads, norms = _ops.penalty(params, needs_grad, *strengths)
        ctx.first_groups = _first_groups(params, strengths, needs_grad) if norms else ()
        if not all(needs_grad):
            params = tuple(compress(params, needs_grad))
        ctx.needs_grad = needs_grad
        _save(ctx, strengths, (*norms, *params))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        params = ctx.saved_tensors[ctx.tensors :]  # raises if one was changed in place
        norms = None
        if ctx.first_groups:
            norms, *params = params
        _check_memory(params)
        # The buffers are handed over once; a second backward (retain_graph=True) gets its own.
        grads, ctx.grads = ctx.grads, None
        if grads is None or torch.is_grad_enabled() or not _is_one_on_cpu(upstream):
            strengths = _saved_strengths(ctx)
            if torch.is_grad_enabled():  # create_graph=True
                grads = _differentiable(upstream, params, ctx.needs_grad, strengths)
            elif grads is None:
                grads = _ops.penalty_grad(upstream, params, ctx.needs_grad, norms, ctx.first_groups, *strengths)
            else:  # on a GPU the kernel looks at the upstream gradient, so that nothing waits
                _ops.rescale_grad_(upstream, params, grads, ctx.needs_grad, norms, ctx.first_groups, *strengths)
        return None, *scattered(grads, ctx.needs_grad)


class _TwoLaunchPenalty(Function):
    """The same with the gradient in a launch of its own, in the backward: with ``l2_norm`` a GPU needs the norms
    first, and compiled code would keep the gradients from the forward on."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        # Not with a name each: Dynamo leaves ctx out where as many are given as have names.
        strengths, measure, general, *params = args
        ctx.needs_grad = ctx.needs_input_grad[3:]
        ctx.has_own_norms, ctx.general = measure is None, general
        value: Tensor
        norms: Tensor | None = None
        ctx.first_groups = ()
        if measure is not None:
            value, norms, first_groups = measure(params, strengths)
            ctx.first_groups = tuple(compress(first_groups, ctx.needs_grad))
        elif strengths.has_norms() and any(ctx.needs_grad):
            value, _, (norms,) = _ops.penalty(params, (), *strengths)
            ctx.first_groups = _first_groups(params, strengths, ctx.needs_grad)
        else:
            value, *_ = _ops.penalty(params, (), *strengths)
        kept = compress(params, ctx.needs_grad) if general is None else params
        _save(ctx, strengths, (norms, *kept))
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        norms, *params = ctx.saved_tensors[ctx.tensors :]
        strengths = _saved_strengths(ctx)
        _check_memory(params)
        own = params if ctx.general is None else list(compress(params, ctx.needs_grad))
        grads: Sequence[Tensor]
        if not torch.is_grad_enabled():
            grads = _ops.penalty_grad(upstream, own, ctx.needs_grad, norms, ctx.first_groups, *strengths)
        elif ctx.has_own_norms:  # create_graph=True
            grads = _differentiable(upstream, own, ctx.needs_grad, strengths)
        elif ctx.general is not None:
            grads = _gradients(ctx.general(params, strengths), own, upstream)
        else:
            raise NotImplementedError("a higher derivative of norms that are cut over processes is not supported")
        return None, None, None, *scattered(grads, ctx.needs_grad)


def _differentiable(
    upstream: Tensor, params: Sequence[Tensor], needs_grad: Sequence[bool], strengths: Strengths
) -> Sequence[Tensor]:
    """The gradients of those of a list that need one, themselves differentiable."""
    if not _is_composed(strengths):
        own = strengths.at([i for i, needed in enumerate(needs_grad) if needed], upstream.device)
        own = own.relative(*(list(compress(x, needs_grad)) for x in strengths.references()))
        return _gradients(specified_penalty(params, own), params, upstream)
    table = rows_of(table_of(strengths, len(needs_grad), upstream.device), needs_grad)
    return gradient(upstream, table, strengths.group, params)


def _gradients(value: Tensor, params: Sequence[Tensor], upstream: Tensor) -> Sequence[Tensor]:
    """Of a penalty, themselves differentiable."""
    return torch.autograd.grad(value, params, upstream.to(value.dtype), create_graph=True, materialize_grads=True)


def _first_groups(params: Sequence[Tensor], strengths: Strengths, needs_grad: Sequence[bool]) -> tuple[int, ...]:
    """Where the norms of each parameter that needs a gradient begin."""
    return tuple(compress((0, *accumulate(group_count(p, strengths.group) for p in params)), needs_grad))


def _save(ctx: Any, strengths: Strengths, others: Sequence[Tensor | None]) -> None:
    """Strengths, and behind their tensors these."""
    ctx.tensors = len(strengths.tensors)
    ctx.strengths = strengths._replace(tensors=()) if strengths.tensors else strengths
    ctx.save_for_backward(*strengths.tensors, *others)


def _saved_strengths(ctx: Any) -> Strengths:
    return ctx.strengths._replace(tensors=ctx.saved_tensors[: ctx.tensors]) if ctx.tensors else ctx.strengths  # type: ignore[no-any-return]


# Function.apply in Python looks for functorch's wrappers in every argument, 0.15 us each. `penalty` has
# excluded functorch, so this is the C++ method beneath.
_apply_penalty: Callable[..., Tensor] = super(Function, _Penalty).apply
_apply_two_launches: Callable[..., Tensor] = super(Function, _TwoLaunchPenalty).apply


def _in_two_launches(
    params: Sequence[Tensor], strengths: Strengths, measure: Measure | None = None, general: General | None = None
) -> Tensor:
    # Of the two, torch 2.10 traces only this one.
    apply: Callable[..., Tensor] = _TwoLaunchPenalty.apply if is_compiling() else _apply_two_launches
    return apply(strengths, measure, general, *params)


def _check_memory(params: Sequence[Tensor]) -> None:
    """`fully_shard` frees the parameters that it has gathered when the loss's backward is done with them. What comes
    later reaches no shard."""
    if "torch.distributed.fsdp" not in sys.modules or is_compiling():
        return
    # Not of a tensor that a compiler traces with: it has no memory.
    if any(type(p) in PLAIN_TYPES and p.numel() > 0 and p.untyped_storage().size() == 0 for p in params):
        raise RuntimeError(
            "fused_penalty: a parameter's memory was freed between forward and backward, as fully_shard does in the "
            "loss's backward; take the penalty's backward with the loss's or before it, or take the penalty after it"
        )


def _is_one_on_cpu(upstream: Tensor) -> bool:
    """Whether a look at the upstream gradient costs nothing and finds 1. A subclass (FakeTensor) is not looked at."""
    return type(upstream) is Tensor and _devices.is_at_hand(upstream) and upstream.item() == 1
