"""The closure among the arguments of an optimizer's step, and the objective that it returns."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import Module

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
