"""The penalty before a step of an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_reg.functional import fused_penalty


class Penalty:
    """In parts: each a function that gives its float64 penalty, of DTensors by asking the other processes."""

    def __init__(self, dtype: torch.dtype, parts: Sequence[Callable[[], Tensor]]) -> None:
        self._dtype, self._parts = dtype, parts
        self._total: Tensor | None = None

    def total(self) -> Tensor:
        """0-dim, rounded once."""
        if self._total is None:
            values = [part() for part in self._parts] or [torch.zeros((), dtype=torch.float64)]
            self._total = functools.reduce(lambda a, b: a + b.to(a.device), values).to(self._dtype)
            self._parts = ()
        return self._total


@torch.no_grad()
def now(params: list[Tensor], l1: float | Tensor, l2: float | Tensor) -> Tensor:
    """Their penalty, in float64."""
    exact = torch.empty(0, dtype=torch.float64, device=params[0].device)
    return fused_penalty([*params, exact], l1, l2)


def penalties_of(params: list[Tensor], l1: float | Tensor, l2: float | Tensor) -> list[Callable[[], Tensor]]:
    """The parts of what a step leaves alone. Of what is frozen it waits until somebody looks, if numbers can."""
    parts: list[Callable[[], Tensor]] = []
    may_wait = not isinstance(l1, Tensor) and not isinstance(l2, Tensor)
    frozen = [p for p in params if may_wait and not p.requires_grad]
    others = params if not frozen else [p for p in params if p.requires_grad]
    if frozen:
        parts.append(functools.partial(now, frozen, l1, l2))
    if others:
        value = now(others, l1, l2)
        parts.append(lambda: value)
    return parts
