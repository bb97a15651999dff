"""Steps within steps of one optimizer: a subclass calls the step of its base class, where `weight_decay` enters."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from itertools import dropwhile
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any, TypeAlias

from torch import Tensor
from torch.optim import Optimizer

from fused_reg import _devices
from fused_reg.regularizer.strays import is_same, sample

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
        self._penalized: tuple[Tensor, int] | None = None  # a gradient that has the penalty, and its version

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
            self._penalized = None
        return depth

    def added(self, params: Iterable[Tensor]) -> None:
        """The penalty, to their gradients. A single step is in no other one."""
        if not self._is_single:
            self._penalized = _first_grad(params)

    def has_penalty(self, params: Iterable[Tensor]) -> bool:
        """Whether their gradients have it already, from an earlier step within the same one."""
        if self._penalized is None:
            return False
        grad = _first_grad(params)
        return grad is not None and grad[0] is self._penalized[0] and grad[1] == self._penalized[1]

    def has_lost(self, params: Iterable[Tensor]) -> bool:
        """Whether their gradients had it, and are others by now."""
        return self._penalized is not None and not self.has_penalty(params)

    def has_missed(self, params: Iterable[Tensor]) -> bool:
        """Whether the step that ends, and is in no other one, changed the parameters without one that is as deep as was
        found in the code. If there was never one, the penalty enters less deep from now on."""
        if self._deepest >= self.levels or all(map(_are_same, self._states(params), self._before)):
            return False
        if not self._has_entered:
            self.levels = self._deepest
        return True

    def _states(self, params: Iterable[Tensor]) -> list[_State]:
        """Versions, and a few elements as long as the code is not proved by a step: not every change is counted."""
        return [(p._version, None if self._has_entered or not _devices.is_at_hand(p) else sample(p)) for p in params]


def _first_grad(params: Iterable[Tensor]) -> tuple[Tensor, int] | None:
    """With its version."""
    return next(((grad, grad._version) for p in params if (grad := p.grad) is not None), None)


def _are_same(a: _State, b: _State) -> bool:
    return a[0] == b[0] and (a[1] is None or b[1] is None or is_same(a[1], b[1]))


def depth_of(optimizer: Optimizer, hook: Any) -> int:
    """How many steps of the same optimizer run, of which the innermost called the hook, in whichever threads.

    Counting cannot tell, because a step that raises leaves without its second hook. But what called the hook is running
    as often for this optimizer.
    """
    own = {_place(hook.__code__), _place(inspect.unwrap(hook).__code__)}
    above = dropwhile(lambda frame: _place(frame.f_code) not in own, _up(sys._getframe()))
    caller = next((frame for frame in above if _place(frame.f_code) not in own), None)
    if caller is None or not _is_about(caller, optimizer):
        raise RuntimeError(
            "attach: torch must call the hooks of a step from a function that has the optimizer, but this one does not"
        )
    frames = (frame for top in sys._current_frames().values() for frame in _up(top))
    return sum(_place(frame.f_code) == _place(caller.f_code) and _is_about(frame, optimizer) for frame in frames)


def _up(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _place(code: CodeType) -> tuple[str, int]:
    """Where the function stands, which is the same of what a compiler makes of it."""
    return code.co_filename, code.co_firstlineno


def _is_about(frame: FrameType, optimizer: Optimizer) -> bool:
    values = frame.f_locals.values()
    return any(v is optimizer or (isinstance(v, tuple) and len(v) > 0 and v[0] is optimizer) for v in values)


def _hook_steps(optimizer: Any) -> int:
    """Makes each step call the hooks: torch does it for the class of an instance alone, in an initializer that not
    every class calls. Returns how many steps run one within the other."""
    for name in _HOOKS:
        vars(optimizer).setdefault(name, OrderedDict())
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
    if step is None or any(getattr(f, "hooked", False) for f, _ in _functions([step])):
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
    for f, named in _functions([f for owner in owners for f in vars(owner).values()]):
        by_name = "step" in named and ("super" in named or base.__name__ in named)
        if f is step or by_name or ("step" in named and any(x is base for x in named.values())):
            return True
    return False


def _functions(ahead: list[Any]) -> Iterator[tuple[FunctionType, dict[str, Any]]]:
    """The functions that are in these (wrapped, bound, or in a closure), and those of their modules that they name;
    each with what it names, by the names."""
    seen: set[FunctionType] = set()
    while ahead:
        f = ahead.pop()
        if isinstance(f, MethodType | staticmethod | classmethod):
            ahead.append(f.__func__)
        elif isinstance(f, functools.partial):
            ahead.append(f.func)
        elif isinstance(f, FunctionType) and f not in seen:
            seen.add(f)
            names = {name for code in _codes(f.__code__) for name in (*code.co_names, *code.co_freevars)}
            named = {name: f.__globals__.get(name) for name in names}
            own: list[Any] = [x for x in named.values() if isinstance(x, FunctionType) and x.__module__ == f.__module__]
            for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
                with contextlib.suppress(ValueError):  # nothing is in it yet
                    named[name] = cell.cell_contents
                    own.append(named[name])
            ahead += [vars(f).get("__wrapped__"), *own]
            yield f, named


def _codes(code: CodeType) -> Iterator[CodeType]:
    """With those of the functions that it defines."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)
