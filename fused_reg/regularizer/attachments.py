"""The attachments of a `Regularizer`: which parameter is handled by which, by none, and by hand as well."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from fused_reg._warnings import warn
from fused_reg.regularizer import strays
from fused_reg.regularizer.attachment import Attachment, Mode
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.lasting import check_wrapper
from fused_reg.regularizer.table import Table
from fused_reg.regularizer.wrapped import innermost


class Attachments:
    """In their order. They are kept alive by the optimizers' hooks, not from here."""

    def __init__(self) -> None:
        self._refs: list[weakref.ref[Attachment]] = []
        self._lost: strays.Handler | None = None
        self._missing: set[int] = set()  # parameters of which was said that no optimizer holds them
        self._is_twice = False  # which was said

    def __iter__(self) -> Iterator[Attachment]:
        """Those that are active."""
        return (a for ref in self._refs if (a := ref()) is not None and a.is_active)

    def is_first(self, attachment: Attachment) -> bool:
        """Whether it is the one whose steps are counted."""
        return self._refs[0]() is attachment or next(iter(self), None) is attachment

    def add(self, table: Table, given: Any, mode: Mode, include_unused: bool, lazy_rows: bool) -> Attachment:
        """A new one, which takes its parameters over from earlier ones."""
        optimizer = innermost(given, {id(entry.param) for entry in table.entries})
        if any(a.optimizer is optimizer for a in self):
            raise ValueError("attach: optimizer must be attached once, got one that is attached already")
        if mode != "grad" and given is not optimizer:
            check_wrapper(given, optimizer, [entry.param for entry in table.entries])
        earlier = list(self)
        attachment = Attachment(table, self, optimizer, mode, include_unused, lazy_rows)
        own = {id(entry.param) for entry in attachment.entries}
        for other in earlier:
            if name := next((e.name for e in other.entries if id(e.param) in own), None):
                other.end(name)
        alive = [a for ref in self._refs if (a := ref()) is not None]
        for other in alive:
            if other.optimizer is optimizer:  # which is attached again, after another one was
                other.remove()
        self._refs = [weakref.ref(a) for a in (*alive, attachment)]
        strays.handle(attachment, self)
        return attachment

    def handled(self, but: Attachment | None = None) -> set[int]:
        """The identities of the parameters that the active ones handle."""
        return {id(entry.param) for a in self if a is not but for entry in a.entries}

    def check_aimed(self, function: str, entries: Sequence[Entry]) -> None:
        """Raises where one that adds gradients handles what this function would give zeros."""
        for attachment in self:
            attachment.check_aimed(function, entries)

    def lose(self, entries: Sequence[Entry]) -> None:
        """Those of what this is a copy of are not here: a step that comes without is told so."""
        self._lost = strays.orphan(entries, self)

    def miss_nothing(self) -> None:
        """The penalty is taken otherwise."""
        if self._lost is not None:
            self._lost.is_over = True

    def watched(self, value: Tensor) -> Tensor:
        """The penalty for a loss. To look at it is right beside an attachment; a backward through it is not."""
        if value.requires_grad and not is_compiling() and any(self):
            watch: Any = value.register_hook
            watch(lambda _: self.warn_of_twice("in a loss"))
        return value

    def warn_of_twice(self, way: str) -> None:
        """Once, where the penalty counts twice; ``way``: where else it is."""
        if not is_compiling() and not self._is_twice and any(self):
            self._is_twice = True
            warn(
                f"Regularizer: the penalty counts twice, {way} and in the optimizer that it is attached to; take one "
                "of them (`attachment.value` is the penalty to log)"
            )

    def warn_of_missing(self, table: Table) -> list[Tensor]:
        """Of parameters that may be trained, but by no optimizer that is attached. Returns those that are frozen."""
        known = self.handled() | self._missing
        unheld = [e for e in table.entries if id(e.param) not in known]
        missing = [e for e in unheld if e.param.requires_grad]
        if missing:
            self._missing |= {id(entry.param) for entry in missing}
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            warn(
                f"attach: {missing[0].name!r}{more} of the regularizer must be in an attached optimizer to get a "
                "penalty, but is in none; attach to the one that holds it, or build the Regularizer of what is trained",
            )
        return [e.param for e in unheld if not e.param.requires_grad]
