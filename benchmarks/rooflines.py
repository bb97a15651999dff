"""The bandwidth of a GPU, on memory of which its L2 cache holds next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from benchmarks.checks import Errors
from benchmarks.devices import Device
from benchmarks.race import Contender, Effort, race
from benchmarks.rows import PASSES, Mode, Roofline, Row

READ, COPY, UPDATE = "read: x.sum()", "copy: y.copy_(x)", "read-modify-write: y.add_(x)"
SCALE = "scale: x.mul_(a)"

#: The modes that each bounds.
_BOUNDED: dict[str, list[Mode]] = {
    READ: ["value", "norm_value"],
    COPY: ["value_and_grad", "fresh"],
    UPDATE: ["present", "norm_fresh"],
    SCALE: ["prox"],
}

_LEAST_BYTES = 1 << 30
_L2_CACHES = 16

_FACTOR = 1 - 1e-7

_EFFORT = Effort(rounds=30, seconds=5.0)


def roofline_bytes(l2_bytes: int) -> int:
    """Of each tensor of the measurement."""
    return max(_LEAST_BYTES, _L2_CACHES * l2_bytes)


def measure_rooflines(device: Device, tensor_bytes: int, effort: Effort = _EFFORT) -> list[Roofline]:
    """Race them against each other."""
    x = torch.rand(tensor_bytes // 4, device=device.name)
    y = torch.zeros_like(x)
    calls: dict[str, Callable[[], object]] = {
        READ: x.sum,
        COPY: lambda: y.copy_(x),
        UPDATE: lambda: y.add_(x),
        SCALE: lambda: x.mul_(_FACTOR),
    }
    contenders = [
        Contender(name, "limit", PASSES[_BOUNDED[name][0]] * x.nbytes, call, Errors) for name, call in calls.items()
    ]
    timings = race(contenders, effort, device)
    return [
        Roofline(c.name, _BOUNDED[c.name], c.bytes, t.median * 1e6, c.bytes / t.median / 1e9)
        for c, t in zip(contenders, timings, strict=True)
    ]


def with_percents(rows: Sequence[Row], rooflines: Sequence[Roofline]) -> list[Row]:
    """The rows, each with its percentage of the roofline that bounds its mode, where there is one."""
    bandwidths = {mode: roofline.gb_per_s for roofline in rooflines for mode in roofline.modes}
    return [
        replace(row, costs=replace(row.costs, percent_of_roofline=100 * row.gb_per_s / bandwidths[row.mode]))
        if row.costs and row.mode in bandwidths
        else row
        for row in rows
    ]
