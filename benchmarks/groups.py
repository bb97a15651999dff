"""The groups that norms are of, in float64 and in pieces: what norms and their proximal steps are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.checks import PIECES
from fused_reg._arguments import Group

#: The strength of the norms.
L2_NORM = 1e-4

#: The family of rows in which a kind of group is measured.
FAMILIES: dict[Group, str] = {"tensor": "norms of tensors", "row": "norms of rows"}


def groups_of(params: Sequence[Tensor]) -> list[Group]:
    """What is measured of a list: rows only where they are more than single elements."""
    return ["tensor", "row"] if any(p.ndim > 1 for p in params) else ["tensor"]


def blocks(group: Group, *tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Corresponding pieces of tensors of one shape, as matrices with a row for each group; and which rows these are."""
    matrices = [t.detach().reshape(len(t) if group == "row" else 1, -1) for t in tensors]
    count, length = matrices[0].shape
    size = PIECES[tensors[0].device.type]
    step = max(1, size // length)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        parts = (m[rows].split(length if step > 1 else size, dim=1) for m in matrices)
        for pieces in zip(*parts, strict=True):
            yield rows, pieces


def norms(group: Group, t: Tensor, of: Callable[[Tensor], Tensor] = torch.Tensor.double) -> Tensor:
    """Of each group of what a function makes of the elements, in a column."""
    squares = torch.zeros(len(t) if group == "row" else 1, 1, dtype=torch.float64, device=t.device)
    for rows, (piece,) in blocks(group, t):
        squares[rows] += of(piece).square().sum(dim=1, keepdim=True)
    return squares.sqrt()
