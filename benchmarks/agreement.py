"""Whether a GPU's values are the CPU's, on random lists."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

import fused_reg
from benchmarks.rows import Agreement

LISTS = 1000

_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)  # the value of all of them is a float32
_MOST_TENSORS = 8
_SIZES = (1, 7, 64, 1000, 4099, 70_000)  # at most, of a tensor


def measure_agreement(device: str, lists: int) -> Agreement:
    """The values of random lists on the device and on the CPU."""
    choose = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    ulps = [_ulps_apart(_random_list(choose, generator), choose, device) for _ in range(lists)]
    return Agreement(lists=lists, equal=ulps.count(0), max_ulp=max(ulps))


def _random_list(choose: random.Random, generator: torch.Generator) -> list[Tensor]:
    def draw() -> Tensor:
        size = choose.randint(1, choose.choice(_SIZES))
        return torch.randn(size, generator=generator).mul_(choose.choice((0.01, 1.0, 30.0))).to(choose.choice(_DTYPES))

    return [draw() for _ in range(choose.randint(1, _MOST_TENSORS))]


def _ulps_apart(params: Sequence[Tensor], choose: random.Random, device: str) -> int:
    l1, l2 = choose.uniform(0, 1), choose.uniform(0, 1)
    here = fused_reg.fused_penalty(params, l1, l2)
    there = fused_reg.fused_penalty([p.to(device) for p in params], l1, l2).cpu()
    return abs(_ordinal(here) - _ordinal(there))


def _ordinal(value: Tensor) -> int:
    """The place of a positive float32 among them all."""
    return int(value.view(torch.int32).item())
