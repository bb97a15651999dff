"""How a call is timed on each kind of device, and what else it costs there; and how calls are timed side by side."""

import gc
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]

_SAMPLE_S, _LEAST_ROUNDS, _WARM_UP_CALLS = 2e-3, 5, 3  # shorter samples measure the clock and the scheduler
_FLUSH = 3  # sizes of the L2 cache are read on a GPU before every sample, so that a call finds nothing of its own there

# The GPU is held while the host submits the call, or its gaps would count as the device's time. The queue takes about a
# thousand launches: a longer hold only moves the wait.
_CYCLES_PER_S = 2e9  # at most; a slower clock holds longer
_HOLD_OF_HOST, _HOLD_MORE_S, _HOLD_MOST_S = 1.5, 20e-6, 5e-3

# Of a call that is warmed up: the calls in a sample; what takes one, in seconds of one call; the same of the time until
# the call returns, where it returns before it is done.
Stopwatch = tuple[int, Callable[[], float], Callable[[], float] | None]


def _wall_seconds(call: Call, calls: int = 1) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


class Device:
    """The CPU: what differs between devices."""

    name = "cpu"
    gpu: dict[str, Any] | None = None  # what it is, if it is one

    def stopwatch(self, call: Call) -> Stopwatch:
        _wall_seconds(call, _WARM_UP_CALLS)
        calls = max(1, math.ceil(_SAMPLE_S / _wall_seconds(call)))
        return calls, partial(_wall_seconds, call, calls), None

    def costs(self, call: Call, host_us: float | None, capture_bytes: int | None) -> dict[str, Any] | None:
        """What a call costs besides its time, if the device can tell; the last two are known already."""

    def release(self) -> None:
        gc.collect()


class CudaDevice(Device):
    """The current CUDA device; in a test others stand in for `torch.cuda`, and for where its cache is flushed from."""

    name = "cuda"

    def __init__(self, runtime: Any = torch.cuda, where: str = "cuda") -> None:
        self._runtime, properties = runtime, runtime.get_device_properties(runtime.current_device())
        self.l2_bytes: int = properties.L2_cache_size
        self._flush = torch.zeros(_FLUSH * self.l2_bytes // 4, device=where)
        self.gpu = {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or "unknown",
            # Between two events with nothing between: part of every device time.
            "timer_us": 1e6 * float(np.median([self._device_seconds(lambda: None, _HOLD_MORE_S) for _ in range(31)])),
        }

    def stopwatch(self, call: Call) -> Stopwatch:
        _wall_seconds(call, _WARM_UP_CALLS)
        host = min(self._host_seconds(call) for _ in range(_WARM_UP_CALLS))
        hold = min(_HOLD_OF_HOST * host + _HOLD_MORE_S, _HOLD_MOST_S)
        return 1, partial(self._device_seconds, call, hold), partial(self._host_seconds, call)

    def costs(self, call: Call, host_us: float | None, capture_bytes: int | None) -> dict[str, Any]:
        self._runtime.synchronize()
        self._runtime.reset_peak_memory_stats()
        before = self._runtime.memory_allocated()
        call()
        self._runtime.synchronize()
        peak = self._runtime.max_memory_allocated() - before if capture_bytes is None else capture_bytes
        counts = dict(zip(("launches", "copies", "fills"), self._operations(call), strict=True))
        return {"host_us": host_us, **counts, "peak_bytes": peak}

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
        self._runtime.synchronize()  # nothing is left to do
        seconds = _wall_seconds(call)
        self._runtime.synchronize()
        return seconds

    def _operations(self, call: Call) -> tuple[int | None, int | None, int | None]:
        self._runtime.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            call()
            self._runtime.synchronize()
        events = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
        names = [event.name for event in events if not getattr(event, "is_user_annotation", False)]
        copies, fills = (sum(name.startswith(kind) for name in names) for kind in ("Memcpy", "Memset"))
        return (len(names) - copies - fills, copies, fills) if names else (None, None, None)


def capture(call: Callable[[], Any]) -> tuple[Call, Any, int]:
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


def race(calls: Sequence[Call], rounds: int, seconds: float, device: Device) -> list[dict[str, Any]]:
    """Time the calls side by side: every round runs each of them once, in a new order. The machine's speed drifts and
    its memory changes state; what is interleaved meets the same drift. What they compute has been checked. The times of
    each over the samples, in milliseconds, and of the host until a call returns, None where that is when it is done."""
    rng, timings = random.Random(0), []
    gc.collect()
    gc.freeze()  # or the collections between the rounds would look at everything that is imported
    gc.disable()
    try:
        watches = [device.stopwatch(call) for call in calls]
        samples, of_host = [[] for _ in calls], [[] for _ in calls]
        end = perf_counter() + seconds
        for done in range(rounds if calls else 0):
            if done >= _LEAST_ROUNDS and perf_counter() > end:
                break
            for i in rng.sample(range(len(calls)), len(calls)):
                _, sample, host = watches[i]
                samples[i].append(sample())
                of_host[i] += [host()] if host else []
            gc.collect()
    finally:
        gc.unfreeze()
        gc.enable()
    for (calls_per_sample, *_), times, hosts in zip(watches, samples, of_host, strict=True):
        p20, median, p80 = (np.percentile(times, (20, 50, 80)) * 1e3).tolist()
        timing = {"p20_ms": p20, "median_ms": median, "p80_ms": p80, "samples": len(times)}
        host = float(np.median(hosts)) * 1e6 if hosts else None
        timings.append(timing | {"calls_per_sample": calls_per_sample, "host_us": host})
    return timings
