"""The rows of a parameter that a batch has touched: those that its sparse gradient has, as of an embedding."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


def touched(name: str, p: Tensor) -> Tensor | None:
    """Which rows these are, each once; None where the gradient is not sparse. ``.grad`` is coalesced: one gradient of a
    row that the batch has twice."""
    grad = p.grad
    if grad is None or not p.requires_grad or grad.layout is not torch.sparse_coo:
        return None
    if grad.sparse_dim() != 1:
        raise ValueError(
            f"{name}.grad must be sparse in rows, as that of an embedding is, got {grad.sparse_dim()} sparse dimensions"
        )
    if not grad.is_coalesced():
        p.grad = grad = grad.coalesce()
    return grad.indices()[0]


def rows_of(p: Tensor, index: Tensor) -> Tensor:
    """A copy of these rows."""
    return p.detach().index_select(0, index)


def lend_grad(rows: Tensor, p: Tensor) -> None:
    """Gives a copy of the rows that a parameter's gradient has the memory of this."""
    rows.grad_dtype = None  # any
    rows.grad = cast(Tensor, p.grad)._values()


@torch.no_grad()
def put_back(p: Tensor, index: Tensor, rows: Tensor) -> None:
    """These rows, into their parameter."""
    p.index_copy_(0, index, rows.detach())
