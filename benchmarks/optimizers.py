"""The contenders of a whole optimizer step: with `weight_decay`, with our penalty, and with neither, the floor.

For SGD and Adam the two are the same thing, ``l2 = weight_decay / 2``. AdamW's `weight_decay` is decoupled: another
regularization, at a price that can be compared. A `Regularizer` that is attached has L1 as well, as has the loop in the
loss that it is compared with.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

import fused_reg
from benchmarks.checks import Errors, Strengths, Tensors, WrongResultError, pieces
from benchmarks.contenders import OURS, Contender, Problem, Work, gradients
from fused_reg import reference

ATTACHED, ATTACHED_PROX = "fused_reg attached", "fused_reg attached, prox"
LOOP_IN_LOSS, WEIGHT_DECAY, NO_PENALTY = "loop in the loss", "weight_decay", "no penalty"

_LEARNING_RATE, _WEIGHT_DECAY, _GRADIENT_SCALE = 1e-3, 0.01, 0.1
_EPS = 1e-8  # Adam's default
_NONE, _RIDGE, _ELASTIC_NET = ({"l1": l1, "l2": l2} for l1, l2 in ((0.0, 0.0), (0.0, 0.005), (1e-3, 0.005)))

# Of the step, by Euclidean norms: rounding the new weights to float32 leaves 1e-5, a missing weight_decay 5e-4.
_TOLERANCE = 1e-4

# The tensors that a step must read and write: the parameter and its gradient; with Adam's two moments.
_PASSES: dict[type[Optimizer], int] = {SGD: 3, Adam: 7, AdamW: 7}

# By the kind of device. On a GPU the fused ones are the only peers.
KINDS = {
    "cpu": [(kind, options) for kind in (SGD, AdamW) for options in ({}, {"foreach": True}, {"fused": True})],
    "cuda": [(kind, {"fused": True}) for kind in (SGD, Adam, AdamW)],
}


class Form(NamedTuple):
    """A way to step: with a penalty in the loss, a regularizer attached, or the optimizer's own."""

    name: str
    role: str
    strengths: Strengths
    penalty: Callable[..., Tensor] | None = None
    attach: str | None = None  # the mode
    families: str = ""  # those whose name ends so


# Attached to the fused optimizers only, because it costs all tiers the same; the loop takes long.
FORMS = (
    Form(OURS, "ours", _RIDGE, fused_reg.fused_penalty),
    Form(WEIGHT_DECAY, "peer", _RIDGE),
    Form(NO_PENALTY, "limit", _NONE),
    Form(ATTACHED, "ours", _ELASTIC_NET, attach="grad", families="fused=True"),
    Form(ATTACHED_PROX, "ours", _ELASTIC_NET, attach="prox", families="fused=True"),
    Form(LOOP_IN_LOSS, "peer", _ELASTIC_NET, reference.loop, families="SGD, fused=True"),
)


def optimizer_steps(problem: Problem) -> Iterator[Contender]:
    """Every optimizer and tier of the device, in every form. All step one copy of the parameters, and those of a family
    share the optimizer's state, so that none has the better memory."""
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    device = params[0].device
    like = {"generator": torch.Generator(device).manual_seed(1), "device": device, "dtype": params[0].dtype}
    grads = [torch.randn(p.shape, **like).mul_(_GRADIENT_SCALE) for p in params]
    for kind, options in KINDS[problem.device]:
        family = ", ".join([kind.__name__, *(f"{name}={value}" for name, value in options.items())])
        state: dict[Tensor, Any] = defaultdict(dict)
        for form in (form for form in FORMS if family.endswith(form.families)):
            make = partial(_work, problem, form, partial(kind, params, lr=_LEARNING_RATE, **options), state, grads)
            yield Contender(form.name, form.role, make, family, _PASSES[kind], form.name == NO_PENALTY)


def _work(
    problem: Problem, form: Form, kind: Callable[..., Optimizer], state: dict[Tensor, Any], grads: Tensors
) -> Work:
    """Of an optimizer of the kind; `grads` are those of the loss."""
    optimizer = kind(weight_decay=_WEIGHT_DECAY if form.name == WEIGHT_DECAY else 0.0)
    optimizer.state = state
    params = optimizer.param_groups[0]["params"]
    attached = form.attach and fused_reg.Regularizer(params, **form.strengths).attach(optimizer, mode=form.attach)

    def step() -> Tensor:
        value = form.penalty(params, **form.strengths)
        value.backward()
        optimizer.step()
        return value.detach()

    call = step if form.penalty else optimizer.step

    def verify() -> Errors:
        state.clear()
        for p, source, grad in zip(params, problem.params, grads, strict=True):
            p.detach().copy_(source.detach())
            p.grad = grad.clone()
        value = call()
        errors = Errors(gradient_error=_step_error(form, optimizer, problem.params, grads))
        if form.attach == "grad" and (value := attached.value) is None:
            raise WrongResultError("the attached regularizer was not called")
        oracle = problem.oracle(form.strengths)
        return errors if value is None else oracle.check(form.role, value, gradients(params), grads)

    return Work(call, verify)


def _step_error(form: Form, optimizer: Optimizer, sources: Tensors, grads: Tensors) -> float:
    """Of the first step, by the optimizers' formulas in float64."""
    is_decoupled = form.name == WEIGHT_DECAY and isinstance(optimizer, AdamW)
    in_gradient = _NONE if is_decoupled or form.attach == "prox" else form.strengths
    error = norm = 0.0
    for tensors in zip(optimizer.param_groups[0]["params"], sources, grads, strict=True):
        for p, source, grad in pieces(*tensors):
            w = source.double()
            direction = grad.double() + in_gradient["l1"] * w.sign() + 2 * in_gradient["l2"] * w
            if isinstance(optimizer, Adam | AdamW):  # both moments are the first gradient's
                direction = direction / (direction.abs() + _EPS) + is_decoupled * _WEIGHT_DECAY * w
            after = w - _LEARNING_RATE * direction
            if form.attach == "prox":
                reference.prox_(after, **form.strengths, step=_LEARNING_RATE)
            error += (p.double() - after).square().sum().item()
            norm += (after - w).square().sum().item()
    if not (relative := math.sqrt(error / norm)) <= _TOLERANCE:
        raise WrongResultError(f"{type(optimizer).__name__}'s step is {relative:.3g} off")
    return relative
