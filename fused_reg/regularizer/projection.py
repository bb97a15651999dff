"""The step that reaches an aim: the projection to the nearest weights with so many zeros.

The smallest become zero, the others stay as they are: the proximal step of an L0 penalty whose strength is found anew
at each step (iterative hard thresholding). What is equal becomes zero in the order of the parameters. NaN stays always.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.functional import split

from fused_reg import _devices
from fused_reg.regularizer.aims import Aim, aims_of
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.group_projection import GroupProjection, make_zero
from fused_reg.regularizer.smallest import Key, largest_of, smallest

_PIECE = 2**18  # elements, so few that what is computed of them stays in the caches


class Projection:
    """That of some entries. A step that finds them as the last one did takes less time."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        pools = [(aim, pool) for aim, own in aims_of(entries) for pool in aim.pools(own)]
        self._of_elements = [(aim, [e.param for e in pool]) for aim, pool in pools if aim.group == "tensor"]
        self._of_groups = GroupProjection([(aim, pool) for aim, pool in pools if aim.group != "tensor"])

    def project_(self, found_inf: Tensor | None = None) -> None:
        """Makes so many zero that each aim is reached by those that have it; nothing where the step was none, which a
        GPU may know alone."""
        for aim, params in self._of_elements:
            _project_elements(aim, [p.detach() for p in params], found_inf)
        self._of_groups.project_(found_inf)


def _project_elements(aim: Aim, params: list[Tensor], found_inf: Tensor | None) -> None:
    size = sum(p.numel() for p in params)
    if aim.pattern is None:
        key: Key = torch.abs
        count, n, m = min(round(aim.share * size), size - 1), 0, 1  # of few that have a gradient, never all
    else:
        n, m = aim.pattern
        key, count = partial(_sizes_behind, n=n, m=m), round(aim.share * (size // m * (m - n)))
    if count <= 0:
        return
    if aim.pattern is not None and aim.share == 1:
        for piece in (piece for p in params for piece in _pieces(p, m)):
            make_zero(piece, _is_behind(piece.reshape(-1), n, m).reshape(piece.shape), found_inf)
    elif all(map(_devices.is_at_hand, params)):
        if found_inf is not None and found_inf != 0:
            return
        pieces = [piece for p in params for piece in _pieces(p, m)]
        _make_smallest_zero(pieces, key, *largest_of(pieces, key, count))
    else:
        masks = smallest([key(p.reshape(-1)) for p in params], count)
        for p, mask in zip(params, masks, strict=True):
            make_zero(p, mask.reshape(p.shape), found_inf)


def _pieces(p: Tensor, m: int) -> Sequence[Tensor]:
    """Views of it, with a multiple of m elements each; on the host so few that they stay in the caches."""
    is_cut = p.is_contiguous() and _devices.is_at_hand(p)
    return split(p.view(-1), _PIECE // m * m) if is_cut else [p]


def _is_behind(w: Tensor, n: int, m: int) -> Tensor:
    """Which are not among the n largest of each m; of equal ones the first are. NaN counts as infinity, and is not."""
    runs = w.abs().nan_to_num(torch.inf, torch.inf).reshape(-1, m).t().contiguous()
    rank = torch.zeros_like(runs, dtype=torch.int8)
    for i in range(m):
        for j in range(i + 1, m):
            is_larger = runs[j] > runs[i]
            rank[i] += is_larger
            rank[j] += ~is_larger
    return (rank >= n).t().reshape(-1) & ~w.isnan()


def _sizes_behind(w: Tensor, n: int, m: int) -> Tensor:
    """NaN of the others, which stay."""
    return torch.where(_is_behind(w, n, m), w.abs(), torch.nan)


def _make_smallest_zero(pieces: Sequence[Tensor], key: Key, limit: Tensor, equal: int, has_more: bool) -> None:
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
        make_zero(piece, mask.reshape(piece.shape))
