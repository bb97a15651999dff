"""A share of zeros as the aim of a `Regularizer`: what is given, what is counted together, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING

from fused_reg._arguments import is_dtensor
from fused_reg._terms import LayerGroup, check_runs, group_text
from fused_reg.regularizer.penalties import as_share
from fused_reg.regularizer.strengths import Held, Schedule, ZeroShare, known, scheduled
from fused_reg.schedules import PatternRamp, Ramp, parsed_pattern

if TYPE_CHECKING:
    from fused_reg.regularizer.entry import Entry


@dataclass(eq=False)
class Aim:
    """One aim, which the entries that have it reach together, or each by itself. ``share``: of now; of a pattern the
    share of what it leaves to be zero."""

    given: ZeroShare
    group: LayerGroup  # as given; "tensor": elements are counted, not groups
    is_each: bool
    step: InitVar[int]
    function: InitVar[str] = "Regularizer"  # that gives it
    share: float = field(init=False)

    def __post_init__(self, step: int, function: str) -> None:
        self.share = self.at(step, function)

    @property
    def pattern(self) -> tuple[int, int] | None:
        """How many of how many elements that follow on one another may be other than zero."""
        text = self.given.pattern if isinstance(self.given, PatternRamp) else self.given
        return parsed_pattern("Regularizer: zeros", text) if isinstance(text, str) else None

    @property
    def schedule(self) -> Schedule | None:
        return self.given if callable(self.given) else None

    def at(self, step: int, function: str = "Regularizer") -> float:
        """The share at this step, checked."""
        if isinstance(self.given, str):
            return 1.0
        if isinstance(self.given, float):
            return self.given
        share = scheduled("", f"{function}: zeros", self.given, step)
        return share if self.pattern else as_share(f"{function}: zeros at step {step}", share)

    @property
    def share_of_all(self) -> float:
        """Of all elements, or groups, of now."""
        pattern = self.pattern
        return self.share if pattern is None else self.share * (pattern[1] - pattern[0]) / pattern[1]

    @property
    def text(self) -> str:
        if isinstance(self.given, float | str):
            return f"zeros={self.given!r}".replace("'", '"')
        pattern = f', "{self.given.pattern}"' if isinstance(self.given, PatternRamp) else ""
        return f"zeros={self.share_of_all:g} (schedule{pattern})"

    def check(self, function: str, entries: Sequence[Entry]) -> None:
        """Raises where these cannot have it together, whatever their weights and strengths are."""
        for entry in entries:
            where = f"{function}: zeros of {entry.name!r}"
            if is_dtensor(entry.param):
                raise TypeError(f"{where} must be of plain tensors, got a DTensor, of which each process has a part")
            if self.pattern is not None and self.group != "tensor":
                raise ValueError(f"{where} must be of elements where they are a pattern, got {group_text(self.group)}")
            apart = [name for name, x in entry.references() if x is not None]
            apart += [entry.joint_by] * (entry.joint_by != "" and self.group != "tensor")
            if apart:
                raise ValueError(
                    f"{where} must come without {apart[0]}, got both; give one to a Regularizer of its own"
                )
        for pool in self.pools([e for e in entries if e.param.requires_grad]):
            sizes = [e.param.numel() if self.group == "tensor" else e.group_count for e in pool]
            largest = max(self.given.start, self.given.end) if isinstance(self.given, Ramp) else self.given
            count = round(largest * sum(sizes)) if isinstance(largest, float) else None
            if count in (0, sum(sizes)):
                what = "elements" if self.group == "tensor" else f"groups ({group_text(self.group)})"
                raise ValueError(
                    f"{function}: zeros={largest} must leave some and make others zero, but of the {sum(sizes)} "
                    f"{what} of {pool[0].name!r}{' and others' * (len(pool) > 1)} it makes {count} zero"
                )

    def check_fits(self, function: str, entry: Entry, strengths: Mapping[str, Held]) -> None:
        """Raises where an entry with these strengths, of its size of now, cannot have it, as far as the host knows."""
        lower, upper = (known(strengths[kind]) for kind in ("lower", "upper"))
        if (lower is not None and lower > 0) or (upper is not None and upper < 0):
            raise ValueError(
                f"{function}: zeros of {entry.name!r} must be within its bounds, which leave zero out: lower={lower}, "
                f"upper={upper}"
            )
        p = entry.param
        if self.group != "tensor":
            check_runs(f"{function}: params[{entry.name!r}]", p, entry.group)
        if (pattern := self.pattern) is not None:
            size = p[0].numel() if p.ndim > 1 and len(p) else p.numel()
            if p.ndim < 2 or size % pattern[1] != 0:
                raise ValueError(
                    f"{function}: zeros of {entry.name!r}: the rows must have a multiple of {pattern[1]} elements, to "
                    f'be "{pattern[0]}:{pattern[1]}", got shape {tuple(p.shape)}; leave it out with exclude, or '
                    "weights_only"
                )

    def is_to_watch(self, entry: Entry) -> bool:
        """Whether that may change from step to step."""
        has_runs = self.pattern is not None or isinstance(self.group, tuple)
        return has_runs or not all(isinstance(entry.strengths[kind], float) for kind in ("lower", "upper"))

    def pools(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        """Those that reach it together."""
        if self.is_each:
            return [[entry] for entry in entries]
        return [list(entries)] if entries else []


def aims_of(entries: Sequence[Entry]) -> list[tuple[Aim, list[Entry]]]:
    """Each aim with those that have it."""
    found: dict[int, tuple[Aim, list[Entry]]] = {}
    for entry in entries:
        if entry.aim is not None:
            found.setdefault(id(entry.aim), (entry.aim, []))[1].append(entry)
    return list(found.values())


def new_aims(
    function: str, entries: Sequence[Entry], given: ZeroShare, is_each: bool, step: int
) -> list[tuple[Aim, list[Entry]]]:
    """Of entries that shall reach it together: one for each kind of their groups."""
    pools: dict[LayerGroup, list[Entry]] = {}
    for entry in entries:
        pools.setdefault(entry.named_group, []).append(entry)
    return [(Aim(given, group, is_each, step, function), own) for group, own in pools.items()]


def check_aims(
    function: str,
    pools: Iterable[tuple[Aim, Sequence[Entry]]],
    strengths: Callable[[Entry], Mapping[str, Held]] = attrgetter("strengths"),
    are_new: bool = False,
) -> None:
    """Raises where entries, with the strengths that they have or are about to have, cannot have these aims."""
    for aim, own in pools:
        if are_new:
            aim.check(function, own)
        for entry in own:
            aim.check_fits(function, entry, strengths(entry))
