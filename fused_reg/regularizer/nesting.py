"""Steps within steps of one optimizer: a subclass calls the step of its base class, where `weight_decay` enters."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from fused_reg import _devices
from fused_reg.regularizer.steps import depth_of
from fused_reg.regularizer.watch import is_same, sample

_State: TypeAlias = "tuple[int, Tensor | None]"
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class Nesting:
    """How deep a step is within steps of the same optimizer. Every step calls the hooks.

    ``levels``: the depth at which a penalty enters, found in the code of the classes.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.levels = _hook_steps(optimizer)
        kind = type(optimizer)
        self._is_single = kind.__module__.startswith("torch.") and "step" not in vars(optimizer)
        self._is_single &= len(list(_steps_of(kind))) == 1
        self.depth = 0
        self._deepest = 0
        self._has_entered = False
        self._before: list[_State] = []  # the parameters
        self._penalized: tuple[weakref.ref[Tensor], int] | None = None  # a gradient that has the penalty

    def enter(self, optimizer: Optimizer, hook: Any, params: Iterable[Tensor]) -> int:
        if self.depth == 0 or (depth := depth_of(optimizer, hook)) == 1:
            self.depth = self._deepest = 1
            self._penalized = None
            if self.levels > 1:
                self._before = self._states(params)
        else:
            self.depth, self._deepest = depth, max(depth, self._deepest)
            if depth > self.levels and not self.has_penalty(params):
                self.levels = depth  # what is around this step rewrites gradients, which was not found in its code
        self._has_entered |= self.depth == self.levels
        return self.depth

    def leave(self, optimizer: Optimizer, hook: Any) -> int:
        depth = self.depth if self.depth < 2 else depth_of(optimizer, hook)
        self.depth = depth - 1
        if depth == 1:
            self._penalized = None  # torch cannot swap a tensor that has a weak reference
        return depth

    def added(self, params: Iterable[Tensor]) -> None:
        """The penalty, to their gradients. A single step is in no other one."""
        if self._is_single:
            return
        grad = next((p.grad for p in params if p.grad is not None), None)
        self._penalized = None if grad is None else (weakref.ref(grad), grad._version)

    def has_penalty(self, params: Iterable[Tensor]) -> bool:
        """Whether their gradients have it already, from an earlier step within the same one."""
        if self._penalized is None:
            return False
        ref, version = self._penalized
        grad = next((p.grad for p in params if p.grad is not None), None)
        return grad is not None and ref() is grad and grad._version == version

    def has_lost(self, params: Iterable[Tensor]) -> bool:
        """Whether their gradients had it, and are others by now."""
        return self._penalized is not None and not self.has_penalty(params)

    def has_missed(self, params: Iterable[Tensor]) -> bool:
        """Whether the step that ends, and is in no other one, changed the parameters without one that is as deep as was
        found in the code. If there was never one, the penalty enters less deep from now on."""
        if self._deepest >= self.levels or all(map(_is_same, self._states(params), self._before)):
            return False
        if not self._has_entered:
            self.levels = self._deepest
        return True

    def _states(self, params: Iterable[Tensor]) -> list[_State]:
        """Versions, and a few elements as long as the code is not proved by a step: not every change is counted."""
        return [(p._version, None if self._has_entered or not _devices.is_at_hand(p) else sample(p)) for p in params]


def _is_same(a: _State, b: _State) -> bool:
    return a[0] == b[0] and (a[1] is None or b[1] is None or is_same(a[1], b[1]))


def _hook_steps(optimizer: Any) -> int:
    """Makes each step call the hooks: torch does it for the class of an instance alone, in an initializer that not
    every class calls. Returns how many steps run one within the other."""
    for name in _HOOKS:
        if name not in vars(optimizer):
            setattr(optimizer, name, OrderedDict())
    levels = 0
    own = list(_steps_of(type(optimizer)))
    mro: Any = type(optimizer).__mro__
    for i, (place, step) in enumerate(own):
        if issubclass(mro[place], Optimizer):
            levels += 1
            if not getattr(step, "hooked", False):
                mro[place].step = _hooked(step)
        if i + 1 == len(own) or not _calls(mro[place : (following := own[i + 1][0])], mro[following]):
            break
    step = vars(optimizer).get("step")
    if step is None or any(getattr(f, "hooked", False) for f in _within(step)):
        return max(1, levels)
    # A scheduler has put it around the step of the class before that called the hooks.
    call, ref = _hooked(lambda self, *args, **kwargs: step(*args, **kwargs)), weakref.ref(optimizer)
    optimizer.step = functools.wraps(step)(lambda *args, **kwargs: call(ref(), *args, **kwargs))
    # It is in the place of the outermost step; a mixin's, which is no optimizer's, was not counted.
    return max(1, levels + (len(own) > 0 and not issubclass(mro[own[0][0]], Optimizer)))


def _hooked(step: Any) -> Any:
    """A step that calls the hooks, but for an optimizer that has none, of a class whose steps did not call them."""
    with_hooks = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (with_hooks if _HOOKS[0] in self.__dict__ else step)(self, *args, **kwargs)

    hooked: Any = call
    hooked.hooked = True
    return hooked


def _steps_of(kind: type) -> Iterator[tuple[int, Any]]:
    """The steps that the class and its bases define, each once, with their places in the order of resolution."""
    found: list[Any] = []
    for place, owner in enumerate(kind.__mro__):
        step = vars(owner).get("step")
        if owner is not Optimizer and inspect.isfunction(step) and (plain := inspect.unwrap(step)) not in found:
            found.append(plain)
            yield place, step


def _calls(owners: tuple[type, ...], base: type) -> bool:
    """Whether a function of these classes, or one that it names, has the step of the base class, or names that of the
    base class or of what `super` finds: by whatever name it has the class."""
    step = inspect.unwrap(vars(base)["step"])
    ahead = [g for owner in owners for f in vars(owner).values() for g in _within(f)]
    seen: set[FunctionType] = set()
    while ahead:
        f = ahead.pop()
        if f is step:
            return True
        if f in seen:
            continue
        seen.add(f)
        names = {name for code in _codes(f.__code__) for name in (*code.co_names, *code.co_freevars)}
        named = [*_closure(f), *(f.__globals__[name] for name in names & f.__globals__.keys())]
        if "step" in names and ("super" in names or base.__name__ in names or any(x is base for x in named)):
            return True
        ahead += [g for x in named if isinstance(x, FunctionType) and x.__module__ == f.__module__ for g in _within(x)]
    return False


def _within(function: Any) -> list[FunctionType]:
    """The functions that are in it: wrapped, bound, or in its closure."""
    found: list[FunctionType] = []
    ahead = [function]
    while ahead:
        f = ahead.pop()
        if isinstance(f, MethodType | staticmethod | classmethod):
            ahead.append(f.__func__)
        elif isinstance(f, functools.partial):
            ahead.append(f.func)
        elif isinstance(f, FunctionType) and f not in found:
            found.append(f)
            ahead += [vars(f).get("__wrapped__"), *_closure(f)]
    return found


def _closure(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing is in it yet
            yield cell.cell_contents


def _codes(code: CodeType) -> Iterator[CodeType]:
    """With those of the functions that it defines."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
