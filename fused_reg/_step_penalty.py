"""The penalty before a step of an optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_reg._references import with_one_more
from fused_reg._step_references import Penalized, params_of, references_of
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
def now(own: Sequence[Penalized], l1: float | Tensor, l2: float | Tensor) -> Tensor:
    """Their penalty, in float64."""
    exact = torch.empty(0, dtype=torch.float64, device=own[0].param.device)
    references: dict[str, Any] = {name: with_one_more(xs, exact) for name, xs in references_of(own).items()}
    return fused_penalty([*params_of(own), exact], l1, l2, **references)


def penalties_of(own: Sequence[Penalized], l1: float | Tensor, l2: float | Tensor) -> list[Callable[[], Tensor]]:
    """The parts of what a step leaves alone. Of what is frozen it waits until somebody looks, if numbers can."""
    parts: list[Callable[[], Tensor]] = []
    may_wait = not isinstance(l1, Tensor) and not isinstance(l2, Tensor)
    frozen = [x for x in own if may_wait and not x.param.requires_grad]
    others = own if not frozen else [x for x in own if x.param.requires_grad]
    if frozen:
        parts.append(functools.partial(now, frozen, l1, l2))
    if others:
        value = now(others, l1, l2)
        parts.append(lambda: value)
    return parts
