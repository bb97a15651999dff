"""The reference weights and importances of a `Regularizer`: a tensor for each parameter, found by its names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import Module, Parameter

from fused_reg._arguments import are_run, is_dtensor
from fused_reg._references import check_apart, check_importance, check_like, expanded, followed
from fused_reg._terms import ABSENT
from fused_reg.regularizer.keys import Named
from fused_reg.regularizer.names import names_beside

#: By name, as a state dict; or one for each parameter, in their order.
Weights: TypeAlias = "Mapping[str, Tensor] | Iterable[Tensor]"
#: ``"start"``: the weights as they are when the regularizer sees them first.
Toward: TypeAlias = "Weights | Literal['start']"


def as_weights(name: str, given: Any) -> Any:
    """What is given, read once: None, a word, a dictionary or a list."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, Tensor | Module) or not isinstance(given, Iterable):
        hint = "; pass its `state_dict()`" if isinstance(given, Module) else ""
        raise TypeError(
            f"Regularizer: {name} must be a state dict or a list of tensors, got {type(given).__name__}{hint}"
        )
    if isinstance(given, Mapping) and not given:
        raise ValueError(f"Regularizer: {name} must have a tensor, got an empty dict; leave it out for none")
    return dict(given) if isinstance(given, Mapping) else list(given)


class References:
    """Those that are given, by `as_weights`, as they are now. ``is_saved``: whether they are in a state."""

    def __init__(self, toward: Any, importance: Any, is_saved: bool | None) -> None:
        self.is_start = isinstance(toward, str)
        if isinstance(toward, str) and toward != "start":
            raise ValueError(f'Regularizer: toward must be tensors, a state dict or "start", got {toward!r}')
        if is_saved not in (None, True, False):
            raise TypeError(f"Regularizer: save_references must be None, True or False, got {is_saved!r}")
        if is_saved and toward is None and importance is None:
            raise ValueError("Regularizer: save_references=True must come with toward or importance, got none")
        self.is_saved = self.is_start if is_saved is None else is_saved
        if isinstance(importance, str):
            raise TypeError("Regularizer: importance must be a state dict or a list of tensors, got str")
        self._given: dict[str, Any] = {"toward": None if self.is_start else toward, "importance": importance}
        self._has_any = self.is_start or any(x is not None for x in self._given.values())
        self._own: dict[str, dict[str, Tensor]] = {"toward": {}, "importance": {}}  # in the place of what is given
        self.converted: dict[tuple[str, str], Tensor] = {}  # by kind and name, at the last look

    def read(self, candidates: Sequence[Named], module: Module | None) -> None:
        """Of the parameters that a regularizer chooses from: gives the tensors of a list their names, and raises where
        a name is nobody's. A state dict may have the buffers of the module."""
        for name, given in self._given.items():
            if isinstance(given, list):
                if len(given) != len(candidates):
                    raise ValueError(
                        f"Regularizer: {name} must have one tensor per parameter ({len(candidates)}), got {len(given)}"
                    )
                self._given[name] = {c.names[0]: x for c, x in zip(candidates, given, strict=True)}
        owners = {n: c for c in candidates for n in c.names}
        for kind, given in self._given.items():
            others = {*names_beside(module)} if kind == "toward" and given and module is not None else set()
            found: dict[str, str] = {}  # of each parameter, by its first name: the name that gives its tensor
            for name in given or ():
                if (owner := owners.get(name)) is not None:
                    first = found.setdefault(owner.names[0], name)
                    if not _are_same(given[first], given[name]):
                        raise ValueError(
                            f"Regularizer: {kind} of {first!r}, a tied parameter, must be one tensor, got another for "
                            f"{name!r}"
                        )
                elif name not in others:
                    what = "parameters, or buffers of the module," if kind == "toward" else "parameters,"
                    raise ValueError(f"Regularizer: {kind} must name {what} got {name!r}")

    def check_used(self, entries: Sequence[Any]) -> None:
        """Raises where importances are of nothing that has a penalty."""
        if self._given["importance"] and all(e.importance is None or not any(map(e.is_given, ABSENT)) for e in entries):
            name = next(iter(self._given["importance"]))
            raise ValueError(
                f"Regularizer: importance must name a parameter with a penalty, got {name!r}, which has none"
            )

    def check_apart(self, entries: Sequence[Any]) -> None:
        """Raises where a reference is in the memory of another of these parameters, whose changes it would follow."""
        if self._has_any and not is_compiling():
            trained = [(f"params[{e.name!r}]", e.param) for e in entries if e.param.requires_grad]
            own = ((f"Regularizer: {kind}[{e.name!r}]", x) for e in entries for kind, x in e.references())
            check_apart(trained, [(name, x) for name, x in own if x is not None])

    def of(self, param: Tensor, names: Sequence[str], before: Any) -> tuple[Tensor | None, Tensor | None]:
        """Those of a parameter. ``before``: the entry that it or its name had."""
        given = {kind: self._find(kind, names) for kind in ("toward", "importance")}
        if self.is_start:
            toward = None if before is None else before.toward
            is_other = toward is None or toward.shape != param.shape or is_dtensor(toward) != is_dtensor(param)
            if toward is None or (is_other and before.param is not param):
                toward = param.detach().clone()
            given["toward"] = toward
        now = given
        if before is not None and (before.param is param or isinstance(param, Parameter)):  # not lent for a while
            now = {kind: followed(x, param) if isinstance(x, Tensor) else x for kind, x in given.items()}
        toward, importance = now["toward"], expanded(now["importance"], param)
        if toward is None and self._given["toward"] is not None:
            raise ValueError(
                f"Regularizer: toward must have a tensor for {names[0]!r}, got none; leave that out with exclude, or "
                "give it to a Regularizer of its own"
            )
        for name, x in (("toward", toward), ("importance", importance)):
            if x is not None:
                where = f"Regularizer: {name}[{names[0]!r}]"
                if not isinstance(x, Tensor):
                    raise TypeError(f"{where} must be a tensor, got {type(x).__name__}")
                check_like(where, x, param, f"params[{names[0]!r}]")
        if importance is not None:
            check_importance(f"Regularizer: importance[{names[0]!r}]", now["importance"])
        self.converted |= {(kind, names[0]): x for kind, x in now.items() if x is not given[kind]}
        return toward, importance

    def follow(self, entries: Sequence[Any]) -> bool:
        """Those of parameters that were converted are, too, as the buffers of a module are; whether there are any."""
        if not self._has_any:  # most regularizers, at every step
            return False
        others = [e for e in entries if _is_other(e.toward, e.param) or _is_other(e.importance, e.param)]
        found = [self.of(e.param, e.names, e) for e in others]
        for e, own in zip(others, found, strict=True):
            e.toward, e.importance = own
        return len(others) > 0

    def keep(self, found: Mapping[tuple[str, str], Tensor]) -> None:
        """What is converted or loaded, in the place of what was given; the weights of the start are with the entry."""
        for (kind, name), x in found.items():
            if self._given[kind] is not None:
                self._own[kind][name] = x

    def _find(self, kind: str, names: Sequence[str]) -> Any:
        for source in (self._own[kind], self._given[kind] or {}):
            for name in names:
                if name in source:
                    return source[name]
        return None

    def state(self, entries: Sequence[Any]) -> dict[str, dict[str, Tensor]]:
        return {
            kind: {e.name: x for e in entries if (x := getattr(e, kind)) is not None}
            for kind in ("toward", "importance")
        }

    def parsed(self, state: Any, entries: Sequence[Any]) -> dict[str, dict[str, Tensor]]:
        """What a state has for these entries, checked."""
        where = "load_state_dict: references"
        if not isinstance(state, Mapping) or set(state) != {"toward", "importance"}:
            raise ValueError(f"{where} must have the keys toward and importance, as `state_dict` gives it")
        found: dict[str, dict[str, Tensor]] = {}
        for kind, saved in state.items():
            own = {e.name: next((n for n in e.names if n in saved), None) for e in entries}
            for e in entries:
                if (own[e.name] is None) != (getattr(e, kind) is None):
                    what = "lacks" if own[e.name] is None else "has the unknown"
                    raise ValueError(f"{where} must be of the same parameters, but {kind} {what} {e.name!r}")
            found[kind] = {}
            for e in entries:
                if (name := own[e.name]) is not None:
                    place = f"{where}: {kind}[{name!r}]"
                    if not isinstance(saved[name], Tensor):
                        raise TypeError(f"{place} must be a tensor, got {type(saved[name]).__name__}")
                    found[kind][e.name] = x = followed(saved[name].detach(), e.param)
                    check_like(place, x, e.param, f"params[{e.name!r}]")
                    if kind == "importance":
                        check_importance(place, x)
        return found

    @torch.no_grad()
    def load(self, found: Mapping[str, Mapping[str, Tensor]], entries: Sequence[Any]) -> None:
        """Takes what was parsed; as copies, because a state may be loaded twice."""
        for kind, own in found.items():
            for e in entries:
                if e.name in own:
                    setattr(e, kind, deepcopy(own[e.name]))  # with its strides
                    self.keep({(kind, e.name): getattr(e, kind)})


def _are_same(x: Any, other: Any) -> bool:
    """Whether two tensors have one value; what they are, and where, is looked at elsewhere."""
    if x is other or not (isinstance(x, Tensor) and isinstance(other, Tensor)):
        return x is other
    is_alike = x.shape == other.shape and x.device == other.device
    return is_alike and (not are_run((x, other)) or bool(((x == other) | (x.isnan() & other.isnan())).all()))


def _is_other(x: Tensor | None, param: Tensor) -> bool:
    return x is not None and (x.dtype is not param.dtype or x.device != param.device)
