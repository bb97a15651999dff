"""The contenders of a whole optimizer step: with `weight_decay`, with our penalty, and with neither, the floor.

For SGD and Adam the two are the same thing, ``l2 = weight_decay / 2``. AdamW's `weight_decay` is decoupled: another
regularization, at a price that can be compared. A `Regularizer` that is attached has L1 as well, as has the loop in the
loss that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

import fused_reg
from benchmarks.checks import Errors, Oracle, Strengths, WrongResultError, pieces
from benchmarks.race import Candidate, Contender
from benchmarks.rows import Role
from fused_reg import reference

#: An attached `Regularizer`, by its mode; the other ways to the first's result; and to a part of it.
ATTACHED, ATTACHED_PROX = "fused_reg attached", "fused_reg attached, prox"
LOOP_IN_LOSS, WEIGHT_DECAY, NO_PENALTY = "loop in the loss", "weight_decay", "no penalty"

#: The family that has a target, and all forms.
FUSED_SGD = "SGD, fused=True"

_LEARNING_RATE = 1e-3
_WEIGHT_DECAY = 0.01
_NONE = Strengths(l1=0.0, l2=0.0)
_RIDGE = Strengths(l1=0.0, l2=_WEIGHT_DECAY / 2)
_ELASTIC_NET = Strengths(l1=1e-3, l2=_WEIGHT_DECAY / 2)
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
    """Every optimizer and tier of the device, in every form. All of them step the same copy of the parameters."""
    params = [p.detach().clone().requires_grad_() for p in source]
    generator = torch.Generator(params[0].device).manual_seed(1)
    gradients = [
        torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype).mul_(_GRADIENT_SCALE) for p in params
    ]
    ridge, elastic_net = Oracle(source, _RIDGE), Oracle(source, _ELASTIC_NET)
    contenders = []
    device = params[0].device.type
    for kind in _KINDS[device]:
        for options in _TIERS[device]:
            family = ", ".join([kind.__name__, *(f"{name}={value}" for name, value in options.items())])
            bytes_ = _PASSES[kind] * sum(p.nbytes for p in params)
            contenders += _Step(kind, options, ridge, elastic_net, params, gradients).contenders(family, bytes_)
    return contenders


class _Step:
    """An optimizer in its forms, which share its state, so that none of them has the better memory."""

    def __init__(
        self,
        kind: type[Optimizer],
        options: dict[str, bool],
        ridge: Oracle,  # of the parameters before any step
        elastic_net: Oracle,  # likewise
        params: Sequence[Tensor],
        gradients: Sequence[Tensor],  # of the loss
    ) -> None:
        self._ridge, self._elastic_net = ridge, elastic_net
        self._source, self._params, self._gradients = ridge.params, params, gradients
        self._optimizer, self._attached, self._attached_prox = (
            kind(params, lr=_LEARNING_RATE, weight_decay=0.0, **options) for _ in range(3)
        )
        self._attached.state = self._attached_prox.state = self._optimizer.state
        strengths = asdict(_ELASTIC_NET)
        self._handle = fused_reg.Regularizer(params, **strengths).attach(self._attached)
        fused_reg.Regularizer(params, **strengths).attach(self._attached_prox, mode="prox")

    def contenders(self, family: str, moved: int) -> list[Contender]:
        """Composed, with `weight_decay` and alone; attached only to the fused optimizer, because it costs all tiers the
        same, and the loop, which takes long, only beside one of them."""
        contenders = [
            Contender("fused_reg", "ours", moved, self._composed, self._verify_composed, family),
            Contender(WEIGHT_DECAY, "peer", moved, self._with_weight_decay, self._verify_weight_decay, family),
            Contender(NO_PENALTY, "limit", moved, self._alone, self._verify_alone, family, True),
        ]
        if "fused=True" in family:
            contenders += [
                Contender(ATTACHED, "ours", moved, self._attached.step, self._verify_attached, family),
                Contender(ATTACHED_PROX, "ours", moved, self._attached_prox.step, self._verify_prox, family),
            ]
        if family == FUSED_SGD:
            contenders.append(Contender(LOOP_IN_LOSS, "peer", moved, self._with_loop, self._verify_loop, family))
        return contenders

    def _alone(self) -> None:
        self._optimizer.param_groups[0]["weight_decay"] = 0.0
        self._optimizer.step()

    def _with_weight_decay(self) -> None:
        self._optimizer.param_groups[0]["weight_decay"] = _WEIGHT_DECAY
        self._optimizer.step()

    def _composed(self) -> Tensor:
        value = fused_reg.fused_penalty(self._params, l2=_RIDGE.l2)
        value.backward()
        self._alone()
        return value.detach()

    def _with_loop(self) -> Tensor:
        value = reference.loop(self._params, _ELASTIC_NET.l1, _ELASTIC_NET.l2)
        value.backward()
        self._alone()
        return value.detach()

    def _verify_alone(self) -> Errors:
        self._restart()
        self._alone()
        return self._step_error()

    def _verify_weight_decay(self) -> Errors:
        self._restart()
        self._with_weight_decay()
        if isinstance(self._optimizer, AdamW):
            return self._step_error(decoupled=_WEIGHT_DECAY)
        return self._step_error(_RIDGE)

    def _verify_composed(self) -> Errors:
        self._restart()
        return self._checked("ours", self._composed(), self._ridge)

    def _verify_attached(self) -> Errors:
        self._restart()
        self._attached.step()
        if (value := self._handle.value) is None:
            raise WrongResultError("the attached regularizer was not called")
        return self._checked("ours", value, self._elastic_net)

    def _verify_prox(self) -> Errors:
        self._restart()
        self._attached_prox.step()
        return self._step_error(prox=_ELASTIC_NET)

    def _verify_loop(self) -> Errors:
        self._restart()
        return self._checked("peer", self._with_loop(), self._elastic_net)

    def _restart(self) -> None:
        self._optimizer.state.clear()
        for p, source, gradient in zip(self._params, self._source, self._gradients, strict=True):
            p.detach().copy_(source.detach())
            p.grad = gradient.clone()

    def _checked(self, role: Role, value: Tensor, oracle: Oracle) -> Errors:
        """Of a step whose penalty is in `.grad`: the step, the value and the gradient."""
        self._step_error(oracle.strengths)
        grads = [p.grad for p in self._params if p.grad is not None]
        return oracle.check(role, value, grads, self._gradients)

    def _step_error(self, coupled: Strengths = _NONE, decoupled: float = 0.0, prox: Strengths = _NONE) -> Errors:
        """Of the first step, by the optimizers' formulas in float64.

        Raises:
            WrongResultError: the step is another one.
        """
        error = norm = 0.0
        for tensors in zip(self._params, self._source, self._gradients, strict=True):
            for p, source, gradient in pieces(*tensors):
                w = source.double()
                direction = gradient.double() + coupled.l1 * w.sign() + 2 * coupled.l2 * w
                if isinstance(self._optimizer, Adam | AdamW):  # both moments are the first gradient's
                    direction = direction / (direction.abs() + _EPS) + decoupled * w
                after = w - _LEARNING_RATE * direction
                if prox != _NONE:
                    reference.prox_(after, prox.l1, prox.l2, step=_LEARNING_RATE)
                error += (p.double() - after).square().sum().item()
                norm += (after - w).square().sum().item()
        relative = math.sqrt(error / norm)
        if not relative <= _TOLERANCE:
            raise WrongResultError(f"{type(self._optimizer).__name__}'s step is {relative:.3g} off")
        return Errors(gradient=relative)
