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
    if not is_compiling():
        if _transforms_active():  # where the operator runs, everything is a leaf
            _ops.check_not_in_graph("", params)
        if _have_negated(_ops.survey(params), params):  # the dispatcher writes to no such view; the step is odd
            params = [torch._neg_view(p) if p.is_neg() else p for p in params]
    _ops.prox_(params, None, (), *strengths)


def accumulate_grad_(
    params: list[Tensor], strengths: Strengths, factor: tuple[float, Tensor | None], skip_missing: bool
) -> Tensor:
    """The penalty, whose gradient has been added to ``.grad``; ``skip_missing``: where that is None, none is."""
    modes, grads = grads_of(params, SKIP if skip_missing else WRITE)
    are_negated = check_dense(params, grads)
    own = [g.resolve_neg() for g in grads] if are_negated else grads  # the dispatcher writes to no such view
    missing = [p for p, mode in zip(params, modes, strict=True) if mode == WRITE] if WRITE in modes else []
    fresh: list[Tensor] = _ops.empty_grads(missing) if missing else []
    if missing:
        by_mode = {ADD: iter(own), WRITE: iter(fresh)}
        written = [next(by_mode[mode]) for mode in modes if mode != SKIP]
    else:
        written = own
    value = _ops.accumulate_grad_(params, written, modes, *factor, *strengths)
    if are_negated:
        with torch.no_grad():
            for grad, result in zip(grads, own, strict=True):
                if grad.is_neg():
                    grad.copy_(result)
    for p, grad in zip(missing, fresh, strict=True):
        _set_grad(p, grad)
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


def check_dense(params: Sequence[Tensor], grads: list[Tensor]) -> bool:
    """Raises where a gradient of these parameters is sparse; returns whether one is a negated view."""
    found = 0 if is_compiling() else _ops.survey(grads)
    for i, p in enumerate(params if found & _ops.UNUSUAL else ()):
        if p.requires_grad and p.grad is not None and p.grad.layout is not torch.strided:
            raise TypeError(
                f"params[{i}].grad must be dense (torch.strided), got {p.grad.layout}; "
                "build the embedding with sparse=False, or use p.grad = p.grad.to_dense()"
            )
    return _have_negated(found, grads)


def _have_negated(found: int, tensors: list[Tensor]) -> bool:
    return found & (_ops.NEGATED | _ops.UNUSUAL) != 0 and any(t.is_neg() for t in tensors)


def _set_grad(p: Tensor, grad: Tensor) -> None:
    try:
        p.grad = grad
    except RuntimeError:  # the parameter has a `grad_dtype` other than its own: cast, as autograd does
        if p.grad_dtype in (None, grad.dtype):
            raise
        p.grad = grad.to(p.grad_dtype)
