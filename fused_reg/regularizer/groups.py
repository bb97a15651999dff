"""Groups of several parameters, as a neuron's weights and its bias, and weights of groups: what is given, and fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor
from torch.nn import Module, Sequential

from fused_reg._arguments import check_constant, is_dtensor
from fused_reg._references import check_importance
from fused_reg._terms import group_text
from fused_reg.regularizer.keys import Named, TypeKey, check_matches, is_type, shown
from fused_reg.regularizer.names import dims, is_bias, walk
from fused_reg.regularizer.references import Weights
from fused_reg.regularizer.strengths import identity, is_absent

if TYPE_CHECKING:
    from fused_reg.regularizer.entry import Entry
    from fused_reg.regularizer.following import Source
    from fused_reg.regularizer.table import Wishes

#: A weight with its bias, or with the layer of a type that follows it; or patterns of the names of a set.
Together: TypeAlias = "Literal['bias'] | TypeKey | Iterable[Literal['bias'] | TypeKey | Iterable[str]]"

#: A factor for each group: the root of its size, or a tensor by name or for each parameter.
GroupWeights: TypeAlias = "Literal['sqrt_size'] | Weights"


def as_together(given: Any) -> list[Any] | None:
    """What is given, read once, checked: rules, and lists of patterns."""
    if given is None:
        return None
    is_one = isinstance(given, str) or is_type(given) or not isinstance(given, Iterable)
    checked: list[Any] = []
    for item in [given] if is_one else given:
        names = [item] if isinstance(item, str | Module) or not isinstance(item, Iterable) else list(item)
        if item == "bias" or is_type(item):
            checked.append(item)
        elif isinstance(item, str) or not all(isinstance(name, str) for name in names):
            raise TypeError(
                f'Regularizer: together must be "bias", a type of layers or lists of names, as [("fc.weight", '
                f'"fc.bias")], got {item!r}'
            )
        else:
            checked.append(tuple(names))
    if not checked:
        what = type(given).__name__
        raise ValueError(f"Regularizer: together must have a set, got an empty {what}; leave it out for none")
    return checked


class Groups:
    """What is given of groups: which are one, by `as_together`, and their weights, by `as_weights`."""

    def __init__(self, together: list[Any] | None, weights: Any) -> None:
        if isinstance(weights, str) and weights != "sqrt_size":
            raise ValueError(f'Regularizer: group_weights must be None, "sqrt_size" or tensors, got {weights!r}')
        self._together = together or []
        self._are_roots = isinstance(weights, str)
        self._weights: Any = None if self._are_roots else weights
        self.are_weighted = weights is not None
        self.are_of_sizes = self._are_roots or together is not None  # what it gives depends on these

    def read(self, candidates: Sequence[Named]) -> None:
        """Of the parameters that a regularizer chooses from: gives the weights of a list their names."""
        if isinstance(self._weights, list):
            if len(self._weights) != len(candidates):
                raise ValueError(
                    f"Regularizer: group_weights must have one tensor per parameter ({len(candidates)}), got "
                    f"{len(self._weights)}"
                )
            self._weights = {c.names[0]: x for c, x in zip(candidates, self._weights, strict=True)}

    def settle(self, entries: Sequence[Entry], source: Source) -> None:
        """Gives each entry those with which its groups are one, and the weights of its groups."""
        for entry in entries:
            if self._are_roots:
                entry.weight = math.sqrt(entry.param.numel() / max(entry.group_count, 1))
        for own in self._sets(entries, source):
            _check_set(own)
            size = sum(entry.param.numel() for entry in own)
            is_mixed = len({_kind(entry) for entry in own}) > 1
            for entry in own:
                entry.together = own
                entry.is_turned = is_mixed and _kind(entry) == "column"
                if self._are_roots:
                    entry.weight = math.sqrt(size / max(entry.group_count, 1))
        self._weigh(entries)

    def _sets(self, entries: Sequence[Entry], source: Source) -> list[list[Entry]]:
        by_rule: dict[int, list[Entry]] = {}  # by the first weight
        sets: list[list[Entry]] = []
        for given in self._together:
            if isinstance(given, tuple):
                sets.append(_named(given, entries, source.candidates))
                continue
            pairs = [*_pairs(given, [e for e in entries if e.given["l2_norm"] is not None], source.module)]
            if not pairs:
                what = "biases" if given == "bias" else f"layers of {shown(given)} that follow in a Sequential"
                raise ValueError(
                    f"Regularizer: together must find weights with {what}, where both have l2_norm, got none"
                )
            for weights, other in pairs:
                by_rule.setdefault(id(weights[0]), weights).append(other)
        places = {id(entry): i for i, entry in enumerate(entries)}
        sets = [sorted(own, key=lambda entry: places[id(entry)]) for own in (*by_rule.values(), *sets)]
        seen: set[int] = set()
        for entry in (entry for own in sets for entry in own):
            if id(entry) in seen:
                raise ValueError(f"Regularizer: together must have each parameter once, got {entry.name!r} twice")
            seen.add(id(entry))
        return sets

    def _weigh(self, entries: Sequence[Entry]) -> None:
        known = {name: entry for entry in entries for name in entry.names}
        for name, weights in (self._weights or {}).items():
            where, entry = f"Regularizer: group_weights[{name!r}]", known.get(name)
            if entry is None or entry.given["l2_norm"] is None:
                raise ValueError(f"Regularizer: group_weights must name parameters with l2_norm, got {name!r}")
            check_weights(where, weights, entry)
            for other in entry.together or [entry]:
                if other.weights is not None:
                    raise ValueError(f"{where} must be of one name for all with which it has groups, got several")
                _check_alone(f"{where} must come without", other)
                other.weights = weights

    def check_change(self, given: Mapping[str, Any], own: Mapping[str, Sequence[Entry]]) -> None:
        """Raises where `set_strength` would give some strengths that do not fit."""
        for entry in own.get("l2_norm", ()):
            if self._together and entry.given["l2_norm"] is None:
                raise ValueError(
                    "set_strength: l2_norm must be of parameters that have one, where together says whose groups are "
                    f"one, got {entry.name!r} without"
                )
            if (other := next((e for e in entry.together if e not in own["l2_norm"]), None)) is not None:
                raise ValueError(
                    f"set_strength: where must mean all whose groups are one, got {entry.name!r} without {other.name!r}"
                )
        for entry in own.get("max_norm", ()):
            if entry.joint_by and not is_absent("max_norm", given["max_norm"]):
                raise ValueError(f"set_strength: max_norm must come without {entry.joint_by}, got {entry.name!r}")


def check_saved(entries: Sequence[Entry], saved: Mapping[str, Wishes]) -> None:
    """Raises where a state would give some strengths that do not fit."""
    for entry in entries:
        first = entry.together[0] if entry.together else entry
        if saved[entry.name]["l2_norm"] != saved[first.name]["l2_norm"]:
            raise ValueError(
                f"load_state_dict: l2_norm of {entry.name!r} must be that of {first.name!r}, because their groups are "
                "one"
            )
        if entry.joint_by and not is_absent("max_norm", saved[entry.name]["max_norm"][0]):
            raise ValueError(f"load_state_dict: max_norm of {entry.name!r} must come without {entry.joint_by}")


def _named(patterns: Sequence[str], entries: Sequence[Entry], candidates: Sequence[Named]) -> list[Entry]:
    for pattern in patterns:
        check_matches("Regularizer", "together", pattern, candidates)
        if not any(entry.matches(pattern) for entry in entries):
            raise ValueError(f"Regularizer: together must name what is regularized, got {pattern!r}, which is left out")
    own = [entry for pattern in patterns for entry in entries if entry.matches(pattern)]
    if len(own) < 2:
        raise ValueError(f"Regularizer: together must name two parameters or more, got {list(patterns)}")
    return own


def _pairs(rule: Any, entries: Sequence[Entry], module: Module | None) -> Iterator[tuple[list[Entry], Entry]]:
    """The weights, each as the parameters that it is computed from, with what a rule puts together with it."""
    named: dict[str, list[Entry]] = {}  # several have a name where a layer computes what it is the name of
    for entry in entries:
        for name in entry.names:
            named.setdefault(name, []).append(entry)

    def parts_of(weight: Entry) -> list[Entry]:
        return [part for part in max((named[name] for name in weight.names), key=len) if _is_weight(part)]

    if rule == "bias":
        for weight in filter(_is_weight, entries):
            if (parts := parts_of(weight))[0] is weight:
                names = (bias for name in weight.names if (bias := _bias_of(name)) != name)
                biases = dict.fromkeys(bias for name in names for bias in named.get(name, ()) if dims(bias.param) > 0)
                yield from ((parts, bias) for bias in biases)
        return
    if module is None:
        raise ValueError(f"Regularizer: together={shown(rule)} needs the layers, got a list of tensors; pass the model")
    own: dict[int, list[Entry]] = {}  # what each layer holds itself
    of_type: set[int] = set()
    for place in walk(module):
        layers = [layer for layer, is_its in place.around if is_its]  # with those that wrap it
        if any(isinstance(layer, rule) for layer in layers):
            of_type.update(map(id, layers))
        for layer in layers:
            own.setdefault(id(layer), []).extend(named.get(place.full_name, ()))
    for sequence in module.modules():
        for layer, following in pairwise(sequence.children()) if isinstance(sequence, Sequential) else ():
            weights = [entry for entry in own.get(id(layer), ()) if _is_weight(entry)]
            if len(weights) > 0 and id(following) in of_type:
                yield from ((parts_of(weights[0]), other) for other in own.get(id(following), ()))


def _is_weight(entry: Entry) -> bool:
    return dims(entry.param) >= 2 and not all(map(is_bias, entry.names))


def _bias_of(name: str) -> str:
    """``fc.bias`` of ``fc.weight``, ``in_proj_bias``, ``bias_ih_l0``."""
    path, dot, own = name.rpartition(".")
    return path + dot + own.replace("weight", "bias")


def _kind(entry: Entry) -> str:
    return entry.group if isinstance(entry.group, str) else entry.group[0]


def _check_set(own: Sequence[Entry]) -> None:
    """Raises unless the groups of these can be one."""
    first = own[0]
    for entry in own:
        if entry.given["l2_norm"] is None:
            raise ValueError(f"Regularizer: together must name parameters with l2_norm, got {entry.name!r} without")
        if entry.runs > 1:
            raise ValueError(
                f"Regularizer: together must come without channels of a convolution with groups={entry.runs}, got "
                f"{entry.name!r}"
            )
        _check_alone("Regularizer: together must come without", entry)
        for what, of, shown_of in (
            ("groups of one kind", _as_rows, lambda e: group_text(e.group)),
            ("as many groups each", lambda e: e.group_count, lambda e: e.group_count),
            ("one l2_norm", lambda e: identity(e.given["l2_norm"]), lambda e: _shown(e.given["l2_norm"])),
        ):
            if of(first) != of(entry):
                raise ValueError(
                    f"Regularizer: together must be of parameters with {what}, got {shown_of(first)} of "
                    f"{first.name!r} and {shown_of(entry)} of {entry.name!r}"
                )


def _check_alone(where: str, entry: Entry) -> None:
    """Raises where an entry has what joint norms do not go with."""
    for name, is_there in (
        ("max_norm", entry.given["max_norm"] is not None),
        ("toward", entry.toward is not None),
        ("importance", entry.importance is not None),
        ("zeros of groups", entry.aim is not None and entry.aim.group != "tensor"),
    ):
        if is_there:
            raise ValueError(f"{where} {name}, got both for {entry.name!r}")


def check_weights(where: str, weights: Any, entry: Entry) -> None:
    """Raises unless there is a finite number >= 0 for each group of an entry."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{where} must be a tensor, got {type(weights).__name__}")
    if is_dtensor(entry.param) or is_dtensor(weights):
        raise TypeError(f"{where} must be of plain tensors, got a DTensor, of which each process has a part")
    if weights.shape != (entry.group_count,) or not weights.is_floating_point():
        raise ValueError(
            f"{where} must have a floating point number for each of {entry.group_count} groups, got "
            f"{weights.dtype} of shape {tuple(weights.shape)}"
        )
    if weights.device != entry.param.device:
        raise ValueError(f"{where} must be on the device of its parameter ({entry.param.device}), got {weights.device}")
    check_constant(where, weights)
    check_importance(where, weights)


def _as_rows(entry: Entry) -> Any:
    """What kind of groups it has, where columns are rows of the transposed tensor."""
    group: Any = entry.group
    if _kind(entry) != "column" or entry.param.ndim < 2:
        return group
    return "row" if group == "column" else ("row", group[1])


def _shown(strength: Any) -> str:
    return f"{strength}" if isinstance(strength, float) else f"a {type(strength).__name__}"
