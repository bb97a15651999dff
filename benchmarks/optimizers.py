"""The contenders that are steps of optimizers.

Beside those with L1, L2 and the value are torch's with `weight_decay`, which is ``l2 = weight_decay / 2`` (AdamW's is
decoupled: another regularization, at a price that can be compared), and those without either.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_reg.optim
from benchmarks import checks
from benchmarks import contenders as c
from benchmarks.checks import MODES, STEP_MODES, Errors, Problem, Tensors, WrongResultError
from benchmarks.contenders import NO_PENALTY, Contender, Peer, Work
from fused_reg import reference
from fused_reg.regularizer import strays

_LEARNING_RATE, _GRADIENT_SCALE = 1e-3, 0.1
_BOTH, _DECAY, _NO_DECAY = {"l1": 1e-3, "l2": 0.005}, {"weight_decay": 0.01}, {"weight_decay": 0.0}
_TOLERANCE = 1e-4  # of the step, by Euclidean norms: rounding the weights leaves 1e-5, a missing weight_decay 5e-4


class Kind(NamedTuple):
    """An optimizer."""

    name: str
    options: Mapping[str, Any]
    passes: int  # the tensors read and written: the parameter, its gradient, the states
    tier: str = "fused"  # the fastest of torch's


OPTIMIZERS = {
    "SGD": Kind("SGD", {}, 3),
    "SGD with momentum": Kind("SGD", {"momentum": 0.9}, 5),
    "Adam": Kind("Adam", {}, 7),
    "AdamW": Kind("AdamW", {}, 7),
    "RMSprop": Kind("RMSprop", {}, 5, "foreach"),
    "Adagrad": Kind("Adagrad", {}, 5),
}
_FUSED = tuple(name for name, kind in OPTIMIZERS.items() if kind.tier == "fused")
_COMPILED = ("SGD", "AdamW", "RMSprop")  # a minute each


class Form(NamedTuple):
    """A way to step: with a penalty in the pass, attached or in the loss, with weight decay, or with neither."""

    name: str
    role: str
    options: Mapping[str, Any] = {}
    module: ModuleType = torch.optim
    tier: str | None = None  # of torch's; None: the fastest
    penalty: Callable[..., Tensor] | None = None
    attach: str | None = None  # the mode
    peer: str = ""  # of which it is a form
    families: Sequence[str] = tuple(OPTIMIZERS)
    modes: Sequence[str] = ("step",)

    @property
    def how(self) -> str | None:
        """By which the penalty gets into the weights."""
        if self.options.get("prox"):
            return "prox"
        return self.attach or ("grad" if self.penalty or "l1" in self.options else None)


# Attached to the fastest tier only, because it costs all the same. The loop takes long, and so does compiling.
FORMS = (
    Form(MODES["step"].ours, "ours", _BOTH, fused_reg.optim, modes=STEP_MODES),
    Form("torch fused, weight_decay", "peer", _DECAY, families=_FUSED, modes=STEP_MODES),
    Form("torch foreach, weight_decay", "peer", _DECAY, tier="foreach"),
    Form("torch, weight_decay", "peer", _DECAY, tier=""),
    Form("torch.compile, weight_decay", "peer", _DECAY, tier="", peer=c.COMPILED_LOOP, families=_COMPILED),
    Form(NO_PENALTY, "limit", _NO_DECAY, modes=STEP_MODES),
    Form("fused_reg.optim, no penalty", "ours", _NO_DECAY, fused_reg.optim),
    Form("fused_reg.optim, prox", "ours", _BOTH | {"prox": True}, fused_reg.optim),
    Form("fused_reg in the loss", "ours", penalty=fused_reg.fused_penalty),
    Form("loop in the loss", "peer", penalty=reference.loop, peer=c.LOOP, families=("SGD", "AdamW")),
    Form(MODES["attached"].ours, "ours", attach="grad", modes=("attached",)),
    Form("fused_reg attached, prox", "ours", attach="prox", modes=("attached",)),
    Form("fused_reg attached to fused_reg.optim", "ours", {}, fused_reg.optim, attach="grad", modes=("attached",)),
)


def optimizer_steps(problem: Problem, mode: str = "step", peers: Sequence[Peer] = ()) -> Iterator[Contender]:
    """Every optimizer in every form that the device has; all step one copy of the parameters, and those of a family
    share the optimizer's state, so that none has the better memory."""
    warnings.filterwarnings("ignore", "attach: ")  # what is attached to others, and L2 beside weight_decay: on purpose
    while strays._hooks:  # of an earlier mode's attachments: every step of any optimizer would call them
        strays._hooks.pop().remove()
    if problem.params[0].dtype == torch.bfloat16:  # it moves by less than its rounding: a step cannot be checked
        return
    params = [p.detach().clone().requires_grad_() for p in problem.params]
    generator = torch.Generator(params[0].device).manual_seed(1)
    grads = [torch.empty_like(p).normal_(0, _GRADIENT_SCALE, generator=generator) for p in params]
    names = ("", *(peer.name for peer in peers))
    for family, kind in OPTIMIZERS.items():
        state: dict[Tensor, Any] = defaultdict(dict)
        for form in [form for form in FORMS if mode in form.modes and form.peer in names and family in form.families]:
            if problem.device == "cpu" or form.tier in (None, kind.tier):
                make = partial(_step_work, problem, form, kind, params, grads, state)
                yield Contender(form.name, form.role, make, family, kind.passes, form.name == NO_PENALTY)


def _step_work(problem: Problem, form: Form, kind: Kind, params: Tensors, grads: Tensors, state: dict) -> Work:
    tier = kind.tier if form.tier is None else form.tier
    options = kind.options | form.options
    if tier and (form.module is torch.optim or problem.device != "cpu"):  # there it says where the states' counts are
        options |= {tier: True}
    optimizer = getattr(form.module, kind.name)(params, lr=_LEARNING_RATE, **options)
    state.update(() if state else optimizer.state)
    optimizer.state = state
    attached = form.attach and fused_reg.Regularizer(params, **_BOTH).attach(optimizer, mode=form.attach)
    step = torch.compile(optimizer.step, dynamic=False) if form.peer == c.COMPILED_LOOP else optimizer.step

    def step_with_loss() -> Tensor:
        value = form.penalty(params, **_BOTH)
        value.backward()
        step()
        return value.detach()

    def restart() -> None:
        """In the same memory, for which a step was compiled; of all of these optimizers, states begin as zeros."""
        for p, source, grad in zip(params, problem.params, grads, strict=True):
            p.detach().copy_(source.detach())
            p.grad = torch.empty_like(grad) if p.grad is None else p.grad
            p.grad.copy_(grad)
        for x in [x for states in state.values() for x in states.values()]:
            x.zero_()

    call = step_with_loss if form.penalty else step

    def verify() -> Errors:
        restart()
        value = call()
        error = _step_error(form, kind, params, problem.params, grads)
        if form.how is None or form.attach == "prox":
            return None, error
        if form.module is fused_reg.optim:
            return problem.check("ours", _BOTH, attached.value if attached else optimizer.penalty)[0], error
        return problem.check(form.role, _BOTH, attached.value if attached else value, c.gradients(params), grads)

    if form.peer != c.COMPILED_LOOP:
        return Work(call, verify)
    restart()
    return Work(call, verify, problem.compiler.seconds(f"step of {kind.name}", call, wants_grad=False))


def _step_error(form: Form, kind: Kind, params: Tensors, sources: Tensors, grads: Tensors) -> float:
    """Of the first step, by torch's optimizer in float64, with the reference's gradient and proximal step."""
    error = norm = 0.0
    options = kind.options | {name: x for name, x in form.options.items() if name in _DECAY}
    for tensors in zip(params, sources, grads, strict=True):
        for p, source, grad in checks.pieces(*tensors):
            before = source.double()
            after = before.clone()
            after.grad = grad.double()
            if form.how == "grad":
                after.grad += reference.value_and_grad(before, **_BOTH)[1][0]
            getattr(torch.optim, kind.name)([after], lr=_LEARNING_RATE, **options).step()
            if form.how == "prox":
                reference.prox_(after, **_BOTH, step=_LEARNING_RATE)
            error += (p.double() - after).square().sum().item()
            norm += (after - before).square().sum().item()
    if not (relative := math.sqrt(error / norm)) <= _TOLERANCE:
        raise WrongResultError(f"{kind.name}'s step is {relative:.3g} off")
    return relative
