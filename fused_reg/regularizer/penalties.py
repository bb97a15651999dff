"""What an argument list, a rule or a mark of a `Regularizer` says, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fused_reg._arguments import check_constant, is_number
from fused_reg._terms import ABSENT, CONSTRAINTS, KINDS, OF_LAYERS, SHAPES, LayerGroup, check_group
from fused_reg.regularizer.strengths import ZeroShare, check_signature, checked, identity, is_absent
from fused_reg.schedules import Ramp, parsed_pattern


@dataclass(eq=False)
class GivenZeros:
    """A share of zeros as it is given in one place. What has it from there reaches it together."""

    given: ZeroShare
    _parts: dict[GivenZeros | None, GivenZeros] = field(default_factory=dict)

    def in_place_of(self, other: GivenZeros | None) -> GivenZeros:
        """The same share for what has had another, which goes on reaching it by itself."""
        return self._parts.setdefault(other, GivenZeros(self.given))

    @property
    def is_none(self) -> bool:
        """Whether it is 0, which drops an aim as it drops a term."""
        return self.given == 0.0


@dataclass(frozen=True)
class Penalty:
    """Strengths as given, ``zeros`` beside them, and what a norm is of."""

    given: Mapping[str, Any]  # for each of `KINDS` as `Given`, and of "zeros" as `GivenZeros`; or None
    group: LayerGroup = "tensor"

    @property
    def is_empty(self) -> bool:
        return all(self.given[term] is None for term in (*ABSENT, "zeros"))

    @property
    def key(self) -> object:
        """Equal for penalties that are."""
        given = (said.given if isinstance(said, GivenZeros) else said for said in self.given.values())
        return (*(x if isinstance(x, str) else identity(x) for x in given), self.group)


def drops(name: str, said: Any) -> bool:
    """Whether it is the number that drops its term, its constraint or an aim."""
    return said.is_none if isinstance(said, GivenZeros) else name in ABSENT and is_absent(name, said)


def as_penalty(function: str, where: str = "", **given: Any) -> Penalty:
    """The penalty of these arguments of a function, checked; ``where`` of them begins the message of an error."""
    where = f"{function}: {where}"
    group = given.pop("group", "tensor")
    check_group(where, group, OF_LAYERS)
    strengths = given_strengths(function, where, **given)
    return Penalty({kind: strengths.get(kind) for kind in (*KINDS, "zeros")}, group)


def checked_keys(where: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A dictionary of strengths, checked for names that are no arguments; ``where`` begins the message of an error."""
    allowed = [*KINDS, "group", "zeros"]
    unknown = [key for key in given if key not in allowed]
    if unknown:
        raise ValueError(f"{where} must have keys of {', '.join(allowed)}, got {unknown[0]!r}")
    return given


def given_strengths(function: str, where: str, **given: Any) -> dict[str, Any]:
    """Those that are given, and ``zeros``, checked."""
    for name in given:
        if name not in (*KINDS, "zeros"):
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")  # as Python says it
    strengths: dict[str, Any] = {k: checked(k, where + k, given[k]) for k in KINDS if given.get(k) is not None}
    for kind in {*SHAPES, *CONSTRAINTS} & strengths.keys():
        check_constant(where + kind, strengths[kind])
    zeros = as_zeros(f"{where}zeros", given.get("zeros"))
    return strengths if zeros is None else {**strengths, "zeros": zeros}


def as_zeros(name: str, zeros: Any) -> GivenZeros | None:
    """What is given, checked; ``name`` begins the message of an error."""
    if isinstance(zeros, str):
        parsed_pattern(name, zeros)
    elif is_number(zeros):
        zeros = as_share(name, zeros)
    elif isinstance(zeros, Ramp):
        for end in ("start", "end"):
            as_share(f"{name}: {end} of {type(zeros).__name__}", getattr(zeros, end))
    elif callable(zeros) and not isinstance(zeros, Tensor):
        check_signature(name, zeros)
    elif zeros is not None:
        raise TypeError(f'{name} must be a share, a schedule of it or a pattern as "2:4", got {type(zeros).__name__}')
    return None if zeros is None else GivenZeros(zeros)


def as_share(name: str, share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"{name} must be a share from 0 to below 1, got {share}")
    return float(share)
