"""What a user may change between two steps without a call: the shape of a parameter, by `.data`, and values of tensors
that stand beside it. It is checked again when it has changed, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import Tensor

from fused_reg._arguments import are_run

#: Raises what is to be said of one of them.
Check: TypeAlias = Callable[[], object]


class Fits:
    """``shapes``: parameters whose shape matters; ``values``: tensors whose values do, each after its parameter. What
    belongs to a frozen parameter is not looked at."""

    def __init__(
        self, shapes: Iterable[tuple[Tensor, Check]] = (), values: Iterable[tuple[Tensor, Tensor, Check]] = ()
    ) -> None:
        self._shapes, self._values = list(shapes), list(values)
        self._shapes_seen: list[object] = [None] * len(self._shapes)
        self._versions_seen: list[object] = [None] * len(self._values)

    def check(self) -> None:
        """Raises where something does not fit any more."""
        if self._shapes:
            shapes = [p.shape if p.requires_grad else None for p, _ in self._shapes]
            if shapes != self._shapes_seen:
                _check_changed(shapes, self._shapes_seen, [check for _, check in self._shapes])
        if self._values and are_run(()):
            versions = [_version_of(x) if p.requires_grad else None for p, x, _ in self._values]
            if versions != self._versions_seen:
                _check_changed(versions, self._versions_seen, [check for *_, check in self._values])


def _check_changed(now: Sequence[object], seen: list[object], checks: Sequence[Check]) -> None:
    for i, (new, check) in enumerate(zip(now, checks, strict=True)):
        if new is not None and new != seen[i]:
            check()
        seen[i] = new


def _version_of(x: Tensor) -> object:
    """Equal as long as nobody has written to it; a tensor of inference mode does not say."""
    return object() if x.is_inference() else x._version
