"""The specification, in plain torch and independent of the kernels: the functions of the package with the same
signatures, computed in float64, and the loop that people write by hand.

Tests and benchmarks compare with it. The package itself never calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_reg._arguments import Strength


def _per_parameter(strength: Strength | None, count: int) -> list[float | Tensor]:
    if strength is None:
        return [0.0] * count
    if isinstance(strength, Sequence):
        return list(strength)
    if getattr(strength, "ndim", 0) == 1:  # a tensor or a NumPy array
        return [strength[i] for i in range(count)]  # type: ignore[index]
    return [strength] * count


def _terms(
    params: Iterable[Tensor] | Tensor, l1: Strength | None, l2: Strength | None
) -> list[tuple[Tensor, float | Tensor, float | Tensor]]:
    tensors = [params] if isinstance(params, Tensor) else list(params)
    if l1 is None and l2 is None:
        l2 = 1.0
    return list(zip(tensors, _per_parameter(l1, len(tensors)), _per_parameter(l2, len(tensors)), strict=True))


def fused_penalty(params: Iterable[Tensor] | Tensor, l1: Strength | None = None, l2: Strength | None = None) -> Tensor:
    r"""``sum_t l1_t * sum|w_t| + l2_t * sum w_t^2``, every element in float64, rounded once at the end.

    Args:
        params: as for :func:`fused_reg.fused_penalty`.
        l1: likewise.
        l2: likewise.

    Returns:
        A differentiable 0-dim tensor: float64 if any parameter is float64, else float32.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> reference.fused_penalty([torch.tensor([1.0, -2.0])], l1=0.5, l2=1.0)
        tensor(6.5000)
    """
    total: Tensor | None = None
    dtype = torch.float32
    for p, a, b in _terms(params, l1, l2):
        dtype = torch.promote_types(dtype, p.dtype)
        w = p.double()
        value = w.new_zeros(())
        if isinstance(a, Tensor) or a != 0:
            value = value + a * w.abs().sum()
        if isinstance(b, Tensor) or b != 0:
            value = value + b * w.square().sum()
        total = value if total is None else total + value.to(total.device)
    return torch.zeros(()) if total is None else total.to(dtype)


def value_and_grad(
    params: Iterable[Tensor] | Tensor, l1: Strength | None = None, l2: Strength | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and its gradient in every parameter, by autograd through :func:`fused_penalty`.

    Args:
        params: as for :func:`fused_reg.value_and_grad`.
        l1: likewise.
        l2: likewise.

    Returns:
        The value, and a tuple with one gradient per parameter, computed in float64 and rounded once.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> reference.value_and_grad([torch.tensor([1.0, -2.0])], l1=0.5, l2=1.0)
        (tensor(6.5000), (tensor([ 2.5000, -4.5000]),))
    """
    tensors = [params] if isinstance(params, Tensor) else list(params)
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_() for p in tensors]
        value = fused_penalty(leaves, l1, l2)
        grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True) if leaves else ()
    return value.detach(), grads


def loop(params: Iterable[Tensor] | Tensor, l1: Strength | None = None, l2: Strength | None = None) -> Tensor:
    """The loop that people write by hand, in the parameters' own dtypes. Its gradient is the contract's, bit for bit.

    Args:
        params: as for :func:`fused_reg.fused_penalty`; not empty.
        l1: likewise.
        l2: likewise.

    Returns:
        A differentiable 0-dim tensor of the parameters' promoted dtype. Its value has the rounding of its sums.

    Example:
        >>> import torch
        >>> from fused_reg import reference
        >>> reference.loop([torch.tensor([1.0, -2.0])], l1=0.5, l2=1.0)
        tensor(6.5000)
    """
    total: Any = 0
    for p, a, b in _terms(params, l1, l2):
        if isinstance(a, Tensor) or a != 0:
            total = total + a * p.abs().sum()
        if isinstance(b, Tensor) or b != 0:
            total = total + b * (p**2).sum()
    return torch.as_tensor(total)
