"""The autograd of the penalty.

Two ways lead to the same numbers:

- `penalty` is the fast one, for constant strengths: one launch in the forward computes value and gradients,
  and the backward hands them over.
- `composed_penalty` is the general one, for strengths that require grad and for ``torch.func``: a few functions
  that are each other's derivatives. The fast one falls back on them for higher derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from fused_reg import _ops
from fused_reg._arguments import Strengths

_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The differentiable penalty of a list that is not empty."""
    if _transforms_active():
        return composed_penalty(params, strengths)
    if not torch.is_grad_enabled():
        return _ops.penalty(params, *strengths)
    if strengths.requires_grad:
        return composed_penalty(params, strengths)
    return _apply_penalty(strengths, *params)


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


class _Penalty(Function):
    """Value and gradient in one launch. First derivatives; `_Gradient` has the higher ones."""

    @staticmethod
    def forward(ctx: Any, strengths: Strengths, *params: Tensor) -> Tensor:
        needs_grad = ctx.needs_input_grad[1:]
        if not any(needs_grad):
            return _ops.penalty(params, *strengths)
        value, ctx.grads = _ops.penalty_and_grad(params, needs_grad, *strengths)
        if not all(needs_grad):
            params = tuple(compress(params, needs_grad))
        ctx.needs_grad = needs_grad
        ctx.l1, ctx.l2, *tensors = strengths
        ctx.save_for_backward(*tensors, *params)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        l1_tensor, l2_tensor, *params = ctx.saved_tensors  # raises if one was changed in place
        # The buffers are handed over once; a second backward (retain_graph=True) gets its own.
        grads, ctx.grads = ctx.grads, None
        if grads is None or torch.is_grad_enabled() or not _is_one_on_cpu(upstream):
            strengths = Strengths(ctx.l1, ctx.l2, l1_tensor, l2_tensor)
            if torch.is_grad_enabled():  # create_graph=True
                table = _rows_of(_table(strengths, len(ctx.needs_grad), upstream.device), ctx.needs_grad)
                grads = _apply(_Gradient, upstream, table, *params)
            elif grads is None:
                grads = _ops.penalty_grad(upstream, params, ctx.needs_grad, *strengths)
            else:  # on a GPU the kernel looks at the upstream gradient, so that nothing waits
                _ops.rescale_grad_(upstream, params, grads, ctx.needs_grad, *strengths)
        return None, *_scattered(grads, ctx.needs_grad)


# Function.apply in Python looks for functorch's wrappers in every argument, 0.15 us each. `penalty` has
# excluded functorch, so this is the C++ method beneath.
_apply_penalty: Callable[..., Tensor] = super(Function, _Penalty).apply


def composed_penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The penalty as a function of a table of strengths and the parameters: differentiable to any order in both."""
    params = [p.clone() if p.is_inference() else p for p in params]  # autograd cannot save an inference tensor
    return cast(Tensor, _apply(_Composed, _table(strengths, len(params), params[0].device), *params))


def _table(strengths: Strengths, count: int, device: torch.device) -> Tensor:
    """The strengths as one differentiable tensor, [count, 2] float64. On a GPU, nothing waits for it."""
    columns = []
    for floats, tensor in ((strengths.l1, strengths.l1_tensor), (strengths.l2, strengths.l2_tensor)):
        if tensor is not None:
            if not tensor.is_cpu and tensor.device != device:
                raise ValueError(
                    f"strengths must be on the CPU or on the parameters' device ({device}), got {tensor.device}"
                )
            column = tensor.to(device, torch.float64)
        elif len(floats) <= 1:
            column = torch.full((), sum(floats), dtype=torch.float64, device=device)
        else:
            column = _on(device, torch.tensor(floats, dtype=torch.float64))
        columns.append(column.expand(count))
    return torch.stack(columns, dim=1)


def _on(device: torch.device, host: Tensor) -> Tensor:
    if device.type == "cuda" and type(host) is Tensor:  # a FakeTensor cannot be pinned
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _rows_of(table: Tensor, keep: Sequence[bool]) -> Tensor:
    """The rows to keep. A GPU would wait for an index that comes from the host."""
    return table if all(keep) else torch.stack(list(compress(table.unbind(), keep)))


class _Composed(Function):
    """The penalty for strengths ``table`` [params, 2]; `_Gradient` and `_TermSums` are its derivatives."""

    @staticmethod
    def forward(table: Tensor, *params: Tensor) -> Tensor:
        return _ops.penalty(params, (), (), table[:, 0], table[:, 1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        table, *params = inputs
        needs_table, *needs_params = ctx.needs_input_grad
        ctx.save_for_backward(table, *compress(params, [needs_table or needed for needed in needs_params]))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        table, *params = ctx.saved_tensors
        needs_table, *needs_params = ctx.needs_input_grad
        table_grad = None
        if needs_table:
            table_grad = upstream.to(table.dtype) * _apply(_TermSums, *params)
            params = list(compress(params, needs_params))
        params_grad: tuple[Tensor | None, ...] = (None,) * len(needs_params)
        if params:
            grads = _apply(_Gradient, upstream, _rows_of(table, needs_params), *params)
            params_grad = _scattered(grads, needs_params)
        return table_grad, *params_grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return torch.stack([_apply(_Composed, *row) for row in _rows(info, in_dims, inputs)]), 0


class _TermSums(Function):
    """[len(params), 2] float64: the sum of |w| and the sum of w^2 of each parameter."""

    @staticmethod
    def forward(*params: Tensor) -> Tensor:
        return _ops.term_sums(params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*compress(inputs, ctx.needs_input_grad))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of sum(cotangent * S): a penalty whose strengths are the cotangents.
        needs_grad, params = ctx.needs_input_grad, ctx.saved_tensors
        table = _rows_of(cotangent, needs_grad)
        return _scattered(_apply(_Gradient, table.new_ones(()), table, *params), needs_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *params: Tensor) -> tuple[Tensor, int]:
        return torch.stack([_apply(_TermSums, *row) for row in _rows(info, in_dims, params)]), 0


class _Gradient(Function):
    """The gradient of each parameter for strengths ``table`` [params, 2], and its own derivatives."""

    @staticmethod
    def forward(upstream: Tensor, table: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        return tuple(_ops.penalty_grad(upstream, params, [True] * len(params), (), (), table[:, 0], table[:, 1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        upstream, table, *params = ctx.saved_tensors
        needs_upstream, needs_table, *needs_params = ctx.needs_input_grad

        upstream_grad = table_grad = None
        if needs_upstream or needs_table:
            # The gradient is linear in each strength: its derivative there is the gradient for strength 1.
            one = torch.ones_like(upstream)
            columns = [
                _dots(cotangents, _apply(_Gradient, one, unit.expand_as(table), *params))
                for unit in torch.eye(2, dtype=table.dtype, device=table.device)
            ]
            slopes = torch.stack(columns, dim=1)  # [len(params), 2]
            upstream_grad = (table * slopes).sum().to(upstream.dtype)
            table_grad = upstream.to(table.dtype) * slopes

        params_grad: tuple[Tensor | None, ...] = (None,) * len(params)
        if any(needs_params):
            # The L1 part is piecewise constant in w. The L2 part is linear: its own gradient, at the cotangent.
            l2_table = torch.stack((torch.zeros_like(table[:, 1]), table[:, 1]), dim=1)
            params_grad = _apply(_Gradient, upstream, l2_table, *cotangents)
        return upstream_grad, table_grad, *params_grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rows = [_apply(_Gradient, *row) for row in _rows(info, in_dims, inputs)]
        stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return stacked, (0,) * len(stacked)


def _is_one_on_cpu(upstream: Tensor) -> bool:
    """Whether a look at the upstream gradient costs nothing and finds 1. A subclass (FakeTensor) is not looked at."""
    return type(upstream) is Tensor and upstream.is_cpu and upstream.item() == 1


def _scattered(grads: Sequence[Tensor], needs_grad: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A gradient or None for every parameter, from the gradients of those that need one."""
    if all(needs_grad):
        return tuple(grads)
    remaining = iter(grads)
    return tuple(next(remaining) if needed else None for needed in needs_grad)


def _dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)])


def _rows(info: Any, in_dims: tuple[int | None, ...], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The arguments of each of vmap's calls."""
    return [
        [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]
