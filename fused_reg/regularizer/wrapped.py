"""The optimizer within a wrapper: where `weight_decay` enters, an attached penalty does, too."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer


def innermost(given: Any, wanted: Set[int]) -> Optimizer:
    """The optimizer that steps the wanted parameters (by identity) of what the user gives: itself, or what it wraps.

    It wraps an optimizer if that alone, of those in its attributes, holds every wanted parameter that it holds. One
    that holds others (a shard, copies in float32) is not entered. Raises TypeError, saying what to pass.
    """
    found = _innermost(given, wanted, ()) if _is_like_one(given) else given
    if isinstance(found, Optimizer):
        return found
    raise TypeError(f"attach: optimizer must be a torch.optim.Optimizer, got {_described(given)}")


def _innermost(given: Any, wanted: Set[int], outer: tuple[Any, ...]) -> Any:
    outer = (*outer, given)
    own = held(given) & wanted
    ahead = (x for x in optimizers_in(given).values() if all(x is not known for known in outer))
    inner = [_innermost(x, wanted, outer) for x in ahead]
    inner = [x for x in inner if own <= (theirs := held(x) & wanted) and theirs]
    alone = bool(inner) and all(x is inner[0] for x in inner)
    return inner[0] if alone else given


def optimizers_in(outer: Any) -> dict[str, Any]:
    """The attributes that hold what steps as an optimizer does. Properties are not run. One of torch's own holds none:
    it may refer to its wrapper."""
    is_of_torch = isinstance(outer, Optimizer) and type(outer).__module__.startswith("torch.optim.")
    own = {} if is_of_torch else getattr(outer, "__dict__", {})
    return {name: x for name, x in own.items() if _is_like_one(x) and x is not outer}


def _is_like_one(x: Any) -> bool:
    """Not a module, which has a `zero_grad` too."""
    kind = type(x)
    methods = (getattr(kind, name, None) for name in ("step", "zero_grad"))
    return issubclass(kind, Optimizer) or (not isinstance(x, Module | type) and all(map(callable, methods)))


def held(optimizer: Any) -> set[int]:
    """The identities of its parameters; none of what has no groups."""
    try:
        return {id(p) for group in optimizer.param_groups for p in group["params"]}
    except (AttributeError, KeyError, TypeError):
        return set()


def _described(given: Any) -> str:
    """What was given, and what to give."""
    if isinstance(given, type):
        return f"the class {given.__name__}; pass an instance of it"
    kind = type(given).__name__
    if isinstance(given, list | tuple | dict | set):
        return f"a {kind}; attach to each optimizer by a call of its own"
    several = [
        k
        for k, v in getattr(given, "__dict__", {}).items()
        if isinstance(v, list | tuple) and any(map(_is_like_one, v))
    ]
    if several:
        return f"{kind}; attach to each optimizer in its attribute {several[0]!r}"
    if names := list(optimizers_in(given)):
        return f"{kind}; pass its attribute {' or '.join(map(repr, names))}"
    if callable(getattr(type(given), "step", None)):
        return (
            f"{kind}, which holds none in its attributes; add regularizer() to the loss, or call "
            "regularizer.accumulate_grad_() before its step"
        )
    return kind
