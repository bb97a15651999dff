"""What the functions outside of autograd do with a list on one device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as _transforms_active
from torch.compiler import is_compiling

from fused_reg import _ops
from fused_reg._terms import Strengths

#: What the operator does with the gradient of a parameter: nothing, write it, add to it.
SKIP, WRITE, ADD = 0, 1, 2


def value_and_grad(params: list[Tensor], strengths: Strengths) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and the gradient of each parameter."""
    with torch.no_grad():
        value, grads, _ = _ops.penalty(params, [True] * len(params), *strengths)
    return value, tuple(grads)


def prox_(params: list[Tensor], strengths: Strengths) -> None:
    """The proximal step."""
    if _transforms_active() and not is_compiling():  # where the operator runs, everything is a leaf
        _ops.check_not_in_graph("", params)
    _ops.prox_(params, None, (), *strengths)


def accumulate_grad_(
    params: list[Tensor], strengths: Strengths, factor: tuple[float, Tensor | None], skip_missing: bool
) -> Tensor:
    """The penalty, whose gradient has been added to ``.grad``; ``skip_missing``: where that is None, none is."""
    modes, grads = grads_of(params, SKIP if skip_missing else WRITE)
    missing = [p for p, mode in zip(params, modes, strict=True) if mode == WRITE] if WRITE in modes else []
    fresh: list[Tensor] = []
    if missing:
        fresh = _ops.empty_grads(missing)
        by_mode = {ADD: iter(grads), WRITE: iter(fresh)}
        grads = [next(by_mode[mode]) for mode in modes if mode != SKIP]
    value = _ops.accumulate_grad_(params, grads, modes, *factor, *strengths)
    for p, grad in zip(missing, fresh, strict=True):
        set_grad(p, grad)
    return value


def grads_of(params: Sequence[Tensor], if_missing: int) -> tuple[list[int], list[Tensor]]:
    """What to do with the gradient of each parameter, and those to add to."""
    modes, grads = [], []
    for i, p in enumerate(params):
        if not p.requires_grad:
            modes.append(SKIP)
        elif not p.is_leaf:
            raise ValueError(f"params[{i}] must be a leaf, as a parameter is, got the result of {p.grad_fn}")
        elif (grad := p.grad) is None:
            modes.append(if_missing)
        else:
            modes.append(ADD)
            grads.append(grad)
    return modes, grads


def set_grad(p: Tensor, grad: Tensor) -> None:
    try:
        p.grad = grad
    except RuntimeError:  # the parameter has a `grad_dtype` other than its own: cast, as autograd does
        if p.grad_dtype in (None, grad.dtype):
            raise
        p.grad = grad.to(p.grad_dtype)
