"""What is to know of an optimizer's step in its hooks: what it is given, and whether it is one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from fused_reg import _devices

Closure: TypeAlias = Callable[..., Any]


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The first argument that can be called, wherever it stands. What else a step is given (a learning rate, options,
    a loss, a model) is its own. The first of ``args`` is the optimizer."""
    given = chain(args[1:], kwargs.values())
    return next((x for x in given if callable(x) and not isinstance(x, Module)), None)


def exchanged(
    args: tuple[Any, ...], kwargs: dict[str, Any], old: Closure, new: Closure
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another closure."""
    return tuple(new if x is old else x for x in args), {k: new if x is old else x for k, x in kwargs.items()}


def with_penalty(objective: Any, penalty: Tensor) -> Any:
    """What a closure returned with the penalty added, of the same kind where its kind adds. What is not one number
    (None, a tuple, a dictionary, many elements) stays as it is."""
    if isinstance(objective, Tensor):
        return objective + penalty.to(objective.device) if objective.numel() == 1 else objective
    if isinstance(objective, bool) or not hasattr(objective, "__float__") or getattr(objective, "size", 1) != 1:
        return objective
    try:
        return objective + float(penalty)
    except TypeError:
        return float(objective) + float(penalty)


def is_inert(optimizer: Optimizer) -> bool:
    """Whether the step is none: no parameter has a gradient, but for zeros with a learning rate of 0 (the step by which
    ``torch.distributed.checkpoint`` makes the state); or a scaler has found an infinity.

    What a GPU alone knows is not waited for: such a step counts as one. Gradients are read only where all rates are 0.
    """
    found_inf = found_infinity(optimizer)
    if found_inf is not None and _devices.is_at_hand(found_inf) and bool(found_inf):
        return True
    if may_change(optimizer):
        return False
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if any(map(_devices.is_captured, grads)):
        return False
    found = ((g._values() if g.is_sparse else g).any() for g in grads)
    # All before the first is looked at: that of a DTensor takes every process, and a GPU is waited for once.
    moved = [f.full_tensor() if hasattr(f, "full_tensor") else f for f in found]
    return not any(map(bool, moved))


def may_change(optimizer: Optimizer, evaluates: bool = False) -> bool:
    """Whether the step may change a parameter, for all that is known without a look at its gradient."""
    for group in optimizer.param_groups:
        rate = group.get("lr")
        if rate != 0 if type(rate) is float else not _is_zero(rate):
            if evaluates:
                return True
            for p in group["params"]:
                if p.grad is not None:
                    return True
    return False


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, Tensor):
        return _devices.is_at_hand(rate) and not bool(rate.any())
    return getattr(rate, "ndim", 0) == 0 and bool(rate == 0)


def found_infinity(optimizer: Optimizer) -> Tensor | None:
    """What ``GradScaler`` leaves to a fused optimizer: not 0 if its step will be skipped."""
    found_inf = optimizer.__dict__.get("found_inf")
    return found_inf.reshape(()) if isinstance(found_inf, Tensor) else None
