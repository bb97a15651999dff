"""Schedules of strengths that can be pickled, compared and printed, which functions without a name cannot."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fused_reg._arguments import as_number, is_number


@dataclass(frozen=True)
class Ramp:
    """What the ramps have in common."""

    start: float
    end: float
    steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        function = type(self).__name__
        for name in ("start", "end"):
            given = getattr(self, name)
            if not is_number(given):
                raise TypeError(f"{function}: {name} must be a number, got {type(given).__name__}")
            as_number(f"{function}: {name}", given)
        _check_counts(self)

    def __call__(self, step: int) -> float:
        """The strength after so many steps."""
        share = self._share(min(max(step - self.delay, 0) / self.steps, 1.0))
        return (1 - share) * self.start + share * self.end  # both ends are exact

    def _share(self, x: float) -> float:
        """Of the way from start to end, where x of the steps are taken."""
        raise NotImplementedError


def _check_counts(ramp: Ramp | PatternRamp) -> None:
    for name, least in (("steps", 1), ("delay", 0)):
        given = getattr(ramp, name)
        if type(given) is not int or given < least:
            raise ValueError(f"{type(ramp).__name__}: {name} must be an integer >= {least}, got {given!r}")


class LinearRamp(Ramp):
    r"""A straight line from one strength to another, as a warm-up is: ``LinearRamp(0.0, 1e-4, steps=1000)``.

    .. math:: s(t) = (1 - x)\, \text{start} + x\, \text{end}, \qquad
        x = \min\Big( \frac{\max(t - \text{delay},\, 0)}{\text{steps}},\, 1 \Big)

    for the number t of optimizer steps taken. Any callable of the step is a schedule; this one can be pickled with its
    :class:`fused_reg.Regularizer` (``torch.save``, ``copy.deepcopy``, processes that are spawned), is equal to one with
    the same numbers, and says them in ``print``.

    Args:
        start: the strength up to step ``delay``: a finite float >= 0.
        end: the strength from step ``delay + steps`` on, likewise.
        steps: how many optimizer steps lead from one to the other: an integer >= 1.
        delay: how many steps come before: an integer >= 0.

    Raises:
        TypeError: ``start`` or ``end`` is no number.
        ValueError: one is negative, infinite or NaN; ``steps`` or ``delay`` is no such integer.

    Example:
        >>> import torch
        >>> from fused_reg import Regularizer
        >>> from fused_reg.schedules import LinearRamp
        >>> warm_up = LinearRamp(0.0, 0.5, steps=10)
        >>> regularizer = Regularizer([torch.nn.Parameter(torch.ones(3))], l1=warm_up)
        >>> regularizer.step = 4
        >>> regularizer()  # 0.2 * 3
        tensor(0.6000, grad_fn=<...>)

    Source: the linear warm-up of Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2, for strengths.
    """

    def _share(self, x: float) -> float:
        return x


class CosineRamp(Ramp):
    r"""Half a cosine from one strength to another: slow at both ends.

    .. math:: s(t) = \text{end} + (\text{start} - \text{end})\, \frac{1 + \cos(\pi x)}{2}

    with the x of :class:`LinearRamp`. Up or down, as ``CosineAnnealingLR`` does for learning rates.

    Args:
        start: as of :class:`LinearRamp`, and so are the others.
        end: likewise.
        steps: likewise.
        delay: likewise.

    Raises:
        TypeError: as of :class:`LinearRamp`.
        ValueError: likewise.

    Example:
        >>> from fused_reg.schedules import CosineRamp
        >>> schedule = CosineRamp(4.0, 0.0, steps=10, delay=2)
        >>> [round(schedule(step), 3) for step in (0, 2, 7, 12, 100)]
        [4.0, 4.0, 2.0, 0.0, 0.0]
        >>> schedule
        CosineRamp(start=4.0, end=0.0, steps=10, delay=2)

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5.
    """

    def _share(self, x: float) -> float:
        return (1 - math.cos(math.pi * x)) / 2


class CubicRamp(Ramp):
    r"""Fast at first, and slower the nearer it comes: for a share of zeros, ``CubicRamp(0.0, 0.8, steps=1000)``.

    .. math:: s(t) = \text{end} + (\text{start} - \text{end})\, (1 - x)^3

    with the x of :class:`LinearRamp`. As ``zeros`` of a :class:`fused_reg.Regularizer` it prunes most while many
    weights are of little use, and leaves time for the last ones.

    Args:
        start: as of :class:`LinearRamp`, and so are the others.
        end: likewise.
        steps: likewise.
        delay: likewise.

    Raises:
        TypeError: as of :class:`LinearRamp`.
        ValueError: likewise.

    Example:
        >>> from fused_reg.schedules import CubicRamp
        >>> ramp = CubicRamp(0.0, 0.8, steps=4, delay=10)
        >>> [round(ramp(step), 4) for step in (0, 10, 11, 12, 13, 14, 100)]
        [0.0, 0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]

    Source: Zhu and Gupta 2017, "To prune, or not to prune", equation 1.
    """

    def _share(self, x: float) -> float:
        return 1 - (1 - x) ** 3


@dataclass(frozen=True)
class PatternRamp:
    r"""A pattern of zeros that comes gradually: ``zeros=PatternRamp("2:4", steps=1000)`` of a
    :class:`fused_reg.Regularizer`.

    Called with a step, it gives the share that is zero by then of what the pattern leaves out: from 0 to 1, as
    :class:`CubicRamp` goes.

    Args:
        pattern: ``"n:m"``, at most n of each m elements that follow on one another in a row are other than zero.
        steps: how many optimizer steps it takes: an integer >= 1.
        delay: how many steps come before: an integer >= 0.

    Raises:
        TypeError: ``pattern`` is no string.
        ValueError: it is none of that kind; ``steps`` or ``delay`` is no such integer.

    Example:
        >>> from fused_reg.schedules import PatternRamp
        >>> ramp = PatternRamp("2:4", steps=2)
        >>> [ramp(step) for step in (0, 1, 2, 3)]
        [0.0, 0.875, 1.0, 1.0]

    Source: as of :class:`CubicRamp`; Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks", for 2:4.
    """

    pattern: str
    steps: int
    delay: int = 0

    def __post_init__(self) -> None:
        parsed_pattern("PatternRamp: pattern", self.pattern)
        _check_counts(self)

    def __call__(self, step: int) -> float:
        """The share after so many steps."""
        return CubicRamp(0.0, 1.0, self.steps, self.delay)(step)


def parsed_pattern(name: str, pattern: str) -> tuple[int, int]:
    """Its two numbers, checked; ``name`` begins the message of an error."""
    if not isinstance(pattern, str):
        raise TypeError(f'{name} must be a string as "2:4", got {type(pattern).__name__}')
    found = re.fullmatch(r"(\d{1,2}):(\d{1,2})", pattern, re.ASCII)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 1 <= n < m <= 64:
        raise ValueError(f'{name} must be "n:m" with 1 <= n < m <= 64, as "2:4", got {pattern!r}')
    return n, m
