"""The contenders of a whole optimizer step: with `weight_decay`, with our penalty, and with neither, the floor.

For SGD and Adam the two are the same thing, ``l2 = weight_decay / 2``. AdamW's `weight_decay` is decoupled: another
regularization, at a price that can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

import fused_reg
from benchmarks.checks import Errors, Oracle, Strengths, WrongResultError, pieces
from benchmarks.race import Candidate, Contender

_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.01
_GRADIENT_SCALE = 0.1
_EPS = 1e-8  # Adam's default

# Of the step, by Euclidean norms: rounding the new weights to float32 leaves 1e-5, a missing weight_decay 5e-4.
_TOLERANCE = 1e-4

# The tensors that a step must read and write: the parameter and its gradient; with Adam's two moments.
_PASSES: dict[type[Optimizer], int] = {SGD: 3, Adam: 7, AdamW: 7}

# By the kind of device. On a GPU the fused ones are the only peers.
_KINDS: dict[str, tuple[type[Optimizer], ...]] = {"cpu": (SGD, AdamW), "cuda": (SGD, Adam, AdamW)}
_TIERS: dict[str, tuple[dict[str, bool], ...]] = {
    "cpu": ({}, {"foreach": True}, {"fused": True}),
    "cuda": ({"fused": True},),
}


def step_candidates(source: Sequence[Tensor]) -> list[Candidate]:
    """The contenders of the steps; they share their memory, so they are built already."""
    return [Candidate.of(contender) for contender in step_contenders(source)]


def step_contenders(source: Sequence[Tensor]) -> list[Contender]:
    """Every optimizer and tier of the device, three times each. All of them step the same copy of the parameters."""
    params = [p.detach().clone().requires_grad_() for p in source]
    generator = torch.Generator(params[0].device).manual_seed(1)
    gradients = [
        torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype).mul_(_GRADIENT_SCALE) for p in params
    ]
    oracle = Oracle(source, Strengths(l1=0.0, l2=_WEIGHT_DECAY / 2))
    contenders = []
    device = params[0].device.type
    for kind in _KINDS[device]:
        for options in _TIERS[device]:
            optimizer = kind(params, lr=_LEARNING_RATE, weight_decay=0.0, **options)
            step = _Step(optimizer, oracle, params, gradients)
            family = ", ".join([kind.__name__, *(f"{name}={value}" for name, value in options.items())])
            moved = _PASSES[kind] * sum(p.nbytes for p in params)
            contenders += [
                Contender("fused_reg", "ours", moved, step.with_penalty, step.verify_penalty, family),
                Contender("weight_decay", "peer", moved, step.with_weight_decay, step.verify_weight_decay, family),
                Contender("no penalty", "limit", moved, step.alone, step.verify_alone, family, True),
            ]
    return contenders


@dataclass(frozen=True)
class _Step:
    """An optimizer whose three forms share its state, so that none of them has the better memory."""

    optimizer: Optimizer
    oracle: Oracle  # of the parameters before any step
    params: Sequence[Tensor]
    gradients: Sequence[Tensor]  # of the loss

    def alone(self) -> None:
        self.optimizer.param_groups[0]["weight_decay"] = 0.0
        self.optimizer.step()

    def with_weight_decay(self) -> None:
        self.optimizer.param_groups[0]["weight_decay"] = _WEIGHT_DECAY
        self.optimizer.step()

    def with_penalty(self) -> Tensor:
        value = fused_reg.fused_penalty(self.params, l2=self.oracle.strengths.l2)
        value.backward()
        self.alone()
        return value

    def verify_alone(self) -> Errors:
        self._restart()
        self.alone()
        return self._step_error(coupled=0.0, decoupled=0.0)

    def verify_weight_decay(self) -> Errors:
        self._restart()
        self.with_weight_decay()
        if isinstance(self.optimizer, AdamW):
            return self._step_error(coupled=0.0, decoupled=_WEIGHT_DECAY)
        return self._step_error(coupled=_WEIGHT_DECAY, decoupled=0.0)

    def verify_penalty(self) -> Errors:
        self._restart()
        value = self.with_penalty().detach()
        self._step_error(coupled=_WEIGHT_DECAY, decoupled=0.0)
        grads = [p.grad for p in self.params if p.grad is not None]
        return self.oracle.check("ours", value, grads, self.gradients)

    def _restart(self) -> None:
        self.optimizer.state.clear()
        for p, source, gradient in zip(self.params, self.oracle.params, self.gradients, strict=True):
            p.detach().copy_(source.detach())
            p.grad = gradient.clone()

    def _step_error(self, coupled: float, decoupled: float) -> Errors:
        """Of the first step, by the optimizers' formulas in float64.

        Raises:
            WrongResultError: the step is another one.
        """
        error = norm = 0.0
        for tensors in zip(self.params, self.oracle.params, self.gradients, strict=True):
            for p, source, gradient in pieces(*tensors):
                w = source.double()
                direction = gradient.double() + coupled * w
                if isinstance(self.optimizer, Adam | AdamW):  # both moments are the first gradient's
                    direction = direction / (direction.abs() + _EPS) + decoupled * w
                step = -_LEARNING_RATE * direction
                error += (p.double() - w - step).square().sum().item()
                norm += step.square().sum().item()
        relative = math.sqrt(error / norm)
        if not relative <= _TOLERANCE:
            raise WrongResultError(f"{type(self.optimizer).__name__}'s step is {relative:.3g} off")
        return Errors(gradient=relative)
