"""CUDA graphs: a call that is captured once and replayed, without Python and without launches by the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

_Result = TypeVar("_Result")

_WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Captured(Generic[_Result]):
    """A captured call. Every replay writes into the memory of the same result."""

    replay: Callable[[], None]
    result: _Result
    bytes: int  # that the capture allocated at its peak


def capture(call: Callable[[], _Result]) -> Captured[_Result]:
    """Warm the call up on a stream of its own, as torch requires, and capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return Captured(graph.replay, result, torch.cuda.max_memory_allocated() - before)
