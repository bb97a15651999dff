"""The penalty of a short list in compiled code: an operator that the compiler takes apart, into plain operations, and
merges with the model's own.

Any other operator is a border that nothing is merged across: a gradient that it returns is read again, to be added to
the model's, and on a few small tensors the calls are what a step costs. The operations are those of the specification
(`reference`); the gradient has the bits of the kernels', and the value is summed in float64 too, in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.compiler import is_compiling

from fused_reg import _ops, reference
from fused_reg._arguments import Strengths

#: Longer lists take minutes to compile, and win by one call.
MOST_TENSORS = 16

# In larger ones a call is nothing, and the operator sums faster.
_MOST_SUMMED = 1 << 20


def is_short(params: Sequence[Tensor], strengths: Strengths) -> bool:
    """Whether this is compiled code, and the list one for `short_penalty`."""
    return (
        is_compiling()
        and not strengths.has_norms
        and bool(strengths.l1 or strengths.l2 or strengths.l1_tensor is not None or strengths.l2_tensor is not None)
        and len(params) <= MOST_TENSORS
        # On a GPU the compiler contracts products and sums, and the gradients would have other bits.
        and all(p.is_cpu and p.dtype is torch.float32 for p in params)
    )


def short_penalty(params: Sequence[Tensor], strengths: Strengths) -> Tensor:
    """The differentiable penalty of a list that `is_short`."""
    return _merged_penalty(
        params, _tensor(strengths.l1, strengths.l1_tensor), _tensor(strengths.l2, strengths.l2_tensor)
    )


def _tensor(floats: tuple[float, ...], tensor: Tensor | None) -> Tensor | None:
    if tensor is not None or not floats:
        return tensor
    return torch.tensor(floats if len(floats) > 1 else floats[0], dtype=torch.float64, device="cpu")


class _ValueFrom(Function):
    """One number's value with another's gradient, which the compiler does not compute the value of."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, differentiable: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, upstream


torch.library.define("fused_reg::merged_penalty", "(Tensor[] params, Tensor? l1, Tensor? l2) -> Tensor")


@torch.library.impl("fused_reg::merged_penalty", "CompositeImplicitAutograd")
def _decomposition(params: Sequence[Tensor], l1: Tensor | None, l2: Tensor | None) -> Tensor:
    """The exact value, and the gradient of the loop in float32."""
    constants = [p.detach() for p in params]
    if sum(p.numel() for p in params) > _MOST_SUMMED:
        value = _ops.penalty(constants, (), (), (), l1, l2, None, False)
    else:
        value = reference.fused_penalty(constants, l1, l2)
    loop = reference.loop(params, l1 if l1 is None else l1.float(), l2 if l2 is None else l2.float())
    return _ValueFrom.apply(value, loop)  # type: ignore[no-any-return,no-untyped-call]


_merged_penalty: Callable[..., Tensor] = torch.ops.fused_reg.merged_penalty.default
