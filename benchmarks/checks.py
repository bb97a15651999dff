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
_PIECES = {"cpu": 1 << 18, "cuda": 1 << 26}

#: The contract (README, Numerics); its gradient is compared bit by bit.
OUR_VALUE_ERROR = 6e-8

# Beyond these an implementation does another job. The float32 sums of `torch._foreach_norm` on the CPU are a few
# percent off on the largest lists: that is a result, to be shown.
# A running sum in bfloat16 may lose most of the value, and each of its gradients is rounded several times.
_PEER_VALUE_ERRORS = {torch.float32: 0.2, torch.bfloat16: 0.9}
_GRADIENT_ERRORS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}

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
    flat = [t.detach().reshape(-1).split(_PIECES[t.device.type]) for t in tensors]
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

    def check_addition(self, after: Sequence[Tensor], before: Sequence[Tensor], alpha: float) -> Errors:
        """Of `g.add_(x, alpha=alpha)`."""
        differences = self._compared(after, before, lambda piece: alpha * piece.double())
        return Errors(gradient=_largest_relative(differences))

    def check(
        self, role: Role, value: Tensor, grads: Sequence[Tensor] | None = None, base: Sequence[Tensor] | None = None
    ) -> Errors:
        """Of a penalty, and of gradients that were added to `base`, or are fresh if it is None.

        Raises:
            WrongResultError: ours breaks the contract, or another does not compute the penalty at all.
        """
        value_error = abs(value.item() - self.value) / abs(self.value)
        dtype = self.params[0].dtype
        _demand("value error", value_error, OUR_VALUE_ERROR if role == "ours" else _PEER_VALUE_ERRORS[dtype])
        if grads is None:
            return Errors(value_error)
        if role == "ours":
            self._check_bits(grads, base)
        gradient_error = self._gradient_error(grads, base)
        _demand("gradient error", gradient_error, _GRADIENT_ERRORS[dtype])
        return Errors(value_error, gradient_error)

    def _gradient_error(self, grads: Sequence[Tensor], base: Sequence[Tensor] | None) -> float:
        def exact(piece: Tensor) -> Tensor:
            return reference.value_and_grad(piece.double(), self.strengths.l1, self.strengths.l2)[1][0]

        return _largest_relative(self._compared(grads, base, exact))

    def _check_bits(self, grads: Sequence[Tensor], base: Sequence[Tensor] | None) -> None:
        def by_loop(piece: Tensor) -> Tensor:
            # Of a narrower dtype: the loop in float32, rounded once.
            leaf = piece.detach().to(torch.promote_types(piece.dtype, torch.float32)).requires_grad_()
            (grad,) = torch.autograd.grad(reference.loop(leaf, self.strengths.l1, self.strengths.l2), leaf)
            return grad.to(piece.dtype)

        for grad, expected in self._compared(grads, base, by_loop):
            if not torch.equal(grad.view(torch.uint8), expected.view(torch.uint8)):
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


def _largest_relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between a gradient and what it should be, relative to the largest that it should be."""
    errors, sizes = [], []
    for actual, expected in pairs:
        errors.append((actual.double() - expected).abs().max().double())
        sizes.append(expected.abs().max().double())
    return (torch.stack(errors).max() / torch.stack(sizes).max()).item()


def _demand(name: str, error: float, tolerance: float) -> None:
    if not error <= tolerance:  # NaN is wrong, too
        raise WrongResultError(f"{name} {error:.3g} is above {tolerance:.3g}")
