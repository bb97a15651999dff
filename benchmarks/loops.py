"""The loops of torch that ours is compared with, in the fastest forms known: parameters and strengths -> a value."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.checks import Tensors


def foreach_norm(params: Tensors, l1: float, l2: float) -> Tensor:
    """By the multi-tensor norms of PyTorch's gradient clipping: a call per term, a number per tensor."""
    absolute, euclidean = (torch.stack(torch._foreach_norm(params, power)) for power in (1, 2))
    return l1 * absolute.sum() + l2 * euclidean.square().sum()


def _summed_dims(p: Tensor, group: str) -> tuple[int, ...]:
    """Over which a norm of the group goes; of a vector's rows none, for each is an element."""
    kept = {"tensor": -1, "row": 0, "column": 1}[group]
    return tuple(d for d in range(p.ndim) if d != kept)


def norms(p: Tensor, group: str, keepdim: bool = False) -> Tensor:
    dims = _summed_dims(p, group)
    return torch.linalg.vector_norm(p, dim=dims, keepdim=keepdim) if dims else p.abs()


def _roots(p: Tensor, group: str) -> Tensor:
    """The same, faster where a norm goes over what is far apart. The root of a single square has no gradient at 0."""
    dims = _summed_dims(p, group)
    return p.square().sum(dims).sqrt() if dims else p.abs()


def _total(norms: Tensor) -> Tensor:
    return norms.sum() if norms.ndim else norms


def loop_of_norms(params: Tensors, l2_norm: float, group: str) -> Tensor:
    return l2_norm * sum(_total(norms(p, group)) for p in params)


def loop_of_roots(params: Tensors, l2_norm: float, group: str) -> Tensor:
    return l2_norm * sum(_total(_roots(p, group)) for p in params)


def foreach_of_norms(params: Tensors, l2_norm: float, group: str) -> Tensor:
    return l2_norm * torch.stack(torch._foreach_norm(params)).sum()


def loop_of_l1(params: Tensors, l1: float) -> Tensor:
    return l1 * sum(torch.linalg.vector_norm(p, 1) for p in params)


def loop_of_l2(params: Tensors, l2: float) -> Tensor:
    return l2 * sum(torch.linalg.vector_norm(p).square() for p in params)


def loop_of_dots(params: Tensors, l2: float) -> Tensor:
    return l2 * sum(torch.dot(p.reshape(-1), p.reshape(-1)) for p in params)


class Empty(torch.autograd.Function):
    """What autograd asks for a list: a value, and memory for the gradient of each."""

    @staticmethod
    def forward(ctx: Any, *params: Tensor) -> Tensor:
        ctx.gradients = [torch.empty_like(p) for p in params]
        return params[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)
