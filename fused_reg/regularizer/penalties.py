"""What an argument list, a rule or a mark of a `Regularizer` says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fused_reg._arguments import check_constant
from fused_reg._terms import ABSENT, CONSTRAINTS, KINDS, OF_LAYERS, SHAPES, LayerGroup, check_group
from fused_reg.regularizer.strengths import Given, ZeroShare, checked, identity


@dataclass(frozen=True)
class Penalty:
    """What an argument list, a rule or a mark says: strengths as given, and what a norm is of."""

    given: Mapping[str, Given]  # for each of `KINDS`
    group: LayerGroup = "tensor"
    zeros: ZeroShare | None = None  # the share aimed at

    @property
    def is_empty(self) -> bool:
        return self.zeros is None and all(self.given[term] is None for term in ABSENT)

    @property
    def key(self) -> object:
        """Equal for penalties that are."""
        return (*map(identity, self.given.values()), self.group)


def as_penalty(function: str, where: str = "", **given: Any) -> Penalty:
    """The penalty of these arguments of a function, checked; ``where`` of them begins the message of an error."""
    where = f"{function}: {where}"
    group = given.pop("group", "tensor")
    check_group(where, group, OF_LAYERS)
    strengths = given_strengths(function, where, **given)
    return Penalty({kind: strengths.get(kind) for kind in KINDS}, group)


def checked_keys(where: str, given: Mapping[str, Any], *others: str) -> Mapping[str, Any]:
    """A dictionary of strengths, checked for names that are no arguments; ``where`` begins the message of an error."""
    allowed = [*KINDS, "group", *others]
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise ValueError(f"{where} must have keys of {', '.join(allowed)}, got {unknown[0]!r}")
    return given


def given_strengths(function: str, where: str, **given: Any) -> dict[str, Given]:
    """Those that are given, checked."""
    for name in given:
        if name not in KINDS:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")  # as Python says it
    strengths: dict[str, Given] = {k: checked(k, where + k, given[k]) for k in KINDS if given.get(k) is not None}
    for kind in {*SHAPES, *CONSTRAINTS} & strengths.keys():
        check_constant(where + kind, strengths[kind])
    return strengths
