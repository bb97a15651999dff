"""The learning rates of an optimizer, which are the steps of a proximal operator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fused_reg import _devices

Groups = Sequence[dict[str, Any]]


def check_rates(groups: Groups, places: Iterable[int]) -> None:
    """Raises unless each of these groups has a rate that a proximal step can have. A GPU is not waited for."""
    for i in places:
        rate = groups[i].get("lr")
        if type(rate) is float and 0 <= rate < math.inf:
            continue
        is_one = not isinstance(rate, bool | str) and hasattr(rate, "__float__") and getattr(rate, "ndim", 0) == 0
        if not (rate.numel() == 1 if isinstance(rate, Tensor) else is_one):
            raise ValueError(
                'attach: mode "prox" must find a learning rate in each group of a regularized parameter, got '
                f'lr={rate!r} in group {i}; mode "grad" needs none'
            )
        number = rate_of(groups[i])
        if not (isinstance(number, Tensor) and not _devices.is_at_hand(number)) and not 0 <= float(number) < math.inf:
            raise ValueError(
                f'attach: mode "prox" must find learning rates that are finite and >= 0, got lr={float(number)} in '
                f"group {i}"
            )


def rate_of(group: dict[str, Any]) -> float | Tensor:
    """The rate of a group that has one: a float or a 0-dim tensor."""
    rate = group["lr"]
    if not isinstance(rate, Tensor):
        return float(rate)
    rate = rate.detach().reshape(())
    return rate if rate.is_floating_point() else rate.double()
