"""Nothing grows faster than the list: the instructions of Python and the memory of a call, counted, of lists of which
each is twice as long as the one before. The times are in the benchmarks."""

import sys
import tracemalloc
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("rich")

from benchmarks.growth import AXES, TERMS, WORKS, with_grad
from fused_reg import Regularizer


def attached(params, strengths):
    optimizer = torch.optim.SGD(with_grad(params), lr=1e-9)
    Regularizer(params, **strengths).attach(optimizer)
    return optimizer.step


EVERY = WORKS | {
    "Regularizer": lambda params, strengths: partial(Regularizer, params, **strengths),
    "report": lambda params, strengths: Regularizer(params, **strengths).report,
    "attached": attached,
}
SIZES = {"tensors": (32, 64, 128), "elements": (4000, 8000, 16_000)}
FASTER = 3  # times as much, at most, as half of these add: in proportion it is 2, of the square 4
LEAST = (100, 1024)  # instructions and bytes, of which it does not matter


def instructions(call) -> int:
    """Of Python, within the call."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def peak_bytes(call) -> int:
    """Of Python's objects, and of tensors."""
    tracemalloc.start()
    try:
        call()
        _, objects = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return objects + peak


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("work", "terms"), [(w, t) for w in EVERY for t in TERMS if w != "AdamW step" or not t])
def test_a_call_grows_with_the_list(work, terms, axis):
    counts = []
    for n in SIZES[axis]:
        shape = (8, 8) if axis == "tensors" else (n // 40, 40)
        params = [torch.full(shape, 0.05, requires_grad=True) for _ in range(n if axis == "tensors" else 1)]
        call = EVERY[work](params, TERMS[terms])
        call()
        counts.append((instructions(call), peak_bytes(call)))
    for least, few, more, most in zip(LEAST, *counts, strict=True):
        assert most - more <= FASTER * max(more - few, least)
