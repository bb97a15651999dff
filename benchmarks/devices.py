"""How a call is timed on each kind of device, and what else it costs there; and how calls are timed side by side."""

import gc
import math
import random
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]
_Result = TypeVar("_Result")

_SAMPLE_S = 2e-3  # shorter samples measure the clock and the scheduler
_LEAST_ROUNDS, _WARM_UP_CALLS = 5, 3

# What is read on a GPU before every sample, in sizes of the L2 cache, so that the call finds nothing of its own there.
_FLUSH = 3

# The GPU is held while the host submits the call, or its gaps would count as the device's time. The queue takes about a
# thousand launches: a longer hold only moves the wait.
_CYCLES_PER_S = 2e9  # at most; a slower clock holds longer
_HOLD_OF_HOST, _HOLD_MORE_S, _HOLD_MOST_S = 1.5, 20e-6, 5e-3


class Stopwatch(NamedTuple):
    """Times one call, which is warmed up."""

    calls: int  # in a sample
    sample: Callable[[], float]  # seconds of one call, of which a sample takes the mean
    host: Callable[[], float] | None = None  # seconds until a call returns, where it returns before it is done


def _wall_seconds(call: Call, calls: int = 1) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


class Device:
    """The CPU: what differs between devices."""

    name = "cpu"

    def stopwatch(self, call: Call) -> Stopwatch:
        _wall_seconds(call, _WARM_UP_CALLS)
        calls = max(1, math.ceil(_SAMPLE_S / _wall_seconds(call)))
        return Stopwatch(calls, partial(_wall_seconds, call, calls))

    def costs(self, call: Call, host_us: float | None, capture_bytes: int | None) -> dict[str, Any] | None:
        """What a call costs besides its time, if the device can tell; the last two are known already."""

    def gpu(self) -> dict[str, Any] | None:
        """What it is, if it is one."""

    def release(self) -> None:
        """Free what nobody refers to."""
        gc.collect()


class CudaDevice(Device):
    """The current CUDA device; in a test others stand in for `torch.cuda`, and for where its cache is flushed from."""

    name = "cuda"

    def __init__(self, runtime: Any = torch.cuda, where: str = "cuda") -> None:
        self._runtime = runtime
        self._properties = runtime.get_device_properties(runtime.current_device())
        self.l2_bytes: int = self._properties.L2_cache_size
        self._flush = torch.zeros(_FLUSH * self.l2_bytes // 4, device=where)

    def stopwatch(self, call: Call) -> Stopwatch:
        _wall_seconds(call, _WARM_UP_CALLS)
        host = min(self._host_seconds(call) for _ in range(_WARM_UP_CALLS))
        hold = min(_HOLD_OF_HOST * host + _HOLD_MORE_S, _HOLD_MOST_S)
        return Stopwatch(1, partial(self._device_seconds, call, hold), partial(self._host_seconds, call))

    def costs(self, call: Call, host_us: float | None, capture_bytes: int | None) -> dict[str, Any]:
        counts = dict(zip(("launches", "copies", "fills"), self._operations(call), strict=True))
        peak = self._peak_bytes(call) if capture_bytes is None else capture_bytes
        return {"host_us": host_us, **counts, "peak_bytes": peak}

    def gpu(self) -> dict[str, Any]:
        properties = self._properties
        return {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": properties.total_memory,
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "cuda": torch.version.cuda or "unknown",
            # Between two events with nothing between: part of every device time.
            "timer_us": 1e6 * float(np.median([self._device_seconds(lambda: None, _HOLD_MORE_S) for _ in range(31)])),
        }

    def release(self) -> None:
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
        seconds = _wall_seconds(call)
        self._runtime.synchronize()
        return seconds

    def _peak_bytes(self, call: Call) -> int:
        """The most that a call allocates above what is allocated before."""
        self._runtime.synchronize()
        self._runtime.reset_peak_memory_stats()
        before = self._runtime.memory_allocated()
        call()
        self._runtime.synchronize()
        return int(self._runtime.max_memory_allocated() - before)

    def _operations(self, call: Call) -> tuple[int | None, int | None, int | None]:
        self._runtime.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            call()
            self._runtime.synchronize()
        events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
        names = [event.name for event in events if not getattr(event, "is_user_annotation", False)]
        copies, fills = (sum(name.startswith(kind) for name in names) for kind in ("Memcpy", "Memset"))
        return (len(names) - copies - fills, copies, fills) if names else (None, None, None)


def output_of(*command: str, **options: Any) -> str:
    """What a program prints; nothing if it cannot be run or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def capture(call: Callable[[], _Result]) -> tuple[Call, _Result, int]:
    """A CUDA graph of the call: its replay, without Python and without launches by the host; the result, into whose
    memory every replay writes; the bytes that the capture allocated at its peak."""
    stream = torch.cuda.Stream()  # torch wants the warm-up on one of its own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _wall_seconds(call, _WARM_UP_CALLS)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result, torch.cuda.max_memory_allocated() - before


class Timing(NamedTuple):
    """A call's times over the samples, each the mean of several calls."""

    p20_ms: float
    median_ms: float
    p80_ms: float
    samples: int
    calls_per_sample: int
    host_us: float | None  # until a call returns; None: when it is done


def race(calls: Sequence[Call], rounds: int, seconds: float, device: Device) -> list[Timing]:
    """Time the calls side by side: every round runs each of them once, in a new order. The machine's speed drifts and
    its memory changes state; what is interleaved meets the same drift. What they compute has been checked."""
    rng, was_enabled = random.Random(0), gc.isenabled()
    gc.collect()
    gc.freeze()  # or the collections between the rounds would look at everything that is imported
    gc.disable()
    try:
        watches = [device.stopwatch(call) for call in calls]
        samples: list[list[float]] = [[] for _ in calls]
        of_host: list[list[float]] = [[] for _ in calls]
        end = perf_counter() + seconds
        for done in range(rounds):
            if done >= _LEAST_ROUNDS and perf_counter() > end:
                break
            for i in rng.sample(range(len(calls)), len(calls)):
                samples[i].append(watches[i].sample())
                if host := watches[i].host:
                    of_host[i].append(host())
            gc.collect()
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    timings = []
    for watch, times, hosts in zip(watches, samples, of_host, strict=True):
        host = float(np.median(hosts)) * 1e6 if hosts else None
        timings.append(Timing(*(np.percentile(times, (20, 50, 80)) * 1e3).tolist(), len(times), watch.calls, host))
    return timings
