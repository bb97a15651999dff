"""The GPU: times by events on a device that waits for nothing, and what a call costs besides them."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.devices import Call, Device, Stopwatch
from benchmarks.rows import Costs
from benchmarks.run import Gpu

_WARM_UP_CALLS = 3

# What is read before every sample, in sizes of the L2 cache, so that the call finds nothing of its own there.
_FLUSH = 3

# The device is held while the host submits the call, or its gaps would count as the device's time. The queue takes
# about a thousand launches: a longer hold only moves the wait.
_CYCLES_PER_S = 2e9  # at most; a slower clock holds longer
_HOLD_OF_HOST = 1.5
_HOLD_MORE_S, _HOLD_MOST_S = 20e-6, 5e-3

_TIMER_SAMPLES = 31


class CudaDevice(Device):
    """The current CUDA device.

    Args:
        runtime: `torch.cuda`, or what stands in for it in a test.
        where: the device of the memory that is read to flush the L2 cache.
    """

    name = "cuda"

    def __init__(self, runtime: Any = torch.cuda, where: str = "cuda") -> None:
        self._runtime = runtime
        self._properties = runtime.get_device_properties(runtime.current_device())
        self.l2_bytes: int = self._properties.L2_cache_size
        self._flush = torch.zeros(_FLUSH * self.l2_bytes // 4, device=where)

    def stopwatch(self, call: Call) -> Stopwatch:
        """For a call; runs it."""
        for _ in range(_WARM_UP_CALLS):
            call()
        host = min(self._host_seconds(call) for _ in range(_WARM_UP_CALLS))
        hold = min(_HOLD_OF_HOST * host + _HOLD_MORE_S, _HOLD_MOST_S)
        return Stopwatch(1, partial(self._device_seconds, call, hold), partial(self._host_seconds, call))

    def costs(self, call: Call, host: float | None, capture_bytes: int | None) -> Costs:
        """Counts by the profiler, and the peak of a call; `host` in seconds."""
        launches, copies, fills = self._operations(call)
        peak = self.peak_bytes(call) if capture_bytes is None else capture_bytes
        return Costs(1e6 * (host or 0.0), launches, copies, fills, peak)

    def peak_bytes(self, call: Call) -> int:
        """The most that a call allocates above what is allocated before."""
        self._runtime.synchronize()
        self._runtime.reset_peak_memory_stats()
        before = self._runtime.memory_allocated()
        call()
        self._runtime.synchronize()
        return int(self._runtime.max_memory_allocated() - before)

    def gpu(self) -> Gpu:
        """What it is, and what its timer adds."""
        properties = self._properties
        timer = statistics.median(self._device_seconds(_nothing, _HOLD_MORE_S) for _ in range(_TIMER_SAMPLES))
        return Gpu(
            name=properties.name,
            capability=f"sm_{properties.major}{properties.minor}",
            multiprocessors=properties.multi_processor_count,
            l2_bytes=self.l2_bytes,
            memory_bytes=properties.total_memory,
            driver=_driver(),
            cuda=torch.version.cuda or "unknown",
            timer_us=timer * 1e6,
        )

    def release(self) -> None:
        """Free what nobody refers to, and give it back to the device."""
        super().release()
        self._runtime.empty_cache()

    def _device_seconds(self, call: Call, hold: float) -> float:
        """From the first to the last work of a call on a device that has all of it in its queue, and a cold L2."""
        start, end = (self._runtime.Event(enable_timing=True) for _ in range(2))
        self._flush.sum()  # reads only: dirty lines would be written back during the call
        self._runtime._sleep(int(hold * _CYCLES_PER_S))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def _host_seconds(self, call: Call) -> float:
        """Until a call returns, on a device that has nothing to do."""
        self._runtime.synchronize()
        start = perf_counter()
        call()
        seconds = perf_counter() - start
        self._runtime.synchronize()
        return seconds

    def _operations(self, call: Call) -> tuple[int | None, int | None, int | None]:
        self._runtime.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            call()
            self._runtime.synchronize()
        return counted(
            event.name
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        )


def counted(names: Iterable[str]) -> tuple[int | None, int | None, int | None]:
    """Kernels, copies and fills among the names of what a device did; None, None, None of nothing at all."""
    names = list(names)
    if not names:
        return None, None, None
    copies = sum(name.startswith("Memcpy") for name in names)
    fills = sum(name.startswith("Memset") for name in names)
    return len(names) - copies - fills, copies, fills


def _nothing() -> None:
    pass


def _driver() -> str:
    """The version of the driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown")
