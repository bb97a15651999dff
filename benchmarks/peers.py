"""The implementations of the penalty, by one signature: parameters, l1, l2 -> a differentiable 0-dim tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

import fused_reg
from benchmarks.rows import Mode, Role
from fused_reg import reference

Penalty = Callable[[Sequence[Tensor], float, float], Tensor]


@dataclass(frozen=True)
class Peer:
    """An implementation, and the modes in which it is measured."""

    name: str
    penalty: Penalty
    role: Role = "peer"
    modes: tuple[Mode, ...] = ("value", "fresh", "present")
    compiled: bool = False  # by torch.compile, anew for every case


def foreach_norm(params: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """By the multi-tensor norms of PyTorch's gradient clipping: a call per term, a number per tensor."""
    absolute = torch.stack(torch._foreach_norm(params, 1))
    euclidean = torch.stack(torch._foreach_norm(params, 2))
    return l1 * absolute.sum() + l2 * euclidean.square().sum()


OURS = Peer("fused_reg", fused_reg.fused_penalty, role="ours")
COMPILED_LOOP = Peer("torch.compile", reference.loop, compiled=True)
LOOP = Peer("loop", reference.loop)
FOREACH_NORM = Peer("torch._foreach_norm", foreach_norm)

PEERS = {peer.name: peer for peer in (OURS, COMPILED_LOOP, LOOP, FOREACH_NORM)}


class Compiled:
    """A penalty compiled for one case, and how long that took: once with gradients, once without."""

    def __init__(self, penalty: Penalty) -> None:
        torch._dynamo.reset()  # what was compiled for the last case
        self.penalty: Penalty = torch.compile(penalty, fullgraph=True, dynamic=False)
        self._seconds: dict[bool, float] = {}

    def compile(self, call: Callable[[], object], wants_grad: bool) -> float:
        """Run the call that compiles; the seconds it took, or had taken if it is compiled already."""
        if wants_grad not in self._seconds:
            start = perf_counter()
            call()
            self._seconds[wants_grad] = perf_counter() - start
        return self._seconds[wants_grad]
