"""The public functions that write to the parameters or to their gradients, outside of autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing
from torch.compiler import is_compiling
from typing_extensions import Unpack

from fused_reg import _ops, distributed
from fused_reg._arguments import (
    Strength,
    as_list,
    as_scale,
    as_step,
    as_strengths,
    check_closed_form,
    check_numbers,
    check_values,
    raise_explained,
)
from fused_reg._terms import Strengths, Terms, takes_terms
from fused_reg.distributed import by_device

# What _ops.accumulate_grad_ does with the gradient of a parameter: nothing, write it, add to it.
_SKIP, _WRITE, _ADD = 0, 1, 2


@takes_terms
def accumulate_grad_(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    scale: float | Tensor = 1.0,
    **terms: Unpack[Terms[Strength]],
) -> Tensor:
    r"""Adds the gradient of the penalty to ``.grad``, and returns the penalty: one pass (with ``l2_norm`` two).

    .. math::
        \text{grad}_t \mathrel{+}= \text{scale} \cdot \frac{\partial\,\text{penalty}}{\partial w_t}

    for every parameter that requires grad, with the penalty of :func:`fused_penalty`. After the loss's own backward it
    equals ``(loss + scale * penalty).backward()``, without a graph and without the engine's second pass over ``.grad``.

    Args:
        params: as for :func:`fused_penalty`; leaves. A ``.grad`` that is None is written fresh. A parameter that does
            not require grad keeps its ``.grad``, and counts in the penalty.
        l1: as for :func:`fused_penalty`, but taken as a constant.
        l2: as for :func:`fused_penalty`, but taken as a constant.
        terms: as for :func:`fused_penalty`, but taken as constants.
        scale: a finite float, or a 0-dim tensor on the CPU or on the parameters' device: a loss scale (``GradScaler``),
            or 1 / the number of accumulation steps.

    It moves every element, also those whose gradient a hook masks (frozen rows of an embedding), as ``weight_decay``
    does: see :doc:`/guides/proximal`.

    Returns:
        The penalty, not scaled, as :func:`fused_penalty` returns it, without a graph.

    Raises:
        TypeError: as :func:`fused_penalty`; a ``.grad`` is sparse, or of a dtype that parameters cannot have.
        ValueError: as :func:`fused_penalty`; parameters or gradients share memory; a parameter is not a leaf.
            Nothing has been written then.

    Warns:
        UserWarning: no parameter requires grad, so that nothing is added; an iterator gives no parameter.

    Example:
        >>> import torch, fused_reg
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, -3.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> fused_reg.accumulate_grad_(model.parameters(), l1=0.1, l2=0.01)
        tensor(0.7800)
        >>> model.weight.grad  # 1 - 0.1 - 0.01 * 6
        tensor([[0.8400, 0.8400]])

    Source: as :func:`fused_penalty`.
    """
    name = "accumulate_grad_"
    tensors = as_list(name, params)
    strengths = as_strengths(name, tensors, l1, l2, terms)
    value = accumulate(name, tensors, strengths, as_scale(name, scale, tensors))
    if tensors and not is_compiling() and not any(p.requires_grad for p in tensors):
        warnings.warn(
            f"{name}: no parameter requires grad, so that nothing was added; pass the parameters themselves, not "
            "`.data`, and for the value alone take fused_penalty under torch.no_grad()",
            stacklevel=2,
        )
    return value


def accumulate(
    name: str,
    tensors: list[Tensor],
    strengths: Strengths,
    factor: tuple[float, Tensor | None],
    skip_missing: bool = False,
) -> Tensor:
    """`accumulate_grad_` for arguments that have been checked, in the name of a function.

    ``skip_missing``: a parameter whose gradient is None gets none, and counts in the value."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    if not is_compiling() and _is_tracing():  # which would lose what is written
        raise_explained(name, tensors, NotImplementedError())
    if distributed.is_sharded(tensors):
        shards = _checked_shards(name, tensors, strengths, factor, skip_missing)
        on_shards = partial(accumulate, name, skip_missing=skip_missing)
        try:
            return distributed.accumulate_grad_(on_shards, tensors, shards, strengths, factor)
        except Exception as error:
            raise_explained(name, tensors, error)
    try:
        modes, grads = _grads_of(tensors, _SKIP if skip_missing else _WRITE)
        missing = [p for p, mode in zip(tensors, modes, strict=True) if mode == _WRITE] if _WRITE in modes else []
        try:
            fresh = _ops.empty_grads(missing) if missing else []
            own = _merged(modes, grads, fresh) if missing else grads
            value = _ops.accumulate_grad_(tensors, own, modes, *factor, *strengths)
        except Exception as error:
            if not by_device.is_mixed(tensors, error):
                raise
            check_values("", strengths.named_tensors())
            fresh = by_device.empty_grads(missing)
            own = _merged(modes, grads, fresh)
            value = by_device.accumulate_grad_(tensors, own, modes, *factor, strengths)
    except Exception as error:
        negated = [p for p in tensors if isinstance(p, Tensor) and p.is_leaf and p.grad is not None and p.grad.is_neg()]
        if negated:  # the dispatcher writes to no such view
            return _through_copies(negated, lambda: accumulate(name, tensors, strengths, factor, skip_missing))
        raise_explained(name, tensors, error)
    for p, grad in zip(missing, fresh, strict=True):
        _set_grad(p, grad)
    return value


def _merged(modes: list[int], grads: list[Tensor], fresh: list[Tensor]) -> list[Tensor]:
    """The gradients to add to and those to write, in the order of the parameters."""
    by_mode = {_ADD: iter(grads), _WRITE: iter(fresh)}
    return [next(by_mode[mode]) for mode in modes if mode != _SKIP]


def _through_copies(params: list[Tensor], accumulate: Callable[[], Tensor]) -> Tensor:
    """``accumulate()`` with copies in the place of these parameters' gradients, and then the copies into these."""
    grads = [p.grad for p in params]
    try:
        for p, grad in zip(params, grads, strict=True):
            p.grad = cast(Tensor, grad).resolve_neg()
        value = accumulate()
        with torch.no_grad():
            for p, grad in zip(params, grads, strict=True):
                cast(Tensor, grad).copy_(cast(Tensor, p.grad))
    finally:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
    return value


def check_accumulation(
    name: str, tensors: list[Tensor], strengths: Strengths, factor: tuple[float, Tensor | None], skip_missing: bool
) -> None:
    """Raises what `accumulate` would of these arguments."""
    _checked_shards(name, tensors, strengths, factor, skip_missing)


def _checked_shards(
    name: str, tensors: list[Tensor], strengths: Strengths, factor: tuple[float, Tensor | None], skip_missing: bool
) -> list[Tensor]:
    try:
        shards = distributed.with_grads(tensors, skip_missing) if distributed.is_sharded(tensors) else tensors
        check_numbers(name, shards, {**strengths.named_tensors(), "scale": factor[1]})
        modes, grads = _grads_of(shards, _WRITE)
        _ops.check_writable(shards, grads, [mode if mode == _ADD else _SKIP for mode in modes])
    except Exception as error:
        raise_explained(name, tensors, error)
    return shards


def check_writable(name: str, tensors: list[Tensor], strengths: Strengths) -> None:
    """Raises what `shrink` would of these arguments."""
    check_closed_form(f"{name}: ", strengths, len(tensors))
    try:
        shards = tensors
        if distributed.is_sharded(tensors):
            distributed.check_distinct(tensors)
            shards = distributed.shards_of(tensors)
            _ops.check_not_in_graph("", tensors)  # the operators see the shards only
        check_numbers(name, shards, strengths.named_tensors())
        _ops.check_writable(shards, (), ())
    except Exception as error:
        raise_explained(name, tensors, error)


def _set_grad(p: Tensor, grad: Tensor) -> None:
    try:
        p.grad = grad
    except RuntimeError:  # the parameter has a `grad_dtype` other than its own: cast, as autograd does
        if p.grad_dtype in (None, grad.dtype):
            raise
        p.grad = grad.to(p.grad_dtype)


def _grads_of(params: list[Tensor], if_missing: int) -> tuple[list[int], list[Tensor]]:
    """What to do with the gradient of each parameter, and those to add to."""
    modes, grads = [], []
    for i, p in enumerate(params):
        if not p.requires_grad:
            modes.append(_SKIP)
        elif not p.is_leaf:
            raise ValueError(f"params[{i}] must be a leaf, as a parameter is, got the result of {p.grad_fn}")
        elif (grad := p.grad) is None:
            modes.append(if_missing)
        else:
            modes.append(_ADD)
            grads.append(grad)
    return modes, grads


@takes_terms
def prox_(
    params: Iterable[Tensor] | Tensor,
    l1: Strength | None = None,
    l2: Strength | None = None,
    *,
    step: Strength,
    **terms: Unpack[Terms[Strength]],
) -> None:
    r"""The proximal operator of ``step * penalty``, in place: it makes weights *exactly* zero.

    .. math::
        w \leftarrow \operatorname*{arg\,min}_x \tfrac12 \lVert x - w \rVert_2^2 + \text{step} \cdot \text{penalty}(x)

    In closed form, with :math:`s_i = \operatorname{sgn}(w_i) \max(0, |w_i| - \text{step}\, l1)` (soft threshold),

    .. math::
        w_i \leftarrow \frac{s_i}{1 + 2\, \text{step}\, l2}
        \max\Big(0, 1 - \frac{\text{step}\, l2\_norm}{\lVert s_g \rVert_2}\Big)

    Proximal gradient descent (ISTA) is a gradient step on the loss alone, then ``prox_`` with the learning rate:
    ``optimizer.step(); prox_(params, l1, step=lr)``. The gradient of L1 in a loss jumps over zero; this stays there.

    Args:
        params: as for :func:`fused_penalty`; all of them are written, whether they require grad or not.
        l1: as for :func:`fused_penalty`: the soft threshold.
        l2: as for :func:`fused_penalty`: shrinks, and makes nothing zero.
        terms: as for :func:`fused_penalty`: {prox}
        step: a finite float >= 0, a 0-dim tensor, or a sequence with one per parameter: the learning rate.

    Raises:
        TypeError: as :func:`fused_penalty`.
        ValueError: as :func:`fused_penalty`; parameters share memory; in grad mode, a tensor is the result of an
            operation, whose graph would not know of the step (a view of a parameter writes to the parameter). Nothing
            has been written then.

    Every element is shrunk, also a row of an embedding that the batch has not touched (``sparse=True``) or whose
    gradient a hook masks. NaN stays NaN, and makes its group NaN under ``l2_norm``.

    Example:
        >>> import torch, fused_reg
        >>> w = torch.tensor([1.0, -2.0, 0.25])
        >>> fused_reg.prox_(w, l1=1.0, l2=0.5, step=0.5)
        >>> w
        tensor([ 0.3333, -1.0000,  0.0000])

    Source: Parikh and Boyd 2014, "Proximal Algorithms", sections 2.2, 6.5.2 and 6.5.4; Yu 2013, "On decomposing the
    proximal map", for the order of the two thresholds.
    """
    name = "prox_"
    tensors = as_list(name, params)
    strengths = as_strengths(name, tensors, l1, l2, terms, as_step(name, step, tensors))
    shrink(name, tensors, strengths)


def shrink(name: str, tensors: list[Tensor], strengths: Strengths) -> None:
    """`prox_` for arguments that have been checked, in the name of a function; the step is among the strengths."""
    if not tensors:
        return
    check_closed_form(f"{name}: ", strengths, len(tensors))
    if is_compiling() or _are_functorch_transforms_active():  # where the operator runs, everything is a leaf
        _ops.check_not_in_graph(f"{name}: ", tensors)
    elif _is_tracing():
        raise_explained(name, tensors, NotImplementedError())
    if distributed.is_sharded(tensors):
        check_writable(name, tensors, strengths)
        try:
            return distributed.prox_(partial(shrink, name), tensors, strengths)
        except Exception as error:
            raise_explained(name, tensors, error)
    try:
        try:
            _ops.prox_(tensors, None, (), *strengths)
        except Exception as error:
            if not by_device.is_mixed(tensors, error):
                raise
            check_values("", strengths.named_tensors())
            by_device.prox_(tensors, strengths)
    except Exception as error:
        if any(isinstance(p, Tensor) and p.is_neg() for p in tensors):
            # The dispatcher writes to no negated view. The operator is odd: it may take the memory behind as it is.
            memory = [torch._neg_view(p) if isinstance(p, Tensor) and p.is_neg() else p for p in tensors]
            return shrink(name, memory, strengths)
        raise_explained(name, tensors, error)
