"""What the machine's memory allows each mode, measured over the same bytes as the penalty."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.checks import Errors, demand, largest_relative, pieces
from benchmarks.contenders import ELASTIC_NET, Contender, Problem, Work

_ALPHA = 2 * ELASTIC_NET["l2"]
#: Near enough to 1 for the weights to stay what they are, through all calls.
FACTOR = 1 - 1e-7


class Limit(NamedTuple):
    """A plain operation: of all elements in one tensor (`is_flat`), or tensor by tensor."""

    name: str
    is_flat: bool
    op: Callable[[Tensor, Tensor], Tensor]  # x, y -> what it computes
    exact: Callable[[Tensor, Tensor], Tensor] | None = None  # in float64, of x, and y before; None: the sum of x


SUM_FLAT = Limit("x.sum(), one tensor", True, lambda x, y: x.sum())
SUM = Limit("x.sum(), list", False, SUM_FLAT.op)
COPY_FLAT = Limit("y.copy_(x), one tensor", True, lambda x, y: y.copy_(x), lambda x, y: x)
COPY_FRESH = Limit("y.copy_(x), fresh y", False, lambda x, y: torch.empty_like(x).copy_(x), COPY_FLAT.exact)
COPY_WARM = Limit("y.copy_(x), warm y", False, COPY_FLAT.op, COPY_FLAT.exact)
ADD = Limit("g.add_(x, alpha=a)", False, lambda x, y: y.add_(x, alpha=_ALPHA), lambda x, y: y + _ALPHA * x)
ADD_FLAT = ADD._replace(name="g.add_(x, alpha=a), one tensor", is_flat=True)
MUL = Limit("x.mul_(a)", False, lambda x, y: y.mul_(FACTOR), lambda x, y: FACTOR * y)
MUL_FLAT = MUL._replace(name="x.mul_(a), one tensor", is_flat=True)

#: What bounds the modes; the first is what ratios are to. By the kind of device: on a GPU a list tensor by tensor is
#: bound by its launches, and memory comes warm from PyTorch's allocator.
_CPU = ((SUM_FLAT, SUM), (COPY_FRESH, COPY_WARM), (ADD_FLAT, ADD), (MUL_FLAT, MUL))
_CUDA = ((SUM_FLAT,), (COPY_FLAT,), (ADD_FLAT,), (MUL_FLAT,))
_BOUNDED = ("value", "value_and_grad", "present", "prox")
LIMITS = {name: dict(zip(_BOUNDED, bounds, strict=True)) for name, bounds in (("cpu", _CPU), ("cuda", _CUDA))}


def limits(problem: Problem, mode: str) -> Iterator[Contender]:
    """The limits of a mode; of norms, what their passes cost alone."""
    of_device = LIMITS[problem.device]
    of_others = {"fresh": of_device["value_and_grad"], "norm_value": (SUM_FLAT,), "norm_fresh": (ADD_FLAT,)}
    for i, limit in enumerate((of_device | of_others)[mode]):
        yield Contender(limit.name, "limit", partial(_work, problem, limit), is_reference_limit=i == 0)


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
            return Errors(value_error=demand("value", dtype, error, "value"))
        for x, y in zip(xs, ys, strict=True):
            torch.mul(x, 2, out=y)
        results = [part for result in call() for (part,) in pieces(result)]
        pairs = ((r, limit.exact(x.double(), 2 * x.double())) for r, x in zip(results, parts, strict=True))
        return Errors(gradient_error=demand("elements", dtype, largest_relative(pairs), "element"))

    return Work(call, verify)
