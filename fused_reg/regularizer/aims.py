"""A share of zeros as the aim of a `Regularizer`: what is given, what is counted together, and what cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from fused_reg._arguments import is_dtensor, is_number
from fused_reg._terms import LayerGroup, group_text
from fused_reg.regularizer.strengths import Schedule, ZeroShare, check_signature, scheduled
from fused_reg.schedules import PatternRamp, Ramp, parsed_pattern

if TYPE_CHECKING:
    from fused_reg.regularizer.entry import Entry


def checked_zeros(name: str, zeros: Any) -> ZeroShare:
    """What is given, checked; ``name`` begins the message of an error."""
    if isinstance(zeros, str):
        parsed_pattern(name, zeros)
        return zeros
    if is_number(zeros):
        return _as_share(name, zeros)
    if isinstance(zeros, Ramp):
        for end in ("start", "end"):
            _as_share(f"{name}: {end} of {type(zeros).__name__}", getattr(zeros, end))
    elif callable(zeros) and not isinstance(zeros, Tensor):
        check_signature(name, zeros)
    else:
        raise TypeError(f'{name} must be a share, a schedule of it or a pattern as "2:4", got {type(zeros).__name__}')
    return cast(ZeroShare, zeros)


def _as_share(name: str, share: float) -> float:
    if not 0 <= share < 1:
        raise ValueError(f"{name} must be a share from 0 to below 1, got {share}")
    return float(share)


@dataclass(eq=False)
class Aim:
    """One aim, which the entries that have it reach together, or each by itself. ``share``: of now; of a pattern the
    share of what it leaves to be zero."""

    given: ZeroShare
    group: LayerGroup  # as given; "tensor": elements are counted, not groups
    is_each: bool
    share: float = 0.0

    def is_of(self, given: ZeroShare, group: LayerGroup) -> bool:
        is_same = self.given == given if isinstance(given, float | str) else self.given is given
        return is_same and self.group == group

    @property
    def pattern(self) -> tuple[int, int] | None:
        """How many of how many elements that follow on one another may be other than zero."""
        text = self.given.pattern if isinstance(self.given, PatternRamp) else self.given
        return parsed_pattern("Regularizer: zeros", text) if isinstance(text, str) else None

    @property
    def schedule(self) -> Schedule | None:
        return self.given if callable(self.given) else None

    def at(self, step: int) -> float:
        """The share at this step, checked."""
        if isinstance(self.given, str):
            return 1.0
        if isinstance(self.given, float):
            return self.given
        share = scheduled("", "Regularizer: zeros", self.given, step)
        return share if self.pattern else _as_share(f"Regularizer: zeros at step {step}", share)

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

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises where these cannot reach it, whatever their weights are."""
        for entry in entries:
            self._check_fits(entry)
        for pool in self.pools([e for e in entries if e.param.requires_grad]):
            sizes = [_size(entry) for entry in pool]
            largest = max(self.given.start, self.given.end) if isinstance(self.given, Ramp) else self.given
            count = round(largest * sum(sizes)) if isinstance(largest, float) else None
            if count in (0, sum(sizes)):
                what = "elements" if self.group == "tensor" else f"groups ({group_text(self.group)})"
                raise ValueError(
                    f"Regularizer: zeros={largest} must leave some and make others zero, but of the {sum(sizes)} "
                    f"{what} of {pool[0].name!r}{' and others' * (len(pool) > 1)} it makes {count} zero"
                )

    def _check_fits(self, entry: Entry) -> None:
        where, p = f"Regularizer: zeros of {entry.name!r}", entry.param
        if is_dtensor(p):
            raise TypeError(f"{where} must be of plain tensors, got a DTensor, of which each process has a part")
        for name in ("toward", "importance"):
            if getattr(entry, name) is not None:
                raise ValueError(f"{where} must come without {name}, got both; give one to a Regularizer of its own")
        lower, upper = entry.strengths["lower"], entry.strengths["upper"]
        if (isinstance(lower, float) and lower > 0) or (isinstance(upper, float) and upper < 0):
            raise ValueError(f"{where} must be within its bounds, which leave zero out: lower={lower}, upper={upper}")
        if (pattern := self.pattern) is None:
            return
        if self.group != "tensor":
            raise ValueError(f"{where} must be of elements where they are a pattern, got {group_text(self.group)}")
        size = p[0].numel() if p.ndim > 1 and len(p) else p.numel()
        if p.ndim < 2 or size % pattern[1] != 0:
            raise ValueError(
                f'{where}: the rows must have a multiple of {pattern[1]} elements, to be "{pattern[0]}:{pattern[1]}", '
                f"got shape {tuple(p.shape)}; leave it out with exclude, or weights_only"
            )

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


def _size(entry: Entry) -> int:
    is_counted = entry.aim is not None and entry.aim.group != "tensor"
    return entry.group_count if is_counted else entry.param.numel()
