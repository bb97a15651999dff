"""The step that reaches an aim: the projection to the nearest weights with so many zeros.

The smallest become zero, the others stay as they are: the proximal step of an L0 penalty whose strength is found anew
at each step (iterative hard thresholding). What is equal becomes zero in the order of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.functional import split

from fused_reg import _devices, _ops
from fused_reg._terms import Strengths, group_code, group_count, in_groups
from fused_reg.regularizer.aims import Aim, aims_of
from fused_reg.regularizer.table import Entry

#: What is compared of elements, of one dimension: infinity is of those that stay.
_Key: TypeAlias = "Callable[[Tensor], Tensor]"

_PIECE = 2**18  # elements, so few that what is computed of them stays in the caches
_SAMPLE = 2**16


@torch.no_grad()
def project_(entries: Sequence[Entry], found_inf: Tensor | None = None) -> None:
    """Makes so many of these zero that each aim is reached by those that have it; nothing where the step was none,
    which a GPU may know alone."""
    for aim, own in aims_of(entries):
        for pool in aim.pools(own):
            if aim.group == "tensor":
                _project_elements(aim, [entry.param.detach() for entry in pool], found_inf)
            else:
                _project_groups(aim, pool, found_inf)


def _project_elements(aim: Aim, params: list[Tensor], found_inf: Tensor | None) -> None:
    size = sum(p.numel() for p in params)
    if aim.pattern is None:
        key: _Key = torch.abs
        count, n, m = min(round(aim.share * size), size - 1), 0, 1  # of few that have a gradient, never all
    else:
        n, m = aim.pattern
        key, count = partial(_sizes_behind, n=n, m=m), round(aim.share * (size // m * (m - n)))
    if count <= 0:
        return
    if aim.pattern is not None and aim.share == 1:
        for piece in (piece for p in params for piece in _pieces(p, m)):
            _make_zero(piece, _is_behind(piece.reshape(-1), n, m).reshape(piece.shape), found_inf)
    elif all(map(_devices.is_at_hand, params)):
        if found_inf is not None and found_inf != 0:
            return
        pieces = [piece for p in params for piece in _pieces(p, m)]
        _make_smallest_zero(pieces, key, *largest_of(pieces, key, count))
    else:
        masks = smallest([key(p.reshape(-1)) for p in params], count)
        for p, mask in zip(params, masks, strict=True):
            _make_zero(p, mask.reshape(p.shape), found_inf)


def _pieces(p: Tensor, m: int) -> Sequence[Tensor]:
    """Views of it, with a multiple of m elements each; on the host so few that they stay in the caches."""
    is_cut = p.is_contiguous() and _devices.is_at_hand(p)
    return split(p.view(-1), _PIECE // m * m) if is_cut else [p]


def _is_behind(w: Tensor, n: int, m: int) -> Tensor:
    """Which are not among the n largest of each m; of equal ones the first are. NaN counts as infinity."""
    runs = w.abs().nan_to_num(torch.inf, torch.inf).reshape(-1, m).t().contiguous()
    rank = torch.zeros_like(runs, dtype=torch.int8)
    for i in range(m):
        for j in range(i + 1, m):
            is_larger = runs[j] > runs[i]
            rank[i] += is_larger
            rank[j] += ~is_larger
    return (rank >= n).t().reshape(-1)


def _sizes_behind(w: Tensor, n: int, m: int) -> Tensor:
    return torch.where(_is_behind(w, n, m), w.abs(), torch.inf)


def largest_of(pieces: Sequence[Tensor], key: _Key, count: int) -> tuple[Tensor, int, bool]:
    """The largest of the ``count`` smallest keys, how many that are equal to it belong to them, and whether more are.
    The host has the pieces. A sample says between which two it is, unless it is a bad one, and what is there is
    sorted."""
    size = sum(piece.numel() for piece in pieces)
    stride = max(size // _SAMPLE, 1)
    sample = torch.cat([key(piece.reshape(-1))[::stride] for piece in pieces]).sort().values
    place, margin = round(count / size * len(sample)), round(2 * math.sqrt(len(sample)))
    ends = sample[max(place - margin, 0)], sample[min(place + margin, len(sample) - 1)]
    below, between = _between(pieces, key, *ends) if stride > 1 else (0, sample)
    if not below < count <= below + len(between):
        below, between = 0, torch.cat([key(piece.reshape(-1)) for piece in pieces])
    limit = between.kthvalue(count - below).values
    equal = count - below - int((between < limit).sum())
    return limit, equal, equal < int((between == limit).sum())


def _make_smallest_zero(pieces: Sequence[Tensor], key: _Key, limit: Tensor, equal: int, has_more: bool) -> None:
    """What is smaller, and the first of those that are equal."""
    for piece in pieces:
        if key is torch.abs and not has_more and piece.dtype is limit.dtype:
            torch.hardshrink(piece, limit.item(), out=piece)
            continue
        found = key(piece.reshape(-1)).to(limit.dtype)  # else they are compared in the type of the piece
        mask = found <= limit
        if has_more:
            others = found == limit
            if others.any():
                left = others & (others.cumsum(0) > equal)
                equal -= int(others.sum()) - int(left.sum())
                mask &= ~left
        _make_zero(piece, mask.reshape(piece.shape))


def _between(pieces: Sequence[Tensor], key: _Key, low: Tensor, high: Tensor) -> tuple[int, Tensor]:
    """How many are below, and what is from low to high."""
    below, between = 0, []
    for piece in pieces:
        found = key(piece.reshape(-1)).to(low.dtype)
        is_below = found < low
        below += int(is_below.sum())
        between.append(found[(found <= high) & ~is_below])
    return below, torch.cat(between)


def _project_groups(aim: Aim, pool: Sequence[Entry], found_inf: Tensor | None) -> None:
    parts = [(entry, part) for entry in pool for part in entry.cut(entry.param.detach())]
    norms = _norms(parts)
    size = sum(map(len, norms))
    for (entry, part), mask in zip(parts, smallest(norms, min(round(aim.share * size), size - 1)), strict=True):
        w, dim = in_groups(part, group_code(entry.group))
        if dim == 0 and _devices.is_at_hand(w):  # writes what becomes zero alone, twice as fast as a mask writes all
            if found_inf is None or found_inf == 0:
                w.index_fill_(dim, mask.nonzero().reshape(-1), 0)
            continue
        shape = [1] * w.ndim
        if dim is not None:
            shape[dim] = -1
        _make_zero(w, mask.reshape(shape), found_inf)


def _norms(parts: Sequence[tuple[Entry, Tensor]]) -> list[Tensor]:
    """The norm of each group, in the bits that every device gives; divided by the group's weight, if it has one."""
    alike: dict[Any, list[int]] = {}
    for i, (entry, part) in enumerate(parts):
        alike.setdefault((entry.group, part.device), []).append(i)
    norms: dict[int, Tensor] = {}
    for (group, _), places in alike.items():
        code, params = group_code(group), [parts[i][1] for i in places]
        found = split(_ops.norms(params, *Strengths(group=code)), [group_count(p, code) for p in params])
        norms |= {i: norm / (parts[i][0].weight or 1.0) for i, norm in zip(places, found, strict=True)}
    return [norms[i] for i in range(len(parts))]


def smallest(keys: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the ``count`` smallest of all keys, each of one dimension; of equal ones those that come first. NaN is
    larger than all. A GPU is not waited for."""
    if count <= 0:
        return [torch.zeros_like(key, dtype=torch.bool) for key in keys]
    key = torch.cat([k.to(keys[0].device) for k in keys])
    larger = key.numel() - count + 1  # topk is of the fewer
    if count < larger:
        limit = key.topk(count, largest=False, sorted=False).values.amax()
    else:
        limit = key.topk(larger, sorted=False).values.nan_to_num(torch.inf, torch.inf, -torch.inf).amin()
    below, equal = key < limit, key == limit
    below |= equal & (equal.cumsum(0) <= count - below.sum())
    return [mask.to(k.device) for mask, k in zip(split(below, [k.numel() for k in keys]), keys, strict=True)]


def _make_zero(w: Tensor, mask: Tensor, found_inf: Tensor | None = None) -> None:
    w.masked_fill_(mask if found_inf is None else mask & (found_inf.to(mask.device) == 0), 0)
