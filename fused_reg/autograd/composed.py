"""The penalty as a few functions that are each other's derivatives, to any order: in the parameters, in strengths that
require grad, and under ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fused_reg import _devices, _ops
from fused_reg._arguments import FORWARD_MODE
from fused_reg._terms import KINDS, NUMBERS, PLACES, TERM_OF, TERMS, Strengths, group_count, in_groups


def composed_penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The penalty as a function of a table of strengths and the parameters: differentiable to any order in both."""
    composed = _operator if is_compiling() else _composed_penalty
    return composed(params, table_of(strengths, len(params), params[0].device), strengths.group)


def _composed_penalty(params: Sequence[Tensor], table: Tensor, group: int) -> Tensor:
    params = [p.clone() if p.is_inference() else p for p in params]  # autograd cannot save an inference tensor
    return cast(Tensor, _apply(_Composed, group, table, *params))


# In compiled code Dynamo would trace the functions, and it cannot where one is applied in another's backward. What an
# operator is composed of is traced below it.
torch.library.define("fused_reg::composed_penalty", "(Tensor[] params, Tensor table, int group) -> Tensor")
torch.library.impl("fused_reg::composed_penalty", "CompositeImplicitAutograd", _composed_penalty)
_operator: Callable[..., Tensor] = torch.ops.fused_reg.composed_penalty.default


def _apply(function: type[Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


#: The columns of a table: the numbers of the terms of single elements, as far as a list has them, but always the first
#: two; behind them ``l2_norm``, if it has norms.
_COLUMNS = [kind for kind in KINDS if kind != "l2_norm"]
_SHAPES = [i for i, kind in enumerate(_COLUMNS) if kind not in TERMS]


def table_of(strengths: Strengths, count: int, device: torch.device) -> Tensor:
    """The strengths as one differentiable tensor, [count, columns] float64. On a GPU, nothing waits for it, and a graph
    can capture it."""
    own = dict(zip(NUMBERS, strengths.columns(), strict=True))
    width = max(i + 1 for i, kind in enumerate(_COLUMNS) if i < 2 or strengths.counts[PLACES[TERM_OF[kind]]] != 0)
    columns = []
    for kind in _COLUMNS[:width] + ["l2_norm"] * strengths.has_norms():
        given = own[kind]
        if isinstance(given, Tensor):
            if not _devices.is_at_hand(given) and given.device != device:
                raise ValueError(
                    f"strengths must be on the CPU or on the parameters' device ({device}), got {given.device}"
                )
            column = given.to(device, torch.float64)
        elif len(given) <= 1:
            column = torch.full((), sum(given), dtype=torch.float64, device=device)
        else:
            column = _ops.numbers(torch.empty(0, device=device), given)
        columns.append(column.expand(count))
    return torch.stack(columns, dim=1)


def _strengths_of(table: Tensor, group: int = 0) -> Strengths:
    """The same, back from a table."""
    columns: list[Tensor] = [*table.unbind(1)]
    norms = {"l2_norm": columns.pop()} if group != 0 else {}
    return Strengths(group=group).having(**dict(zip(_COLUMNS, columns, strict=False)), **norms)


def _shaped(factors: Tensor, table: Tensor) -> Tensor:
    """These in the place of a table's strengths."""
    width = table.shape[1]
    if not any(i < width for i in _SHAPES):
        return factors
    return torch.stack([(table if i in _SHAPES else factors)[:, i] for i in range(width)], dim=1)


def rows_of(table: Tensor, keep: Sequence[bool]) -> Tensor:
    """The rows to keep. A GPU would wait for an index that comes from the host."""
    return table if all(keep) else torch.stack(list(compress(table.unbind(), keep)))


def gradient(upstream: Tensor, table: Tensor, group: int, params: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient of each parameter, differentiable to any order in everything."""
    if group == 0:
        return cast("Sequence[Tensor]", _apply(_Gradient, upstream, table, *params))
    grads = _apply(_Gradient, upstream, table[:, :-1], *params)
    norms = _split(group_norms(params, group), group, params)
    weights = (upstream.double() * table[:, -1]).unbind()
    return [g + _directed(p, n, weight, group) for g, p, n, weight in zip(grads, params, norms, weights, strict=True)]


def _directed(p: Tensor, norms: Tensor, weight: Tensor, group: int) -> Tensor:
    """``weight * p / norm`` of each group of a parameter, and 0 where the norm is. As in the kernels, a power of two
    keeps ``1 / norm`` from overflow and ``weight / norm`` from underflow."""
    if p.numel() == 0:
        return torch.zeros_like(p)
    is_zero = norms == 0
    norms = torch.where(is_zero, 1, norms)
    of_norm, of_weight = exponent_of(norms), exponent_of(weight)
    scale = torch.exp2((-of_norm).clamp(-511, 1023).minimum(of_weight - of_norm + 1020).double())
    factor = torch.where(is_zero, 0, weight / (norms * scale))
    w, dim = in_groups(p, group)
    shape = [1] * w.ndim
    if dim is not None:
        shape[dim] = -1
    return (w.double() * scale.reshape(shape) * factor.reshape(shape)).to(p.dtype).reshape(p.shape)


def exponent_of(x: Tensor) -> Tensor:
    """``floor(log2(x))`` of each; 0 of infinity and NaN."""
    x = x.detach()
    return torch.where(x.isfinite(), x.frexp().exponent - 1, 0)


class _Reverse(Function):
    """What has derivatives in reverse mode alone."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # of a tangent that another transform hides; others are found before
        raise NotImplementedError(f"fused_penalty: {FORWARD_MODE}")


class _Composed(_Reverse):
    """The penalty for the strengths of a table."""

    @staticmethod
    def forward(group: int, table: Tensor, *params: Tensor) -> Tensor:
        return _ops.penalty(params, (), *_strengths_of(table, group))[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, table, *params = inputs
        _, needs_table, *needs_params = ctx.needs_input_grad
        ctx.save_for_backward(table, *compress(params, [needs_table or needed for needed in needs_params]))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        table, *params = ctx.saved_tensors
        _, needs_table, *needs_params = ctx.needs_input_grad
        table_grad = None
        if needs_table:
            sums = _apply(_TermSums, (table if ctx.group == 0 else table[:, :-1]).detach(), *params)
            if ctx.group != 0:
                norms = _split(group_norms(params, ctx.group), ctx.group, params)
                sums = torch.cat((sums, torch.stack([n.sum() for n in norms])[:, None]), dim=1)
            table_grad = upstream.to(table.dtype) * sums
            params = list(compress(params, needs_params))
        params_grad: tuple[Tensor | None, ...] = (None,) * len(needs_params)
        if params:
            grads = gradient(upstream, rows_of(table, needs_params), ctx.group, params)
            params_grad = scattered(grads, needs_params)
        return None, table_grad, *params_grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return torch.stack([_apply(_Composed, *row) for row in _rows(info, in_dims, inputs)]), 0


class _GroupNorms(_Reverse):
    """`group_norms`."""

    @staticmethod
    def forward(group: int, *params: Tensor) -> Tensor:
        return _ops.norms(params, *Strengths(group=group))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group, *params = inputs
        ctx.save_for_backward(output, *params)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        norms, *params = ctx.saved_tensors
        pairs = zip(_split(norms, ctx.group, params), _split(cotangent, ctx.group, params), strict=True)
        return None, *(_directed(p, n, c, ctx.group) for p, (n, c) in zip(params, pairs, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return torch.stack([_apply(_GroupNorms, *row) for row in _rows(info, in_dims, inputs)]), 0


def group_norms(params: Sequence[Tensor], group: int) -> Tensor:
    """[groups] float64: the norm of every group of every parameter, in turn; differentiable to any order."""
    return cast(Tensor, _apply(_GroupNorms, group, *params))


def _split(norms: Tensor, group: int, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.functional.split(norms, [group_count(p, group) for p in params])


class _TermSums(_Reverse):
    """What each strength of a table, which is a constant, is a factor of; 0 in the columns of what is no strength."""

    @staticmethod
    def forward(table: Tensor, *params: Tensor) -> Tensor:
        ones = torch.ones_like(table[:, 0])  # so that each term is there
        given = {_COLUMNS[i]: table[:, i] if i in _SHAPES else ones for i in range(2, table.shape[1])}
        sums = iter(_ops.sums(params, False, *Strengths().having(**given)).unbind(1))
        columns = [torch.zeros_like(table[:, i]) if i in _SHAPES else next(sums) for i in range(table.shape[1])]
        return torch.stack(columns, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        table, *params = inputs
        ctx.save_for_backward(table, *compress(params, ctx.needs_input_grad[1:]))

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of sum(cotangent * S): a penalty whose strengths are the cotangents.
        _, *needs_grad = ctx.needs_input_grad
        table, *params = ctx.saved_tensors
        is_positive = cotangent >= 0  # as the operators want strengths
        parts = torch.where(is_positive, cotangent, 0), torch.where(is_positive, 0, -cotangent)
        plus, minus = (
            _apply(_Gradient, part.new_ones(()), rows_of(_shaped(part, table), needs_grad), *params) for part in parts
        )
        return None, *scattered([a - b for a, b in zip(plus, minus, strict=True)], needs_grad)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:
        return torch.stack([_apply(_TermSums, *row) for row in _rows(info, in_dims, inputs)]), 0


class _Gradient(_Reverse):
    """The gradient of each parameter for the strengths of a table without norms, and its own derivatives."""

    @staticmethod
    def forward(upstream: Tensor, table: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        strengths = _strengths_of(table)
        return tuple(_ops.penalty_grad(upstream, params, [True] * len(params), None, (), *strengths))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        upstream, table, *params = ctx.saved_tensors
        needs_upstream, needs_table, *needs_params = ctx.needs_input_grad

        upstream_grad = table_grad = None
        if needs_upstream or needs_table:
            # The gradient is linear in each strength: its derivative there is the gradient for strength 1, which a
            # narrower type than float64 may not hold.
            one, wide = torch.ones_like(upstream), [p.double() for p in params]
            columns = [
                torch.zeros_like(table[:, i])
                if i in _SHAPES
                else _dots(cotangents, _apply(_Gradient, one, _shaped(unit.expand_as(table), table), *wide))
                for i, unit in enumerate(torch.eye(table.shape[1], dtype=table.dtype, device=table.device))
            ]
            slopes = torch.stack(columns, dim=1)
            upstream_grad = torch.where(table == 0, 0, table * slopes).sum().to(upstream.dtype)
            table_grad = upstream.to(table.dtype) * slopes

        params_grad: tuple[Tensor | None, ...] = (None,) * len(params)
        if any(needs_params):
            # The L1 part is piecewise constant in w. The L2 part is linear: its own gradient, at the cotangent. So is
            # smooth L1 where its gradient is not yet that of L1.
            zeros = torch.zeros_like(table[:, 1])
            grads = _apply(_Gradient, upstream, torch.stack((zeros, table[:, 1]), dim=1), *cotangents)
            if table.shape[1] > 2:
                smooth, beta = table[:, 2], table[:, 3]
                unit = torch.stack((zeros, zeros, torch.ones_like(beta), beta), dim=1)
                slopes = _apply(_Gradient, torch.ones_like(upstream), unit, *[p.double() for p in params])
                bends = (upstream.double() * torch.where(beta > 0, smooth / torch.where(beta > 0, beta, 1), 0)).unbind()
                grads = [
                    grad + torch.where(slope.abs() < 1, bend * cotangent, 0).to(grad.dtype)
                    for grad, slope, bend, cotangent in zip(grads, slopes, bends, cotangents, strict=True)
                ]
            params_grad = tuple(grads)
        return upstream_grad, table_grad, *params_grad

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        rows = [_apply(_Gradient, *row) for row in _rows(info, in_dims, inputs)]
        stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
        return stacked, (0,) * len(stacked)


def scattered(grads: Sequence[Tensor], needs_grad: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A gradient or None for every parameter, from the gradients of those that need one."""
    if all(needs_grad):
        return tuple(grads)
    remaining = iter(grads)
    return tuple(next(remaining) if needed else None for needed in needs_grad)


def _dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)])


def _rows(info: Any, in_dims: tuple[int | None, ...], tensors: Sequence[Any]) -> list[list[Any]]:
    """The arguments of each of vmap's calls."""
    return [
        [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)]
        for i in range(info.batch_size)
    ]
