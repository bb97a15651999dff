"""Times contenders side by side: every round runs each of them once, in a new order.

The machine's speed drifts and its memory changes state; what is interleaved meets the same drift.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from benchmarks.checks import Errors
from benchmarks.devices import Device, Stopwatch
from benchmarks.rows import Role

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
    capture_bytes: int | None = None  # that the capture of a CUDA graph allocated, which its replay uses


@dataclass(frozen=True)
class Candidate:
    """A contender that is still to be built, which may fail: to compile, to be captured, to be found."""

    name: str
    role: Role
    build: Callable[[], Contender]
    family: str = ""

    @classmethod
    def of(cls, contender: Contender) -> Candidate:
        """One that is built already."""
        return cls(contender.name, contender.role, lambda: contender, contender.family)

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.name, self.family)))


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
    host: float | None  # until a call returns; None: when it is done


def race(contenders: Sequence[Contender], effort: Effort, device: Device) -> list[Timing]:
    """Time the contenders, in their order. Whoever calls this has verified them."""
    shuffle = random.Random(0).shuffle
    with _no_garbage_collection():
        watches = [device.stopwatch(contender.call) for contender in contenders]
        times: list[list[float]] = [[] for _ in contenders]
        host_times: list[list[float]] = [[] for _ in contenders]
        order = list(range(len(contenders)))
        end = perf_counter() + effort.seconds
        for done in range(effort.rounds):
            if done >= _LEAST_ROUNDS and perf_counter() > end:
                break
            shuffle(order)
            for i in order:
                times[i].append(watches[i].sample())
                if (host := watches[i].host) is not None:
                    host_times[i].append(host())
            gc.collect()
    return [_timing(*one) for one in zip(watches, times, host_times, strict=True)]


def _timing(watch: Stopwatch, samples: Sequence[float], host_samples: Sequence[float]) -> Timing:
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    host = statistics.median(host_samples) if host_samples else None
    return Timing(statistics.median(samples), p20, p80, len(samples), watch.calls, host)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # or the collections between the rounds would look at everything that is imported
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
