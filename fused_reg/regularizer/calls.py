"""The fused calls over a part of a `Regularizer`'s table: one call for all of it, whatever the strengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_reg import _ops, _routes
from fused_reg._arguments import (
    as_scale,
    as_step,
    as_strengths,
    check_closed_form,
    no_value,
    relabelled,
    value_dtype,
)
from fused_reg._partitioned import check_whole
from fused_reg._references import behind_checks, relative, with_one_more
from fused_reg._terms import ABSENT, CONSTRAINTS, TERM_OF, Group, Strengths, group_code, group_count
from fused_reg.distributed.buckets import check_sets, value_of
from fused_reg.distributed.joint import Joint
from fused_reg.distributed.parts import are_mixed
from fused_reg.distributed.shards import is_sharded
from fused_reg.functional import fused_penalty
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.fits import fits_of
from fused_reg.regularizer.groups import check_weights
from fused_reg.regularizer.strengths import Column, identity
from fused_reg.regularizer.table import Table

_T = TypeVar("_T")

_REFERENCES = ("toward", "importance")


class _Call:
    """The arguments of one fused call; ``sign``: of the gradient."""

    def __init__(self, entries: Sequence[Entry], places: list[int], group: Group, sign: float, is_one_of: bool) -> None:
        self.params = [entries[i].param for i in places]
        self.sign = sign
        self._whole = [entries[i] for i in places]
        places = [i for i in places for _ in entries[i].cut(entries[i].param)]
        self.is_cut = any(entry.is_cut for entry in self._whole)
        if is_one_of:  # an empty float64 tensor, with any strength: the value is float64, not rounded before the sum
            places = [*places, places[0]]
        own = [entries[i] for i in places]
        self._places = places
        self._params = [entry.param for entry in own]
        if is_one_of:
            with torch.inference_mode(False):
                self._params[-1] = torch.empty(0, dtype=torch.float64, device=self.params[0].device)
        self._names = [entry.name for entry in own]
        self._references: dict[str, Any] = {}
        for name in _REFERENCES:
            if getattr(own[0], name) is not None:
                found = [part for entry in self._whole for part in entry.cut(getattr(entry, name))]
                self._references[name] = with_one_more(found, self._params[-1]) if is_one_of else found
        self._group: Group = group
        self._columns = {
            kind: Column([entry.strengths[kind] for entry in own])
            for kind, term in TERM_OF.items()
            if any(entry.has(term) for entry in own)
        }
        is_fixed = all(column.is_fixed for column in self._columns.values()) and not is_compiling()
        self._fixed = self._as_strengths() if is_fixed else None
        self._steps: Column | None = None  # the last ones of `prox_`
        self._own = own
        self._joint = joint_of(self._whole, len(own)) if own[0].is_joint else None
        if self._joint is not None:
            self._run(check_sets, "Regularizer: ", self._params, self._joint)
        if self._joint is not None and not is_sharded(self._params) and not are_mixed(self._params):
            # Now, not inside a graph that is being compiled.
            counts = [group_count(p, group_code(group)) for p in self._tensors(Tensor.detach)]
            self._joint.at(range(len(own)), [*counts, 0], self._params[0].device)

    @property
    def is_plain(self) -> bool:
        """Whether the operators take its parameters as they are."""
        return not self.is_cut and self._joint is None

    def _tensors(self, of: Callable[[Tensor], Tensor] = lambda p: p) -> list[Tensor]:
        """The list: the parameters, or ``of`` them the parts that have groups of their own."""
        if not self.is_cut:
            return self._params
        parts = [part for entry in self._whole for part in entry.cut(of(entry.param))]
        return parts + self._params[len(parts) :]

    def _as_strengths(self) -> Strengths:
        given, params = self._given(), self._tensors()
        l1, l2 = given.pop("l1", None), given.pop("l2", None)
        strengths = as_strengths("Regularizer", params, l1, l2, given, may_constrain=True)
        if not self._references:
            return strengths
        return relative("Regularizer: ", params, strengths, *(self._references.get(x, []) for x in _REFERENCES))

    def _given(self) -> dict[str, Any]:
        """The strengths, as arguments."""
        given: dict[str, Any] = {kind: column.get() for kind, column in self._columns.items()}
        return given if self._group == "tensor" else {**given, "group": self._group}

    def _strengths(self) -> Strengths:
        strengths = self._fixed or self._as_strengths()
        if self._joint is not None:
            return behind_checks(strengths, *weights_of(self._whole))
        if self._fixed is None or not is_compiling():
            return strengths
        importance = self._references.get("importance", [])
        return behind_checks(strengths, importance, [f"Regularizer: importance[{name!r}]" for name in self._names])

    def penalty(self) -> Tensor:
        given = {name: x for name, x in self._given().items() if name not in CONSTRAINTS}
        if given.keys() <= {"group"}:  # nothing but constraints
            return torch.zeros((), dtype=value_dtype(self._params), device=self._params[0].device)
        if self._joint is not None:
            strengths = self._strengths().having(**dict.fromkeys(CONSTRAINTS, ()))
            return self._run(_routes.penalty, self._tensors(), strengths, False, self._joint)
        if "l2_norm" not in given:
            given.pop("group", None)
        return self._run(lambda: fused_penalty(self._tensors(), **given, **self._references))

    def accumulate_grad_(self, scale: float | Tensor | None, skip_missing: bool) -> Tensor:
        factor = self._factor(scale)
        params, fresh = self._trained(skip_missing)
        args = params, self._strengths(), factor, skip_missing, True, self._joint
        value = self._run(_routes.accumulate_grad_, *args)
        for p, grad in fresh:
            p.grad = grad
        return value

    def _trained(self, skip_missing: bool) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The list with gradients, of parts those of their parameters, and parameters with those that they lack."""
        if not self.is_cut:
            return self._params, []
        parts: list[Tensor] = []
        fresh: list[tuple[Tensor, Tensor]] = []
        for entry in self._whole:
            p, own = entry.param, entry.cut(entry.param.detach())
            grad = p.grad
            if grad is None and not skip_missing:
                grad = torch.zeros_like(p)
                fresh.append((p, grad))
            for part, its in zip(own, () if grad is None else entry.cut(grad), strict=grad is not None):
                part.requires_grad_()
                if its.dtype is not part.dtype:  # which compilers do not know
                    part.grad_dtype = None  # any
                part.grad = its
            parts += own
        return parts + self._params[len(parts) :], fresh

    def add_to(self, grads: list[Tensor], modes: list[int]) -> Tensor:
        """The same of lists that were looked at, without names in errors; nothing is written then."""
        return _ops.accumulate_grad_(self._params, grads, modes, self.sign, None, *self._strengths())

    def check_accumulation(self, scale: float | Tensor | None, skip_missing: bool) -> None:
        """Raises what `accumulate_grad_` would, before anything is written."""
        factor = self._factor(scale)
        self._run(_routes.check_accumulation, self._trained(skip_missing)[0], self._strengths(), factor, skip_missing)

    def _factor(self, scale: float | Tensor | None) -> tuple[float, Tensor | None]:
        if scale is None:
            return self.sign, None
        return as_scale("accumulate_grad_", scale if self.sign > 0 else -scale, self._params)

    def prox_(self, step: float | Tensor | list[float | Tensor]) -> None:
        self._run(_routes.prox_, *self._shrinkage(step), True, self._joint)

    def check_writable(self, step: float | Tensor | list[float | Tensor]) -> None:
        """Raises what `prox_` would, before anything is written."""
        self._run(_routes.check_prox, *self._shrinkage(step))

    def check_closed_form(self, where: str) -> None:
        self._run(check_closed_form, where, self._strengths(), len(self._params))
        self._check_l2_of_sets(where)

    def _check_l2_of_sets(self, where: str) -> None:
        """Raises unless parameters whose groups are one have one l2, without which there is no closed form."""
        for i, j in enumerate(self._joint.sets if self._joint is not None else ()):
            own, its = (identity(self._own[k].strengths["l2"]) for k in (i, j))
            if own != its:
                raise ValueError(
                    f"{where}l2 of {self._names[i]!r} must be that of {self._names[j]!r} in a proximal step, "
                    "because their groups are one"
                )

    def _shrinkage(self, step: float | Tensor | list[float | Tensor]) -> tuple[Any, ...]:
        self._check_l2_of_sets("prox_: ")
        if isinstance(step, list):
            self._steps = Column([step[i] for i in self._places], like=self._steps)
            step = self._steps.get()
        return self._tensors(Tensor.detach), self._strengths().with_step(as_step("prox_", step, self._params))

    def _run(self, function: Callable[..., _T], *args: Any) -> _T:
        """``function(*args)``, whose errors have ``params['fc.weight']`` for ``params[3]`` of this call's list."""
        try:
            return function(*args)
        except (TypeError, ValueError) as error:
            raise named(error, self._names) from error


def weights_of(entries: Sequence[Entry]) -> tuple[list[Tensor], list[str]]:
    """The weights of groups that are given, and what errors call them. Raises where they have become wrong, or their
    parameters."""
    weighted = [(entry, entry.weights) for entry in entries if entry.weights is not None]
    names = [f"Regularizer: group_weights[{entry.name!r}]" for entry, _ in weighted]
    for name, (entry, weights) in zip(names, weighted, strict=True):
        check_weights(name, weights, entry)
    return [weights for _, weights in weighted], names


def joint_of(entries: Sequence[Entry], count: int) -> Joint:
    """Of the parts of these, in a list of so many tensors."""
    sets: list[int] = []
    weights: list[Tensor | None] = []
    first: dict[int, int] = {}
    for entry in entries:
        weights += [None] * entry.runs if entry.weights is None else entry.weights.chunk(entry.runs)
        for i in range(len(sets), len(weights)):
            sets.append(first.setdefault(id(entry.together), i) if entry.together else i)
    rest = range(len(sets), count)
    return Joint([*sets, *rest], [*weights, *(None for _ in rest)])


def named(error: Exception, names: Sequence[str]) -> Exception:
    """The error with ``params['fc.weight']`` for ``params[3]``, where these are the names of a call's parameters."""
    return relabelled(error, list(map(repr, names)))


class Part:
    """Some entries of a table. What is constant between calls is prepared once; whether a parameter is frozen is seen
    at every call."""

    def __init__(
        self, table: Table, entries: Sequence[Entry], maximized: Sequence[bool] = (), is_one_of: bool = False
    ) -> None:
        """``maximized``: of which an optimizer will negate the gradient, which is subtracted: a penalty shrinks;
        ``is_one_of``: the penalty is one of several, and float64."""
        self.entries = list(entries)
        self._table = table
        self.params = [entry.param for entry in entries]
        self._names = [entry.name for entry in entries]
        self._is_one_of = is_one_of
        self._maximized = list(maximized) or [False] * len(self.entries)
        self._version = self._fits_version = -1
        self._chosen: list[bool] = []
        self._device: torch.device | None = None
        self._constrained = ""  # the first of its constraints
        self.calls: list[_Call] = []
        self._current_calls()  # now, not inside a graph that is being compiled

    def check(self) -> None:
        """Raises where a shape or a value has changed so that it does not fit any more: before anything is written."""
        if is_compiling():
            return
        if self._fits_version != self._table.version:
            self._fits, self._fits_version = fits_of(self.entries), self._table.version
        self._fits.check()

    def _current_calls(self, chosen: list[bool] | None = None) -> list[_Call]:
        check_whole("Regularizer", self.params, self._names)
        if chosen is None:
            chosen = [entry.has_penalty for entry in self.entries]
        if chosen != self._chosen or self._version != self._table.version or self.params[0].device != self._device:
            self._table.place_cells()
            self.calls = list(_calls(self.entries, chosen, self._maximized, self._is_one_of))
            self._chosen, self._version, self._device = chosen, self._table.version, self.params[0].device
            self._constrained = next((f"{k} of {e.name!r}" for e in self.entries for k in e.constraints()), "")
        return self.calls

    def penalty(self) -> Tensor:
        self.check()
        calls = self._current_calls()
        return self._total(calls, [call.penalty() for call in calls])

    def accumulate_grad_(self, scale: float | Tensor | None, skip_missing: bool = False) -> tuple[Tensor, Tensor]:
        """Returns the penalty, and what of it belongs to the objective, negative where that is maximized.

        ``scale``: None is 1. ``skip_missing``: a parameter whose gradient is None gets none."""
        self.check()
        self.refuse_constraints("accumulate_grad_: ")
        calls = self._current_calls()
        if len(calls) == 1:
            value = calls[0].accumulate_grad_(scale, skip_missing)
            return value, value if calls[0].sign > 0 else -value
        for call in calls:  # the first must not write if a later one will fail
            call.check_accumulation(scale, skip_missing)
        values = [call.accumulate_grad_(scale, skip_missing) for call in calls]
        value = self._total(calls, values)
        return value, value if all(call.sign > 0 for call in calls) else self._signed(calls, values)

    def objective(self) -> Tensor:
        """The second of these, without a gradient and with a graph."""
        self.check()
        self.refuse_constraints("attach: ")
        calls = self._current_calls()
        return self._signed(calls, [call.penalty() for call in calls])

    def _signed(self, calls: Sequence[_Call], values: list[Tensor]) -> Tensor:
        return self._total(calls, [v if call.sign > 0 else -v for call, v in zip(calls, values, strict=True)])

    def refuse_constraints(self, where: str) -> None:
        """Before a use of values or gradients, which a constraint has not."""
        self._current_calls()
        if self._constrained:
            raise ValueError(f"{where}{no_value(self._constrained)}")

    def check_closed_form(self, where: str) -> None:
        """Raises where the strengths of now have no proximal step."""
        for call in self._current_calls():
            call.check_closed_form(where)

    def prox_(self, step: float | Tensor | list[float | Tensor], chosen: list[bool] | None = None) -> None:
        """``step``: one, or a list with one for each entry; ``chosen``: which entries, of those that require grad. What
        `check` looks at, the caller has checked."""
        calls = self._current_calls(chosen)
        if len(calls) > 1:
            for call in calls:
                call.check_writable(step)
        for call in calls:
            call.prox_(step)

    def _total(self, calls: Sequence[_Call], values: list[Tensor]) -> Tensor:
        if len(values) == 1:
            return values[0]
        if not values:
            return torch.zeros((), dtype=torch.float32, device=self._device)
        return value_of(values, [p for call in calls for p in call.params])


def _calls(
    entries: Sequence[Entry], chosen: Sequence[bool], maximized: Sequence[bool], is_one_of: bool
) -> Iterator[_Call]:
    """One call; more where there are norms of rows beside norms of tensors, or such that are not a parameter's own,
    reference weights or importances of some, and where some gradients are subtracted. A parameter without any strength
    is not even read."""
    places = [i for i, entry in enumerate(entries) if chosen[i] and any(map(entry.has, ABSENT))]
    kinds = list(dict.fromkeys(entries[i].kind for i in places if entries[i].has_norms())) or ["tensor"]
    # For what has no norms, which runs may not fill.
    other: Group = next((kind for kind in kinds if not isinstance(kind, tuple)), "tensor")
    split: dict[tuple[bool, Group, tuple[bool, bool], bool], list[int]] = {}
    for i in places:
        kind = entries[i].kind if entries[i].has_norms() else other
        split.setdefault((maximized[i], kind, entries[i].relation, entries[i].is_joint), []).append(i)
    for (is_maximized, kind, *_), own in split.items():
        kind = kind if any(entries[i].has_norms() for i in own) else "tensor"
        yield _Call(entries, own, kind, -1.0 if is_maximized else 1.0, is_one_of or len(split) > 1)
