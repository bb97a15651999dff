"""What the machine's memory allows each mode, measured over the same bytes as the penalty."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.checks import MODES, Errors, Problem, demand, largest_relative, pieces
from benchmarks.contenders import ELASTIC_NET, Contender, Peer, Work
from benchmarks.devices import CudaDevice, race

_ALPHA = 2 * ELASTIC_NET["l2"]
_FACTOR = 1 - 1e-7  # near enough to 1 for the weights to stay what they are, through all calls
# What a GPU's bandwidth is measured with, so that its L2 cache holds next to nothing of it.
LEAST_BYTES, _L2_CACHES = 1 << 30, 16


class Limit(NamedTuple):
    """A plain operation: of all elements in one tensor (`is_flat`), or tensor by tensor."""

    name: str
    is_flat: bool
    op: Callable[[Tensor, Tensor], Tensor]  # x, y -> what it computes
    exact: Callable[[Tensor, Tensor], Tensor] | None = None  # in float64, of x, and y before; None: the sum of x


SUM = Limit("x.sum(), list", False, lambda x, y: x.sum())
COPY_FRESH = Limit("y.copy_(x), fresh y", False, lambda x, y: torch.empty_like(x).copy_(x), lambda x, y: x)
COPY_WARM = Limit("y.copy_(x), warm y", False, lambda x, y: y.copy_(x), lambda x, y: x)
ADD = Limit("g.add_(x, alpha=a)", False, lambda x, y: y.add_(x, alpha=_ALPHA), lambda x, y: y + _ALPHA * x)
MUL = Limit("x.mul_(a)", False, lambda x, y: y.mul_(_FACTOR), lambda x, y: _FACTOR * y)
SUM_FLAT = SUM._replace(name="x.sum(), one tensor", is_flat=True)
COPY_FLAT = COPY_WARM._replace(name="y.copy_(x), one tensor", is_flat=True)
ADD_FLAT, MUL_FLAT = (limit._replace(name=f"{limit.name}, one tensor", is_flat=True) for limit in (ADD, MUL))

#: What bounds the modes, of norms what their passes cost alone; the first is what ratios are to. On a GPU only those of
#: one tensor: a list is bound by its launches there, and memory comes warm from PyTorch's allocator.
_COPIES = (COPY_FRESH, COPY_WARM, COPY_FLAT)
LIMITS = {"value": (SUM_FLAT, SUM), "value_and_grad": _COPIES, "fresh": _COPIES, "present": (ADD_FLAT, ADD)}
LIMITS |= {"norm_value": (SUM_FLAT,), "norm_fresh": (ADD_FLAT,), "prox": (MUL_FLAT, MUL)}


def limits(problem: Problem, mode: str, peers: Sequence[Peer] = ()) -> Iterator[Contender]:
    of_device = [x for x in LIMITS.get(mode, ()) if (x.is_flat if problem.device == "cuda" else x is not COPY_FLAT)]
    for limit in of_device:
        yield Contender(limit.name, "limit", partial(_work, problem, limit), is_reference_limit=limit is of_device[0])


def _work(problem: Problem, limit: Limit) -> Work:
    xs = [p.detach() for p in problem.params]
    if limit.is_flat:
        xs = [torch.cat([x.reshape(-1) for x in xs])]
    ys = [2 * x for x in xs] if limit.exact else xs  # a sum needs none

    def call() -> list[Tensor]:
        return [limit.op(x, y) for x, y in zip(xs, ys, strict=True)]

    def verify() -> Errors:
        dtype, parts = xs[0].dtype, [part for x in xs for (part,) in pieces(x)]
        if limit.exact is None:  # relative to the sum of absolute values, because the terms cancel
            exact = math.fsum(part.double().sum().item() for part in parts)
            absolute = math.fsum(part.double().abs().sum().item() for part in parts)
            error = abs(math.fsum(s.item() for s in call()) - exact) / absolute
            return demand("value", dtype, error, "value"), None
        for x, y in zip(xs, ys, strict=True):
            torch.mul(x, 2, out=y)
        results = [part for result in call() for (part,) in pieces(result)]
        pairs = ((r, limit.exact(x.double(), 2 * x.double())) for r, x in zip(results, parts, strict=True))
        return None, demand("elements", dtype, largest_relative(pairs), "element")

    return Work(call, verify)


def rooflines(device: CudaDevice) -> list[dict]:
    """The bandwidths of a GPU: its plain operations over much memory, raced against each other."""
    x = torch.rand(max(LEAST_BYTES, _L2_CACHES * device.l2_bytes) // 4, device=device.name)
    y, found = torch.zeros_like(x), []
    names = list(dict.fromkeys(mode.roofline for mode in MODES.values() if mode.roofline))
    operations = [(SUM, 1), (COPY_WARM, 2), (ADD, 3), (MUL, 2)]  # and the tensors they move
    timings = race([partial(limit.op, x, y) for limit, _ in operations], 30, 5.0, device)
    for name, (_, passes), timing in zip(names, operations, timings, strict=True):
        modes, moved, us = [m for m in MODES if MODES[m].roofline == name], passes * x.nbytes, 1e3 * timing["median_ms"]
        found.append({"name": name, "modes": modes, "bytes": moved, "median_us": us, "gb_per_s": moved / us / 1e3})
    return found
