"""The launches of an optimizer's step: each one call of the operator, of parameters whose steps differ in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fused_reg import _devices, _ops
from fused_reg._arguments import check_values, is_dtensor
from fused_reg._terms import DEFAULTS, NUMBERS, Strengths
from fused_reg.distributed.shards import laid_out_as
from fused_reg.regularizer.strengths import Column, Held, identity, tensor_of

# Options of a step (``csrc/passes/step.h``), beside those of `Prox`.
MAXIMIZE, DECOUPLED, NESTEROV, MOMENTUM, AMSGRAD, CENTERED, UNSCALE = 1, 2, 4, 8, 16, 32, 256


class Place(NamedTuple):
    """Where a parameter is; ``processes``: that have a part of it each."""

    device: torch.device
    processes: Any = None
    is_cut: bool = False  # a DTensor


class Batch(NamedTuple):
    """Parameters of one group of the optimizer that can be in one launch."""

    group: int
    place: Place
    norms: int  # what l2_norm takes the norms of; 0: none
    params: list[Tensor]
    states: list[dict[str, Any]]
    keys: tuple[str, ...]  # of the states
    strengths: Mapping[str, list[Held]]  # one for each parameter, or for all; those of the group are `Numbers.own`
    toward: Sequence[Tensor] = ()  # or one for each; of DTensors the shards
    importance: Sequence[Tensor] = ()


class Numbers(NamedTuple):
    """Those of a group."""

    options: int
    rates: tuple[float, ...]  # as in `Formula`
    own: Mapping[str, Held]  # the step, and strengths that all parameters have
    is_fixed: bool  # whether none can change in place, but for what the operator itself reads
    may_be_inert: bool


class Lists(NamedTuple):
    """What the operator takes of a launch at a step."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[Any]  # None: not there yet
    counts: Sequence[Tensor]


class Launch:
    """``processes``: that have a part of it each, if it is of DTensors."""

    def __init__(self, optimizer: Any, parts: Sequence[tuple[Batch, Numbers]]) -> None:
        batch, numbers = parts[0]
        self.params = [p for part, _ in parts for p in part.params]
        self.processes = batch.place.processes
        self._is_sharded = batch.place.is_cut
        self._states = [state for part, _ in parts for state in part.states]
        self._keys = batch.keys
        self._has_counts = optimizer._makes_states
        self._all_keys = (*batch.keys, "step") if self._has_counts else batch.keys
        self._name = type(optimizer).__name__
        self._pass, self._options = optimizer._pass, numbers.options
        self._rates: Sequence[float] = numbers.rates
        if any(own.rates != numbers.rates for _, own in parts):
            self._rates = [x for part, own in parts for _ in part.params for x in own.rates]
        columns = {kind: _column(parts, kind) for kind in NUMBERS}
        self._columns = {kind: column for kind, column in columns.items() if isinstance(column, Column)}
        ready: Any = [() if kind in self._columns else column for kind, column in columns.items()]
        references = ([x for part, _ in parts for x in own(part)] for own in (_toward_of, _importance_of))
        self._strengths = Strengths.of(ready, batch.norms, *references)

    def lists(self) -> Lists | None:
        """None where the kernels do not take them."""
        if self._is_sharded:
            return self._lists_of_shards()
        found = _ops.gather(self.params, self._states, self._all_keys)
        if found is None:
            grads: Any = [p.grad for p in self.params]
            found = grads, *([self._held(state, key) for state in self._states] for key in self._all_keys)
        return self._as_lists(self.params, *found)

    def _held(self, state: dict[str, Any], key: str) -> Any:
        return state[key] if self._has_counts else state.get(key)

    def check(self) -> None:
        """Raises where a strength is wrong, before another launch writes."""
        if not _devices.is_at_hand(self.params[0]):  # a GPU is not waited for
            return
        named = {kind: column.get() for kind, column in self._columns.items()}
        named |= self._strengths.named_tensors()
        check_values({f"{self._name}: {k}": x for k, x in named.items() if k != "step" and isinstance(x, Tensor)})

    def _as_lists(self, params: list[Tensor], grads: list[Any], *of_keys: list[Any]) -> Lists:
        counts = of_keys[-1] if self._has_counts else ()
        return Lists(params, grads, [x for k, _ in enumerate(self._keys) for x in of_keys[k]], counts)

    @torch.no_grad()
    def _lists_of_shards(self) -> Lists | None:
        params: Any = self.params
        of_keys = [[self._held(state, key) for state in self._states] for key in self._all_keys]
        like = [[p.grad for p in params], *of_keys[: len(self._keys)]]
        for xs in like:
            for i, (p, x) in enumerate(zip(params, xs, strict=True)):
                if x is not None:
                    if not is_dtensor(x) or x.placements != p.placements:  # a sum that is pending, for example
                        return None
                    xs[i] = x.to_local()
        return self._as_lists([p.to_local() for p in params], *like, *of_keys[len(self._keys) :])

    def run(self, lists: Any, grad_scale: Tensor | None, found_inf: Tensor | None, is_none: bool) -> Tensor:
        """The step; returns the penalty before it, float64, of DTensors the share of this process. A step that is none
        makes the states, as torch.distributed.checkpoint wants it, without the penalty."""
        params, grads, states, counts = lists
        is_first: list[bool] = []
        if not self._has_counts and any(x is None for x in states):
            if found_inf is not None and bool(found_inf):  # else there were states that nobody has written
                return torch.zeros((), dtype=torch.float64)
            is_first = [x is None for x in states]
            states = [
                torch.empty_like(p, dtype=g.dtype) if x is None else x
                for p, g, x in zip(params, grads, states, strict=True)
            ]
        options, strengths = self._options, self._strengths
        if grad_scale is not None:
            options |= UNSCALE
        scaler = [
            x if x is None else _devices.reachable(x, params[0].device).reshape(()) for x in (grad_scale, found_inf)
        ]
        if self._columns:
            strengths = strengths.having(**{kind: cast(Tensor, column.get()) for kind, column in self._columns.items()})
        if is_none:
            strengths = Strengths.of([() for _ in NUMBERS]).having(step=strengths.columns()[NUMBERS.index("step")])
        numbers = is_first, self._pass, options, self._rates, *scaler, *strengths
        try:
            value = _ops.step_(params, grads, states, counts, *numbers)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self._name}: {error}") from error
        if any(is_first):
            for p, held, state in zip(self.params, self._states, states, strict=True):
                held[self._keys[0]] = laid_out_as(p, state)
        if self._is_sharded:
            increment_version(self.params)
        return value


_toward_of, _importance_of = attrgetter("toward"), attrgetter("importance")


def _column(parts: Sequence[tuple[Batch, Numbers]], kind: str) -> Any:
    """The numbers of a kind, as the operators take them; or where they have to be gathered at each step, how."""
    if not any(kind in batch.strengths or kind in numbers.own for batch, numbers in parts):
        return ()
    default = DEFAULTS.get(kind, 0.0)
    held = [batch.strengths.get(kind) or [numbers.own.get(kind, default)] for batch, numbers in parts]
    distinct = list({identity(x): x for xs in held for x in xs}.values())
    first = distinct[0]
    if len(distinct) == 1:
        if not isinstance(first, float):
            return tensor_of(first)
        return (first,) if first != 0 or kind == "step" else ()
    each: list[Held] = []
    for xs, (batch, _) in zip(held, parts, strict=True):
        each += xs * len(batch.params) if len(xs) == 1 else xs
    return tuple(each) if all(isinstance(x, float) for x in distinct) else Column(each)
