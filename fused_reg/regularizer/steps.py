"""What is to know of an optimizer's step in its hooks: how many steps it is part of, and whether it is one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from itertools import dropwhile
from types import CodeType, FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fused_reg import _devices


def depth_of(optimizer: Optimizer, hook: Any) -> int:
    """How many steps of the same optimizer run, of which the innermost called the hook (a subclass goes on to the step
    of its base class), in whichever threads.

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
    return sum(
        _place(frame.f_code) == _place(caller.f_code) and _is_about(frame, optimizer)
        for top in sys._current_frames().values()
        for frame in _up(top)
    )


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


def found_infinity(optimizer: Optimizer) -> Tensor | None:
    """What ``GradScaler`` leaves to a fused optimizer: not 0 if its step will be skipped."""
    found_inf = optimizer.__dict__.get("found_inf")
    return found_inf.reshape(()) if found_inf is not None and isinstance(found_inf, Tensor) else None


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, Tensor):
        return _devices.is_at_hand(rate) and not bool(rate.any())
    return getattr(rate, "ndim", 0) == 0 and bool(rate == 0)
