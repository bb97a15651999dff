"""What the steps of an optimizer have in common, kept as long as nothing changes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, is_
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from fused_reg import _devices, _ops
from fused_reg._arguments import PLAIN_TYPES, as_number, check_values, is_number
from fused_reg._partitioned import check_whole
from fused_reg._terms import Column, Strengths

#: How the penalty is in a step: its gradient is added to the loss's, or its proximal operator follows the step, with
#: the learning rate or with the rate of each element.
Prox: TypeAlias = "bool | Literal['preconditioned']"

# Options of a step (``csrc/passes/step.h``).
MAXIMIZE, DECOUPLED, NESTEROV, MOMENTUM, AMSGRAD, CENTERED, UNSCALE = 1, 2, 4, 8, 16, 32, 256
PROX: dict[Prox, int] = {False: 0, True: 64, "preconditioned": 64 + 128}

_GRADS = {*PLAIN_TYPES, type(None)}
_ODD = _ops.UNUSUAL | _ops.SEVERAL_DEVICES | _ops.NEGATED | _ops.ODD_GRAD
_grad_of = attrgetter("grad")


class Formula(NamedTuple):
    """What an optimizer has of its own, for a group."""

    options: int
    rates: Sequence[Any]  # weight_decay, the first and the second decay, eps
    keys: Sequence[str]  # of the states


class Tensors(NamedTuple):
    """Those of a group, as long as it has the same."""

    params: list[Tensor]
    missing: list[bool]  # which have no gradient; none: all have
    taken: list[Tensor]  # with a gradient
    rest: list[Tensor]
    keys: Sequence[str]
    held: list[dict[str, Any]]  # the states


class Numbers(NamedTuple):
    """Those of a group, as long as its options are the same."""

    given: list[Any]  # the values of the group
    are_fixed: bool  # whether none can change in place, but for what the operator itself reads
    options: int
    rates: list[float]
    strengths: Strengths
    may_be_inert: bool


class Plans:
    """Of an optimizer, for each group."""

    def __init__(self) -> None:
        self._last: list[tuple[Tensors, Numbers]] = []
        self._held: list[dict[str, Any]] = []  # the states of all

    def of(self, optimizer: Any) -> list[tuple[Tensors, Numbers, list[Tensor]]] | None:
        """What each group's step takes, with its gradients; None where the kernels do not take one. All of it is known
        before the first group is stepped."""
        has_old = (
            len(optimizer.state) == len(self._held)
            and all(map(is_, optimizer.state.values(), self._held))
            and len(self._last) == len(optimizer.param_groups)
        )
        plans, has_new = [], not has_old
        for i, group in enumerate(optimizer.param_groups):
            params = group["params"]
            grads = list(map(_grad_of, params))
            kinds = set(map(type, grads))
            found = _ops.survey(params)
            if not _GRADS.issuperset(kinds) or found & _ODD or (params and not _devices.has_steps(params[0])):
                return None
            tensors, numbers = self._last[i] if has_old else (None, None)
            given = list(group.values())
            is_same = (
                numbers is not None
                and numbers.are_fixed
                and len(given) == len(numbers.given)
                and all(map(is_, given, numbers.given))
            )
            if numbers is None or not is_same:
                if not isinstance(group["lr"], Tensor) and not 0 <= group["lr"] < math.inf:  # a schedule's rounding
                    return None
                numbers, has_new = self._numbers(optimizer, group, given), True
            missing = list(map(is_, grads, repeat(None))) if type(None) in kinds else []
            if (
                tensors is None
                or len(params) != len(tensors.params)
                or not all(map(is_, params, tensors.params))
                or missing != tensors.missing
                or not all(tensors.held)
                or not (is_same or optimizer._formula(group).keys == tensors.keys)
            ):
                if any(map(Tensor.is_complex, params)):
                    return None
                tensors, has_new = self._tensors(optimizer, group, missing), True
            if has_new and found & _ops.HAS_ATTRIBUTES and has_penalty(group):
                check_whole(type(optimizer).__name__, params)
            plans.append((tensors, numbers, [g for g in grads if g is not None] if missing else grads))
        if has_new:
            self._last = [plan[:2] for plan in plans]
            self._held = list(optimizer.state.values())
        return plans

    @staticmethod
    def _tensors(optimizer: Any, group: dict[str, Any], missing: list[bool]) -> Tensors:
        params, keys = list(group["params"]), optimizer._formula(group).keys
        taken = [p for p in params if p.grad is not None]
        held = [optimizer.state[p] for p in taken] if keys else []
        if optimizer._makes_states and not all(held):
            lists = list(inspect.signature(optimizer._init_group).parameters)[1:]
            optimizer._init_group(group, *([] for _ in lists))
        return Tensors(params, missing, taken, [p for p in params if p.grad is None], keys, held)

    @staticmethod
    def _numbers(optimizer: Any, group: dict[str, Any], given: list[Any]) -> Numbers:
        check_options(f"{type(optimizer).__name__}: ", group)
        lr, (options, rates, _) = group["lr"], optimizer._formula(group)
        is_read = isinstance(lr, Tensor) and lr.is_floating_point()  # by the operator
        columns: list[Column] = [
            x if isinstance(x, Tensor) else (float(x),) if x != 0 else () for x in (group["l1"], group["l2"])
        ]
        columns += [(), lr.reshape(()) if is_read else (float(lr),)]
        options |= PROX[group["prox"]] | (MAXIMIZE if group["maximize"] else 0)
        are_fixed = is_read or type(lr) in (float, int)
        are_fixed &= {type(x) for x in rates} <= {float, int} and type(group.get("betas", ())) is tuple
        floats = [float(x) for x in rates]
        return Numbers(given, are_fixed, options, floats, Strengths.of(columns), isinstance(lr, Tensor) or lr == 0)


def has_penalty(group: Mapping[str, Any]) -> bool:
    return any(isinstance(x, Tensor) or x != 0 for x in (group["l1"], group["l2"]))


def check_options(where: str, group: Mapping[str, Any]) -> None:
    """Raises where an option of ours is wrong."""
    for key in ("l1", "l2"):
        strength = group[key]
        if not isinstance(strength, Tensor):
            if not is_number(strength):
                raise TypeError(f"{where}{key} must be a float or a 0-dim tensor, got {type(strength).__name__}")
            as_number(f"{where}{key}", strength)
        elif strength.ndim != 0 or not strength.is_floating_point():
            what = f"{strength.dtype} of shape {tuple(strength.shape)}"
            raise ValueError(f"{where}{key} must be a float or a 0-dim floating point tensor, got {what}")
        else:
            check_values({f"{where}{key}": strength})
    prox = group["prox"]
    if not isinstance(prox, bool | str) or prox not in PROX:
        raise ValueError(f'{where}prox must be False, True or "preconditioned", got {prox!r}')
    if prox == "preconditioned" and group.get("momentum", 0) >= 1:
        raise ValueError(f'{where}momentum must be < 1 with prox="preconditioned", got {group["momentum"]}')
    if group.get("differentiable"):
        raise ValueError(f"{where}differentiable must be False, got True; take the optimizer of torch.optim")
