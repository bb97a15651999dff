"""The strengths of a `Regularizer`: numbers, tensors, and schedules that fill a tensor step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_reg import _devices
from fused_reg._arguments import as_number, is_known, is_number
from fused_reg._terms import ABSENT, DEFAULTS
from fused_reg.schedules import PatternRamp

#: A strength as a function of the number of optimizer steps taken, like the functions of ``LambdaLR``.
Schedule: TypeAlias = Callable[[int], float]


@dataclass(eq=False)
class Cell:
    """A strength that lives in a 0-dim tensor of the regularizer's own, filled in place when it changes, so that
    compiled code and CUDA graphs see the change. ``schedule`` fills it step by step; without one it stays."""

    value: Tensor
    schedule: Schedule | None = None

    @classmethod
    def holding(cls, value: float, schedule: Schedule | None = None) -> Cell:
        with torch.inference_mode(False):
            return cls(torch.full((), value, dtype=torch.float64, device="cpu"), schedule)

    def move(self, device: torch.device) -> None:
        if self.value.device != device:
            with torch.inference_mode(False):
                self.value = self.value.to(device)


#: A number, a tensor of the user's, or a cell.
Held: TypeAlias = "float | Tensor | Cell"

#: A share from 0 to below 1, a schedule of it, or a pattern: ``"2:4"``, at most 2 of each 4 that follow on one another.
ZeroShare: TypeAlias = "float | Schedule | str"

#: A strength as the user gives it.
Given: TypeAlias = "float | Tensor | Schedule | None"


def checked(kind: str, name: str, strength: Any) -> float | Tensor | Schedule:
    """A strength of some kind as given, checked; ``name`` begins the message of an error."""
    if isinstance(strength, Tensor):
        if strength.ndim != 0:
            hint = "give its `reshape(())`" if strength.numel() == 1 else "for strengths per parameter give rules"
            raise ValueError(
                f"{name} must be a float, a 0-dim tensor or a schedule, got a tensor of shape "
                f"{tuple(strength.shape)}; {hint}"
            )
        if not strength.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {strength.dtype}")
        if is_known(strength):
            as_number(name, strength.item(), kind)
        return strength
    if is_number(strength):
        return as_number(name, strength, kind)
    if isinstance(strength, PatternRamp):
        raise TypeError(f"{name} must be a float, a 0-dim tensor or a schedule, got PatternRamp, which is of zeros")
    if callable(strength):
        if not is_compiling():
            check_signature(name, strength)
        return cast(Schedule, strength)
    hint = "; for strengths per parameter give rules" if isinstance(strength, Sequence) else ""
    raise TypeError(f"{name} must be a float, a 0-dim tensor or a schedule, got {type(strength).__name__}{hint}")


def check_signature(name: str, schedule: Schedule) -> None:
    """A schedule must take the step alone. What Python cannot inspect is seen when it is called."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(0)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a schedule that takes the step as its one argument, got a function of {signature}"
        ) from error


def as_flag(name: str, given: Any) -> None:
    """Raises TypeError where it is no bool: text, also "no", would be true."""
    if not isinstance(given, bool):
        raise TypeError(f"{name} must be True or False, got {given!r}")


def scheduled(kind: str, name: str, schedule: Schedule, step: int) -> float:
    """What the schedule gives for this step, checked."""
    value: Any = schedule(step)
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not is_number(value):
        raise TypeError(f"{name}: the schedule must give a number at step {step}, got {type(value).__name__}")
    return as_number(f"{name}: what the schedule gives at step {step}", value, kind)


@dataclass(frozen=True)
class _Weighted:
    """A schedule whose numbers are multiplied."""

    schedule: Schedule
    weight: float

    def __call__(self, step: int) -> float:
        value: Any = self.schedule(step)
        if is_number(value) or isinstance(value, Tensor):  # others are refused
            value = value * self.weight
        return cast(float, value)


def weighted(name: str, strength: Given, weight: float | None) -> Given:
    """A strength as given, multiplied by the weight of groups, if they have one."""
    if strength is None or weight is None:
        return strength
    if isinstance(strength, Tensor):
        raise ValueError(f"{name} must be a number or a schedule with group_weights, got a tensor")
    return _Weighted(strength, weight) if callable(strength) else strength * weight


def held(kind: str, name: str, strength: Given, step: int) -> Held:
    """How a strength of some kind, as given, is held from now on."""
    if strength is None:
        return DEFAULTS[kind]
    strength = checked(kind, name, strength)
    if isinstance(strength, float | Tensor):
        return strength
    return Cell.holding(scheduled(kind, name, strength, step), strength)


def as_saved(kind: str, name: str, strength: Any) -> float:
    """A strength of a state dict, checked: a number, also in a 0-dim tensor."""
    if (
        isinstance(strength, Tensor)
        and strength.ndim == 0
        and strength.is_floating_point()
        and _devices.has_data(strength)
    ):
        strength = strength.item()
    if not is_number(strength):
        raise ValueError(f"{name} must be a number, got {type(strength).__name__}")
    return as_number(name, strength, kind)


def is_absent(kind: str, strength: Held) -> bool:
    """Whether it is the number that drops its term, 0, or its constraint. A tensor is not looked at."""
    return isinstance(strength, float) and strength == ABSENT[kind]


def is_scheduled(strength: Held) -> bool:
    return isinstance(strength, Cell) and strength.schedule is not None


def tensor_of(strength: Held) -> Tensor | None:
    return strength.value if isinstance(strength, Cell) else strength if isinstance(strength, Tensor) else None


def number(strength: Held) -> float:
    """Its value now. A GPU is waited for if it lives there."""
    tensor = tensor_of(strength)
    return float(tensor.detach()) if tensor is not None else cast(float, strength)


def known(strength: Held) -> float | None:
    """The same, unless a GPU would be waited for, or it has none yet."""
    tensor = tensor_of(strength)
    return number(strength) if tensor is None or is_known(tensor) else None


class Column:
    """One term's strengths for a list of parameters, in the fastest form that the functions take.

    Where the same of them are equal as in ``like``, nothing is copied to the GPU: it would be waited for, and a CUDA
    graph takes no such copy.
    """

    def __init__(self, strengths: Sequence[Held], like: Column | None = None) -> None:
        with torch.inference_mode(False):  # what is kept serves later calls, whatever the mode of the first
            self._prepare(strengths, like)

    def _prepare(self, strengths: Sequence[Held], like: Column | None) -> None:
        distinct = list({identity(s): s for s in strengths}.values())
        self._fixed: float | Tensor | None = None
        self._places: list[int] = []  # of each strength among the distinct ones
        tensors = [t for t in map(tensor_of, distinct) if t is not None]
        if len(distinct) == 1:
            self._fixed = distinct[0] if isinstance(distinct[0], float) else tensors[0]
        elif not tensors:
            self._fixed = torch.tensor([number(s) for s in strengths], dtype=torch.float64, device="cpu")
        else:
            # Gathered at each call, on the device, from the 0-dim tensors as they are then.
            self._device = _devices.joint(tensors)
            self._distinct = [self._as_tensor(s) for s in distinct]
            places = {identity(s): i for i, s in enumerate(distinct)}
            self._places = [places[identity(s)] for s in strengths]
            if like is not None and like._places == self._places and like._device == self._device:
                self._index: Tensor = like._index
            else:
                self._index = torch.tensor(self._places, device=self._device)

    def _as_tensor(self, strength: Held) -> Tensor:
        tensor = tensor_of(strength)
        return torch.full((), number(strength), dtype=torch.float64, device=self._device) if tensor is None else tensor

    @property
    def is_fixed(self) -> bool:
        """Whether `get` gives the same object at every call."""
        return self._fixed is not None

    def get(self) -> float | Tensor:
        if self._fixed is not None:
            return self._fixed
        row = torch.stack([t.to(self._device, torch.float64) for t in self._distinct])
        return row.index_select(0, self._index)


def identity(strength: Held | Given) -> object:
    """Equal for numbers that are equal, and for tensors, cells and schedules that are one."""
    return strength if isinstance(strength, float) or strength is None else (id(strength),)
