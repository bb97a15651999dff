"""Optimizers of torch with the L1/L2 penalty in the pass of their own step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_reg import _ops
from fused_reg._arguments import PLAIN_TYPES, as_column, as_number, is_number
from fused_reg._terms import Column, Strengths
from fused_reg.functional import fused_penalty
from fused_reg.in_place import accumulate_grad_, prox_

#: What becomes of the penalty in a step: its gradient is the loss's, or its proximal operator follows the step, with
#: the learning rate or with the rate of each element.
Prox: TypeAlias = "bool | Literal['preconditioned']"

# Options of a step (``csrc/passes/step.h``).
_MAXIMIZE, _DECOUPLED, _NESTEROV, _MOMENTUM, _AMSGRAD, _CENTERED = 1, 2, 4, 8, 16, 32
_PROX: dict[Prox, int] = {False: 0, True: 64, "preconditioned": 64 + 128}
_UNSCALE = 256

_grad_of = attrgetter("grad")

_KEYS = ("l1", "l2", "prox")


class _Plan(NamedTuple):
    """What steps of a group have in common while nothing changes."""

    values: list[Any]  # the group's, as they were
    params: list[Tensor]  # with a gradient
    rest: list[Tensor]  # those without
    held: list[dict[str, Any]]  # the states
    options: int
    rates: list[float]
    strengths: Strengths
    keys: Sequence[str]


class _Rest(NamedTuple):
    """Parameters that a step leaves alone, whose penalty is computed when somebody looks."""

    params: list[Tensor]
    l1: float | Tensor
    l2: float | Tensor

    def penalty(self) -> Tensor:
        with torch.no_grad():
            return fused_penalty(self.params, self.l1, self.l2)


class _OnePass(Optimizer):
    """What the five have in common; each is of this class and of torch's."""

    _pass: ClassVar[int]  # in the order of csrc/passes/passes.h
    _lists: ClassVar[int]  # of torch's `_init_group`
    _last: list[Tensor | _Rest] | None = None  # the penalty of the last step, in parts
    _plans: list[_Plan]
    _counts: ClassVar[bool] = True  # whether its state has the number of steps

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        theirs = next((c for c in cls.__mro__ if c.__module__.startswith("torch.optim.")), None)
        if theirs is None or "_pass" not in vars(cls):
            return
        signature = inspect.signature(theirs.__init__)
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, default, annotation in (("l1", 0.0, float), ("l2", 0.0, float), ("prox", False, Prox))
        ]
        parameters = [*signature.parameters.values(), *own]
        cls.__signature__ = signature.replace(parameters=parameters[1:])  # type: ignore[attr-defined]

    def __init__(
        self, params: Any, *args: Any, l1: float | Tensor = 0.0, l2: float | Tensor = 0.0, prox: Prox = False, **kwargs: Any
    ) -> None:
        own = {"l1": l1, "l2": l2, "prox": prox}
        self._check(own, f"{type(self).__name__}: ")
        self._own_defaults = own
        self._plans = []
        super().__init__(params, *args, **kwargs)
        self.defaults.update(own)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = {key: self.defaults.get(key, self._own_defaults[key]) for key in _KEYS}
        given = own | param_group
        self._check(given, f"{type(self).__name__}: param_group: ")
        if given.get("differentiable", self.defaults.get("differentiable")):
            raise ValueError(
                f"{type(self).__name__}: differentiable must be False, got True; take torch.optim.{type(self).__name__}"
            )
        super().add_param_group(own | param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = [{key: group[key] for key in _KEYS} for group in self.param_groups]
        for i, group in enumerate(state_dict.get("param_groups", ())):
            self._check(group, f"{type(self).__name__}.load_state_dict: param_groups[{i}]: ")
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, own, strict=True):
            for key, value in kept.items():  # a state dict of torch's class has none of them
                group.setdefault(key, value)

    def _check(self, group: Mapping[str, Any], where: str) -> None:
        for key in ("l1", "l2"):
            strength = group.get(key, 0.0)
            if isinstance(strength, Tensor):
                if strength.ndim != 0 or not strength.is_floating_point():
                    raise ValueError(
                        f"{where}{key} must be a float or a 0-dim floating point tensor, got {strength.dtype} of shape "
                        f"{tuple(strength.shape)}"
                    )
            elif not is_number(strength):
                raise TypeError(f"{where}{key} must be a float or a 0-dim tensor, got {type(strength).__name__}")
            else:
                as_number(f"{where}{key}", strength)
        prox = group.get("prox", False)
        if not isinstance(prox, bool | str) or prox not in _PROX:
            raise ValueError(f'{where}prox must be False, True or "preconditioned", got {prox!r}')

    @property
    def penalty(self) -> Tensor:
        """The penalty of the parameters before the last step, 0-dim, on their device, without a synchronization; before
        the first step, the penalty now."""
        parts: Sequence[Tensor | _Rest] | None = self._last
        if parts is None:
            parts = [_Rest(group["params"], group["l1"], group["l2"]) for group in self.param_groups]
        values = [part if isinstance(part, Tensor) else part.penalty() for part in parts]
        if not values:
            return torch.zeros(())
        return values[0] if len(values) == 1 else torch.stack([v.to(values[0].device) for v in values]).sum()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """A step of the optimizer, with the penalty in it. ``closure``: computes the loss anew, and returns it."""
        check = getattr(self, "_accelerator_graph_capture_health_check", None) or self._cuda_graph_capture_health_check  # type: ignore[attr-defined]
        check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.is_cpu and bool(found_inf):
            return loss
        if not self._is_plain():
            self._step_in_turn(found_inf)
            return loss
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        last: list[Tensor | _Rest] = []
        for i, group in enumerate(self.param_groups):
            plan = self._plan(i, group)
            params, grads = plan.params, [p.grad for p in plan.params]
            states = [held[key] for key in plan.keys for held in plan.held]
            is_first: list[bool] = []
            steps: list[Tensor] = []
            if self._counts:
                steps = [held["step"] for held in plan.held]
            elif plan.keys:
                is_first = [x is None for x in states]
                if any(is_first):
                    states = [torch.empty_like(p) if x is None else x for p, x in zip(params, states, strict=True)]
            options = plan.options if grad_scale is None else plan.options | _UNSCALE
            if params:
                last.append(
                    _ops.step_(
                        params, grads, states, steps, is_first, self._pass, options, plan.rates, grad_scale,
                        *plan.strengths,
                    )
                )  # fmt: skip
            if any(is_first):
                for held, x in zip(plan.held, states, strict=True):
                    held["momentum_buffer"] = x
            if plan.rest:
                last.append(_Rest(plan.rest, group["l1"], group["l2"]))
        self._last = last
        return loss

    def _is_plain(self) -> bool:
        """Whether the kernels take the parameters as they are."""
        return all(
            PLAIN_TYPES.issuperset(map(type, group["params"])) and all(p.is_cpu for p in group["params"])
            for group in self.param_groups
        )

    def _plan(self, i: int, group: dict[str, Any]) -> _Plan:
        """That of the last step, if it still holds."""
        values = list(group.values())
        if i < len(self._plans):
            plan = self._plans[i]
            params = group["params"]
            if (
                all(map(is_, values, plan.values))
                and len(values) == len(plan.values)
                and len(params) == len(plan.params)
                and all(map(is_, params, plan.params))
                and not any(map(is_, map(_grad_of, params), repeat(None)))
                and all(map(is_, map(self.state.get, params), plan.held))
            ):
                return plan
            del self._plans[i:]
        params = [p for p in group["params"] if p.grad is not None]
        for j, p in enumerate(params):
            grad = p.grad
            assert grad is not None
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__}: params[{j}].grad must be dense (torch.strided), got {grad.layout}"
                )
        keys = self._state_keys(group)
        held = [self.state[p] for p in params] if keys else []
        if self._counts and not all(held):
            self._init_group(group, *([] for _ in range(self._lists)))  # type: ignore[attr-defined]  # makes them
        elif not self._counts:
            for state in held:
                state.setdefault("momentum_buffer", None)
        rest = [p for p in group["params"] if p.grad is None] if not (group["l1"] is group["l2"] == 0) else []
        options = self._options(group) | _PROX[group["prox"]] | (_MAXIMIZE if group["maximize"] else 0)
        l1, l2 = (as_column(type(self).__name__, key, group[key], params) for key in ("l1", "l2"))
        lr = group["lr"]
        column: Column = lr.reshape(()) if isinstance(lr, Tensor) else (float(lr),)
        rates = [float(x) for x in self._rates(group)]
        plan = _Plan(values, params, rest, held, options, rates, Strengths.of((l1, l2, (), column)), keys)
        self._plans.append(plan)
        return plan

    def _step_in_turn(self, found_inf: Tensor | None) -> None:
        """The same where no kernel takes a step: the penalty's gradient, torch's step, and the proximal step."""
        scale = getattr(self, "grad_scale", None)
        self._last = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            rest = [p for p in group["params"] if p.grad is None]
            if group["prox"] == "preconditioned":
                raise NotImplementedError(
                    f'{type(self).__name__}: prox="preconditioned" is supported for plain tensors on the CPU'
                )
            if group["l1"] is group["l2"] == 0:
                continue
            sign = -1.0 if group["maximize"] else 1.0
            if params and group["prox"]:
                self._last.append(_Rest(params, group["l1"], group["l2"]).penalty())
            elif params:
                factor = sign if scale is None else scale * sign
                self._last.append(accumulate_grad_(params, group["l1"], group["l2"], scale=factor))
            if rest:
                self._last.append(_Rest(rest, group["l1"], group["l2"]))
        theirs: Any = super().step
        while getattr(theirs, "hooked", False):  # or the hooks of a step would run twice
            theirs = theirs.__wrapped__.__get__(self)
        theirs()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params and group["prox"] and not (group["l1"] is group["l2"] == 0):
                step = group["lr"] if found_inf is None else group["lr"] * (1 - found_inf.reshape(()))
                prox_(params, group["l1"], group["l2"], step=step)

    # What one optimizer has of its own.

    def _state_keys(self, group: Mapping[str, Any]) -> Sequence[str]:
        raise NotImplementedError

    def _options(self, group: Mapping[str, Any]) -> int:
        raise NotImplementedError

    def _rates(self, group: Mapping[str, Any]) -> Iterable[Any]:
        """weight_decay, the first and the second decay, eps."""
        raise NotImplementedError


class SGD(_OnePass, torch.optim.SGD):
    """SGD"""

    _pass, _lists, _counts = 0, 3, False

    def _state_keys(self, group: Mapping[str, Any]) -> Sequence[str]:
        return ("momentum_buffer",) if group["momentum"] != 0 else ()

    def _options(self, group: Mapping[str, Any]) -> int:
        return (_MOMENTUM if group["momentum"] != 0 else 0) | (_NESTEROV if group["nesterov"] else 0)

    def _rates(self, group: Mapping[str, Any]) -> Iterable[Any]:
        return group["weight_decay"], group["momentum"], group["dampening"], 0.0


class Adam(_OnePass, torch.optim.Adam):
    """Adam"""

    _pass, _lists = 1, 6

    def _state_keys(self, group: Mapping[str, Any]) -> Sequence[str]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _options(self, group: Mapping[str, Any]) -> int:
        return (_AMSGRAD if group["amsgrad"] else 0) | (_DECOUPLED if group["decoupled_weight_decay"] else 0)

    def _rates(self, group: Mapping[str, Any]) -> Iterable[Any]:
        return group["weight_decay"], *group["betas"], group["eps"]


class AdamW(Adam, torch.optim.AdamW):
    """AdamW"""

    _pass, _lists = 1, 6


class RMSprop(_OnePass, torch.optim.RMSprop):
    """RMSprop"""

    _pass, _lists = 2, 6

    def _state_keys(self, group: Mapping[str, Any]) -> Sequence[str]:
        keys = ["square_avg"]
        keys += ["momentum_buffer"] if group["momentum"] > 0 else []
        return keys + (["grad_avg"] if group["centered"] else [])

    def _options(self, group: Mapping[str, Any]) -> int:
        return (_MOMENTUM if group["momentum"] > 0 else 0) | (_CENTERED if group["centered"] else 0)

    def _rates(self, group: Mapping[str, Any]) -> Iterable[Any]:
        return group["weight_decay"], group["momentum"], group["alpha"], group["eps"]


class Adagrad(_OnePass, torch.optim.Adagrad):
    """Adagrad"""

    _pass, _lists = 3, 4

    def _state_keys(self, group: Mapping[str, Any]) -> Sequence[str]:
        return ("sum",)

    def _options(self, group: Mapping[str, Any]) -> int:
        return 0

    def _rates(self, group: Mapping[str, Any]) -> Iterable[Any]:
        return group["weight_decay"], group["lr_decay"], 0.0, group["eps"]
