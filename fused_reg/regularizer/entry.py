"""A parameter of a `Regularizer` with all that it has: strengths, groups, references, an aim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from fused_reg._arguments import is_dtensor
from fused_reg._terms import CONSTRAINTS, OF_GROUPS, TERM_OF, TOGETHER, Group, LayerGroup, group_code, group_count
from fused_reg.regularizer.keys import Named
from fused_reg.regularizer.strengths import Given, Held, is_absent

if TYPE_CHECKING:
    from fused_reg.regularizer.aims import Aim
    from fused_reg.regularizer.penalties import GivenZeros


@dataclass(eq=False)
class Entry(Named):
    """A parameter and its strengths, also as they were given."""

    param: Tensor
    names: list[str]
    types: dict[str, tuple[type, ...]]
    group: Group
    strengths: dict[str, Held]
    given: dict[str, Given]
    toward: Tensor | None = None
    importance: Tensor | None = None
    weight: float | None = None  # of its groups, by which the strength of their norms is multiplied
    zeros: GivenZeros | None = None
    aim: Aim | None = None
    named_group: LayerGroup = "tensor"  # its group as given, which is that of its aim
    runs: int = 1  # of rows, each of which has groups of its own: those of a convolution with groups
    together: Sequence[Entry] = ()  # those with which its groups are one, itself among them
    is_turned: bool = False  # its groups are columns, and with others, which have rows
    weights: Tensor | None = None  # one for each group, or each of those that are one
    is_lent: bool = False  # not a parameter itself, but in the place of one

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """A tensor of its shape as tensors whose groups are those of its norms, and of its aim."""
        if not self.is_cut:
            return (x,)
        if is_dtensor(x):
            what = "columns together with rows" if self.runs == 1 else "channels of a convolution"
            raise ValueError(
                f"Regularizer: params[{self.name!r}] must be a plain tensor, to have {what}"
                f"{f' with groups={self.runs}' * (self.runs > 1)}, got a DTensor"
            )
        return x.chunk(self.runs) if self.runs > 1 else (x.transpose(0, 1),)

    @property
    def has_penalty(self) -> bool:
        """Whether it counts now: it is not frozen."""
        return self.param.requires_grad or self.is_lent

    @property
    def is_cut(self) -> bool:
        """Whether its groups are those of other tensors."""
        if self.is_turned:
            return self.has_norms()
        return self.runs > 1 and (self.has_norms() or (self.aim is not None and self.aim.group != "tensor"))

    @property
    def kind(self) -> Group:
        """Which groups of `cut` are its own."""
        if not (self.is_turned and self.is_cut):
            return self.group
        return ("row", self.group[1]) if isinstance(self.group, tuple) else "row"

    @property
    def is_joint(self) -> bool:
        """Whether the norms of its groups are not its own alone."""
        return self.joint_by != "" and self.has_norms()

    @property
    def is_first(self) -> bool:
        """Of those with which its groups are one, without what is frozen; of others each is."""
        others = self.together if self.has_norms() else ()
        return next((entry for entry in others if entry.has_penalty), self) is self

    @property
    def joint_by(self) -> str:
        """The argument that says so, if any."""
        return "together" if self.together else "group_weights of tensors" if self.weights is not None else ""

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def group_count(self) -> int:
        return self.runs * group_count(self.param, group_code(self.group))

    def is_given(self, kind: str) -> bool:
        """Whether its term is, or an aim, also as 0 in `set_strength`."""
        return (self.zeros if kind == "zeros" else self.given[TERM_OF[kind]]) is not None

    def weight_of(self, kind: str) -> float | None:
        return self.weight if kind == "l2_norm" else None

    def has(self, term: str) -> bool:
        """Whether a term, or a constraint, is there. A tensor is not looked at."""
        return any(not is_absent(kind, self.strengths[kind]) for kind in TOGETHER[term])

    def has_norms(self) -> bool:
        return any(map(self.has, OF_GROUPS))

    def constraints(self) -> list[str]:
        """Those that are given."""
        return [kind for kind in CONSTRAINTS if not is_absent(kind, self.strengths[kind])]

    def references(self) -> list[tuple[str, Tensor | None]]:
        return [("toward", self.toward), ("importance", self.importance)]

    @property
    def relation(self) -> tuple[bool, bool]:
        """Whether it has reference weights, and importances: entries that differ are in calls of their own."""
        return self.toward is not None, self.importance is not None
