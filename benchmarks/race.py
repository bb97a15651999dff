"""Times contenders side by side: every round runs each of them once, in a new order.

The machine's speed drifts and its memory changes state; what is interleaved meets the same drift.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from benchmarks.checks import Errors
from benchmarks.rows import Role

_SAMPLE_S = 2e-3  # shorter samples measure the clock and the scheduler
_WARM_UP_CALLS = 2
_LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Contender:
    """Something to time: one call of it, its check, and the bytes that the call must move at least."""

    name: str
    role: Role
    bytes: int
    call: Callable[[], object]
    verify: Callable[[], Errors]  # runs the call, too
    family: str = ""
    is_reference_limit: bool = False
    compile_s: float | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds`, or what fits into `seconds`, but never less than five."""

    rounds: int
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the samples, each the mean of `calls` calls."""

    median: float
    p20: float
    p80: float
    samples: int
    calls: int


def race(contenders: Sequence[Contender], effort: Effort) -> list[Timing]:
    """Time the contenders, in their order. Whoever calls this has verified them."""
    shuffle = random.Random(0).shuffle
    with _no_garbage_collection():
        calls = [_calls_per_sample(c.call) for c in contenders]
        times: list[list[float]] = [[] for _ in contenders]
        order = list(range(len(contenders)))
        end = perf_counter() + effort.seconds
        for done in range(effort.rounds):
            if done >= _LEAST_ROUNDS and perf_counter() > end:
                break
            shuffle(order)
            for i in order:
                times[i].append(_sample(contenders[i].call, calls[i]))
            gc.collect()
    return [_timing(samples, n) for samples, n in zip(times, calls, strict=True)]


def _calls_per_sample(call: Callable[[], object]) -> int:
    for _ in range(_WARM_UP_CALLS):
        call()
    return max(1, math.ceil(_SAMPLE_S / _sample(call, 1)))


def _sample(call: Callable[[], object], calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def _timing(samples: Sequence[float], calls: int) -> Timing:
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), p20, p80, len(samples), calls)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
