"""What differs between devices: how a call is timed, and what else it costs. Here the CPU, in `cuda.py` a GPU."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from benchmarks.rows import Costs
from benchmarks.run import Gpu

Call = Callable[[], object]

_SAMPLE_S = 2e-3  # shorter samples measure the clock and the scheduler
_WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Stopwatch:
    """Times one call, which is warmed up."""

    calls: int  # in a sample
    sample: Callable[[], float]  # seconds of one call, of which a sample takes the mean
    host: Callable[[], float] | None = None  # seconds until a call returns, where it returns before it is done


class Device:
    """The CPU."""

    name = "cpu"

    def stopwatch(self, call: Call) -> Stopwatch:
        """For a call; runs it."""
        for _ in range(_WARM_UP_CALLS):
            call()
        calls = max(1, math.ceil(_SAMPLE_S / _wall_seconds(call, 1)))
        return Stopwatch(calls, partial(_wall_seconds, call, calls))

    def costs(self, call: Call, host: float | None, capture_bytes: int | None) -> Costs | None:
        """What a call costs besides its time, if the device can tell; `host` and `capture_bytes` are known already."""
        return None

    def gpu(self) -> Gpu | None:
        """What it is, if it is one."""
        return None

    def release(self) -> None:
        """Free what nobody refers to."""
        gc.collect()


def _wall_seconds(call: Call, calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls
