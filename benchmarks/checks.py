"""Compares what an implementation computed with float64, before it is timed: a fast wrong answer is no result."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_reg import reference

Tensors = Sequence[Tensor]
Strengths = Mapping[str, Any]  # the arguments of `fused_reg.fused_penalty`

# float64 copies of a whole list need gigabytes, so they are made piece by piece. On a CPU pieces that fit into a cache
# are checked three times as fast as larger ones; a GPU has memory, and each piece costs it launches.
PIECES = {"cpu": 1 << 18, "cuda": 1 << 26}

# contract: that of our value. roundings: of what is ours and not promised to the bit. value, elements: beyond them a
# peer does another job. `torch._foreach_norm`'s float32 sums on the CPU are a few percent off on the largest lists: a
# result, to be shown. A running sum in bfloat16 may lose most of the value, and rounds its gradients several times.
TOLERANCES = {
    torch.float32: {"contract": 6e-8, "roundings": 1e-6, "value": 0.2, "elements": 1e-3},
    torch.bfloat16: {"contract": 6e-8, "roundings": 5e-3, "value": 0.9, "elements": 2e-2},
}


class WrongResultError(Exception):
    """An implementation does not compute what it is measured for."""


class Errors(NamedTuple):
    """How far from float64: the value, relative; the gradient, of its largest element. None: there is none."""

    value_error: float | None = None
    gradient_error: float | None = None


def pieces(*tensors: Tensor, group: str | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding pieces of tensors of one shape; where norms are of groups, each holds whole groups."""
    size = PIECES[tensors[0].device.type]
    if group == "row":
        matrices = [t.detach().reshape(len(t), -1) for t in tensors]
        return zip(*(m.split(max(1, size // m.shape[1])) for m in matrices), strict=True)
    return zip(*(t.detach().reshape(-1).split(t.numel() if group else size) for t in tensors), strict=True)


def largest_relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between what is and what should be, relative to the largest that should be."""
    errors, sizes = zip(*(((is_ - should).abs().max(), should.abs().max()) for is_, should in pairs), strict=True)
    return (torch.stack(errors).max() / torch.stack(sizes).max()).item()


def demand(tolerance: str, dtype: torch.dtype, error: float, name: str) -> float:
    """The error, which must be within the tolerance; NaN is not."""
    if not error <= (most := TOLERANCES[dtype][tolerance]):
        raise WrongResultError(f"{name} error {error:.3g} is above {most:.3g}")
    return error


@dataclass(frozen=True)
class Oracle:
    """What the penalty of these parameters is, and how to tell whether an implementation computed it."""

    params: Tensors
    strengths: Strengths

    @cached_property
    def value(self) -> float:
        """The penalty in float64: a sum, so that of a list is the sum over its pieces."""
        parts = (part for p in self.params for (part,) in pieces(p, group=self.strengths.get("group")))
        return math.fsum(reference.fused_penalty(part.double(), **self.strengths).item() for part in parts)

    def check(
        self,
        role: str,
        value: Tensor,
        grads: Tensors | None = None,
        base: Tensors | None = None,  # what the gradients were added to; None: they are fresh
        is_alone: bool = True,  # in a loss; else `base` holds to the rounding only
        in_one_pass: bool = False,  # a narrow dtype was rounded after the addition only
    ) -> Errors:
        """The errors of a penalty and its gradients, if they are within what is demanded of the role."""
        dtype, is_ours = self.params[0].dtype, role == "ours"
        error = demand("contract" if is_ours else "value", dtype, abs(value.item() / self.value - 1), "value")
        if grads is None:
            return Errors(error)
        if len(grads) != len(self.params):
            raise WrongResultError(f"{len(grads)} gradients for {len(self.params)} parameters")
        tolerance = "elements"
        if "group" in self.strengths:  # a loop's gradient is off by as much as the norm that it divides by
            tolerance = "roundings" if is_ours else "value"
        elif is_ours and is_alone:
            self._check_bits(grads, base, in_one_pass)
        pairs = self._compared(
            grads, base, lambda part: reference.value_and_grad(part.double(), **self.strengths)[1][0]
        )
        return Errors(error, demand(tolerance, dtype, largest_relative(pairs), "gradient"))

    def _check_bits(self, grads: Tensors, base: Tensors | None, in_one_pass: bool) -> None:
        def by_loop(part: Tensor) -> Tensor:  # of a narrower dtype: in float32, rounded once
            leaf = part.to(torch.promote_types(part.dtype, torch.float32)).requires_grad_()
            (grad,) = torch.autograd.grad(reference.loop(leaf, **self.strengths), leaf)
            return grad if in_one_pass else grad.to(part.dtype)

        for grad, expected in self._compared(grads, base, by_loop):
            if not torch.equal(grad.view(torch.uint8), expected.to(grad.dtype).view(torch.uint8)):
                raise WrongResultError("a gradient has not the bits of the loop's")

    def _compared(self, grads: Tensors, base: Tensors | None, formula: Callable[[Tensor], Tensor]) -> Iterator:
        """Each piece of a gradient with what the formula makes of the parameter's."""
        for tensors in zip(self.params, grads, *([base] if base else []), strict=True):
            for part, grad, *before in pieces(*tensors, group=self.strengths.get("group")):
                yield grad, sum(before, formula(part))
