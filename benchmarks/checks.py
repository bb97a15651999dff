"""Compares what an implementation computed with float64, before it is timed: a fast wrong answer is no result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.rows import Role
from fused_reg import reference

# float64 copies of a whole list need gigabytes, so they are made piece by piece. On a CPU pieces that fit into a cache
# are checked three times as fast as larger ones; a GPU has memory, and each piece costs it launches.
PIECES = {"cpu": 1 << 18, "cuda": 1 << 26}

#: The contract (README, Numerics); its gradient is compared bit by bit.
OUR_VALUE_ERROR = 6e-8

# Beyond these an implementation does another job. The float32 sums of `torch._foreach_norm` on the CPU are a few
# percent off on the largest lists: that is a result, to be shown.
# A running sum in bfloat16 may lose most of the value, and each of its gradients is rounded several times.
_PEER_VALUE_ERRORS = {torch.float32: 0.2, torch.bfloat16: 0.9}
_PEER_ERRORS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}

# Of what is not promised to the bit: a few roundings.
_OUR_ERRORS = {torch.float32: 1e-6, torch.bfloat16: 5e-3}

#: Worse than this, an error is shown beside the time; by dtype.
NOTABLE_ERRORS = {"float32": 1e-4, "bfloat16": 1e-2}


class WrongResultError(Exception):
    """An implementation does not compute the penalty."""


@dataclass(frozen=True)
class Errors:
    """How far from float64: the value, relative; the gradient, of its largest element. None: there is none."""

    value: float | None = None
    gradient: float | None = None


@dataclass(frozen=True)
class Strengths:
    l1: float
    l2: float


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, all of one shape, flat and in corresponding pieces."""
    flat = [t.detach().reshape(-1).split(PIECES[t.device.type]) for t in tensors]
    return zip(*flat, strict=True)


@dataclass(frozen=True)
class Oracle:
    """What the penalty of these parameters is, and how to tell whether an implementation computed it."""

    params: Sequence[Tensor]
    strengths: Strengths

    @cached_property
    def value(self) -> float:
        """The penalty in float64. It is a sum over elements: that of a tensor is the sum over its pieces."""
        l1, l2 = self.strengths.l1, self.strengths.l2
        return math.fsum(
            reference.fused_penalty(piece.double(), l1, l2).item() for p in self.params for (piece,) in pieces(p)
        )

    @cached_property
    def absolute_sum(self) -> float:
        return math.fsum(piece.double().abs().sum().item() for p in self.params for (piece,) in pieces(p))

    def check_sum(self, value: Tensor) -> Errors:
        """Of `x.sum()`; relative to the sum of absolute values, because the terms cancel."""
        exact = math.fsum(piece.double().sum().item() for p in self.params for (piece,) in pieces(p))
        return Errors(value=abs(value.item() - exact) / self.absolute_sum)

    def check_copy(self, copies: Sequence[Tensor]) -> Errors:
        """Of `y.copy_(x)`.

        Raises:
            WrongResultError: one differs from its parameter.
        """
        if not all(map(torch.equal, copies, self.params)):
            raise WrongResultError("a copy differs")
        return Errors()

    def check_product(self, products: Sequence[Tensor], factor: float) -> Errors:
        """Of `x.mul_(factor)`."""
        return Errors(gradient=largest_relative(self._compared(products, None, lambda piece: factor * piece.double())))

    def check_addition(self, after: Sequence[Tensor], before: Sequence[Tensor], alpha: float) -> Errors:
        """Of `g.add_(x, alpha=alpha)`."""
        differences = self._compared(after, before, lambda piece: alpha * piece.double())
        return Errors(gradient=largest_relative(differences))

    def check(
        self,
        role: Role,
        value: Tensor,
        grads: Sequence[Tensor] | None = None,
        base: Sequence[Tensor] | None = None,
        in_one_pass: bool = False,
    ) -> Errors:
        """Of a penalty, and of gradients that were added to `base`, or are fresh if it is None; `in_one_pass`: a narrow
        dtype was rounded after the addition only.

        Raises:
            WrongResultError: ours breaks the contract, or another does not compute the penalty at all.
        """
        value_error = abs(value.item() - self.value) / abs(self.value)
        dtype = self.params[0].dtype
        demand_value(role, dtype, value_error)
        if grads is None:
            return Errors(value_error)
        if role == "ours":
            self._check_bits(grads, base, in_one_pass)
        gradient_error = self._gradient_error(grads, base)
        demand_elements("peer", dtype, gradient_error)  # ours has the bits
        return Errors(value_error, gradient_error)

    def check_composed(self, role: Role, value: Tensor, grads: Sequence[Tensor], base: Sequence[Tensor]) -> Errors:
        """Of a penalty in a loss with more in it, whose gradients are `base` to the rounding.

        Raises:
            WrongResultError: as `check`; the bits of the gradients are not looked at.
        """
        return Errors(self.check(role, value).value, self.check("peer", value, grads, base).gradient)

    def _gradient_error(self, grads: Sequence[Tensor], base: Sequence[Tensor] | None) -> float:
        def exact(piece: Tensor) -> Tensor:
            return reference.value_and_grad(piece.double(), self.strengths.l1, self.strengths.l2)[1][0]

        return largest_relative(self._compared(grads, base, exact))

    def _check_bits(self, grads: Sequence[Tensor], base: Sequence[Tensor] | None, in_one_pass: bool) -> None:
        def by_loop(piece: Tensor) -> Tensor:
            # Of a narrower dtype: the loop in float32, rounded once.
            leaf = piece.detach().to(torch.promote_types(piece.dtype, torch.float32)).requires_grad_()
            (grad,) = torch.autograd.grad(reference.loop(leaf, self.strengths.l1, self.strengths.l2), leaf)
            return grad if in_one_pass else grad.to(piece.dtype)

        for grad, expected in self._compared(grads, base, by_loop):
            if not torch.equal(grad.view(torch.uint8), expected.to(grad.dtype).view(torch.uint8)):
                raise WrongResultError("a gradient has not the bits of the loop's")

    def _compared(
        self, grads: Sequence[Tensor], base: Sequence[Tensor] | None, formula: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece of a gradient with what the formula says it is."""
        if len(grads) != len(self.params):
            raise WrongResultError(f"{len(grads)} gradients for {len(self.params)} parameters")
        for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
            tensors = (p, grad) if base is None else (p, grad, base[i])
            for p_piece, grad_piece, *base_piece in pieces(*tensors):
                expected = formula(p_piece)
                yield grad_piece, base_piece[0] + expected if base_piece else expected


def largest_relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between a gradient and what it should be, relative to the largest that it should be."""
    errors, sizes = [], []
    for actual, expected in pairs:
        errors.append((actual.double() - expected).abs().max().double())
        sizes.append(expected.abs().max().double())
    return (torch.stack(errors).max() / torch.stack(sizes).max()).item()


def demand_value(role: Role, dtype: torch.dtype, error: float, name: str = "value error") -> None:
    """Of a value: that it meets the contract, or is the job at all.

    Raises:
        WrongResultError: it does not.
    """
    _demand(name, error, OUR_VALUE_ERROR if role == "ours" else _PEER_VALUE_ERRORS[dtype])


def demand_elements(role: Role, dtype: torch.dtype, error: float, name: str = "gradient error") -> None:
    """Likewise, of the elements of gradients or weights, relative to the largest."""
    _demand(name, error, _OUR_ERRORS[dtype] if role == "ours" else _PEER_ERRORS[dtype])


def _demand(name: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # NaN is wrong, too
        raise WrongResultError(f"{name} {error:.3g} is above {tolerance:.3g}")
