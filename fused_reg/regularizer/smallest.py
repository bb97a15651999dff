"""Which of many numbers are the smallest; of equal ones those that come first. NaN is none of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

#: What is compared of elements, of one dimension: NaN stays.
Key: TypeAlias = "Callable[[Tensor], Tensor]"

#: So many that sorting all takes less time than finding the largest of the smallest.
SHORT = 2**8
_SAMPLE = 2**16


def smallest(keys: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` smallest of all keys, each of one dimension; of fewer where more are NaN. A GPU is not
    waited for."""
    if count <= 0:
        return [torch.zeros_like(key, dtype=torch.bool) for key in keys]
    key = torch.cat([k.to(keys[0].device) for k in keys])
    if len(key) <= SHORT:
        below = torch.zeros_like(key, dtype=torch.bool).index_fill_(0, key.sort(stable=True).indices[:count], True)
        below &= ~key.isnan()
    else:
        below = _below_limit(key, count)
    return [mask.to(k.device) for mask, k in zip(below.split_with_sizes([*map(len, keys)]), keys, strict=True)]


def _below_limit(key: Tensor, count: int) -> Tensor:
    larger = len(key) - count + 1  # topk is of the fewer
    if count < larger:
        limit = _without_nan(key.topk(count, largest=False, sorted=False).values).amax()
    else:
        limit = _without_nan(key.topk(larger, sorted=False).values).amin()
    below, equal = key < limit, key == limit
    return below | (equal & (equal.cumsum(0) <= count - below.sum()))


def _without_nan(key: Tensor) -> Tensor:
    """With infinity in its place, the largest number."""
    return key.nan_to_num(torch.inf, torch.inf)


def largest_of(pieces: Sequence[Tensor], key: Key, count: int) -> tuple[Tensor, int, bool]:
    """The largest of the ``count`` smallest keys, how many that are equal to it belong to them, and whether more are;
    of all but NaN where these are fewer. The host has the pieces. Of many, a sample says between which two it is,
    unless it is a bad one."""
    size = sum(piece.numel() for piece in pieces)
    stride = max(size // _SAMPLE, 1)
    below, between = 0, torch.cat([key(piece.reshape(-1))[::stride] for piece in pieces])
    if stride > 1:
        place, margin = round(count / size * len(between)), round(2 * math.sqrt(len(between)))
        ends = max(place - margin, 0), min(place + margin, len(between) - 1)
        below, between = _between(pieces, key, *(_without_nan(between.kthvalue(end + 1).values) for end in ends))
    if not below < count <= below + len(between):
        below, between = 0, torch.cat([key(piece.reshape(-1)) for piece in pieces])
    limit = between.kthvalue(count - below).values
    if limit.isnan():
        return _without_nan(limit), count, False
    equal = count - below - int((between < limit).sum())
    return limit, equal, equal < int((between == limit).sum())


def _between(pieces: Sequence[Tensor], key: Key, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """How many are below, and what is from low to high."""
    below, between = 0, []
    for piece in pieces:
        found = key(piece.reshape(-1)).to(low.dtype)
        is_below = found < low
        below += int(is_below.sum())
        between.append(found[(found <= high) & ~is_below])
    return below, torch.cat(between)
