"""What a `Regularizer` was built of. A module is followed: it is read again where its parameters are others by now."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from fused_reg import _ops
from fused_reg._terms import TERM_OF
from fused_reg._warnings import warn
from fused_reg.distributed.shards import cuts
from fused_reg.regularizer import marks
from fused_reg.regularizer.candidates import Candidate, candidates_of
from fused_reg.regularizer.keys import Key
from fused_reg.regularizer.marks import Mark
from fused_reg.regularizer.penalties import Penalty
from fused_reg.regularizer.selection import Choice

_NAMES_SHOWN = 4


class _Snapshot:
    """What is in the tables of modules when they are read, by the identity of the module and the key."""

    places: dict[tuple[int, str], Any]

    def __init__(self, modules: Sequence[Module] = (), before: _Snapshot | None = None) -> None:
        self.mark_count = marks.count
        self.modules = modules
        known = {} if before is None else before.places
        tables = [(id(m), table) for m in modules for table in (m._parameters, m._modules)]
        self.places = {(i, key): _uncut(x, known.get((i, key))) for i, table in tables for key, x in table.items()}
        self._content = [*self.places.values()]
        self._tables = [table for _, table in tables]

    def is_current(self) -> bool:
        """Whether the same is in the tables now, and no mark was set."""
        return self.mark_count == marks.count and _ops.has_values(self._tables, self._content)

    def is_same(self, other: _Snapshot) -> bool:
        are_alike = self.places.keys() == other.places.keys() and self.mark_count == other.mark_count
        return are_alike and all(map(is_, self._content, other._content))


class Source:
    """A module or a list, what is chosen of it, and which strengths that is given."""

    def __init__(self, params: Any, choice: Choice) -> None:
        self._choice = choice
        self._module: Module | weakref.ref[Module] | None = params if isinstance(params, Module) else None
        self._is_copy = False  # whose parameters may be nobody's
        self._lonely: str | None = None  # the name of one that is
        # By where and kind, in their order: what was said, and after how many marks.
        self._changes: dict[tuple[Key | None, str], tuple[Any, int]] = {}
        self._said: set[str] = set()
        self._marks: dict[str, Mark] = {}  # by the names
        self.candidates: list[Candidate] = []
        self._idle: list[Tensor] = []  # of them, what is frozen and of a kind that nothing can train
        self._seen = _Snapshot()
        self.chosen: list[tuple[Candidate, Penalty]] = []
        self._read(params)

    @property
    def module(self) -> Module | None:
        """None for a list, and where a copy's is gone."""
        return self._module() if isinstance(self._module, weakref.ref) else self._module

    def has_changed(self) -> bool:
        """Whether a module or a parameter is another one by now, a mark was set, or what nothing can train shall be."""
        if self._idle and any(p.requires_grad for p in self._idle):
            return True
        if self._seen.is_current():
            return False
        if self._is_copy:
            self._settle()
        return self._module is not None and not self._seen.is_same(_Snapshot(self._seen.modules, self._seen))

    @contextmanager
    def reading_again(self) -> Iterator[str]:
        """Reads the module, and says what has changed in what is chosen, the same once. Where the body raises, all is
        as before, so that the next use raises too."""
        before = dict(vars(self))
        try:
            yield self._read_again()
        except Exception:
            vars(self).update(before)
            raise

    def _read_again(self) -> str:
        problems: list[str] = []
        before = [c for c, _ in self.chosen]
        self._read(self.module, problems.append)
        now = [c for c, _ in self.chosen]
        lent = {c.names[0] for c in (*before, *now) if not isinstance(c.param, Parameter)}  # for a functional call
        new, gone = _without(now, before), _without(before, now)
        for name in lent:
            new.pop(name, None)
            gone.pop(name, None)
        replaced = new.keys() & gone.keys()
        said = [
            f"{listed(names)} {what}"
            for names, what in (
                ([n for n in new if n in replaced], "replaced"),
                ([n for n in new if n not in replaced], "new"),
                ([n for n in gone if n not in replaced], "gone"),
            )
            if names
        ]
        problems = [problem.removeprefix("Regularizer: ") for problem in problems]
        if not said and not problems:
            return ""
        changes = ", ".join(said) or "names have changed"
        changes += "; an optimizer must hold these" if new else ""
        text = "; ".join([f"Regularizer: it follows its module: {changes}", *problems])
        is_known = text in self._said
        self._said = {*self._said, text}
        return "" if is_known else text

    def _read(self, params: Any, *complain: Callable[[str], object]) -> None:
        """Keeps what it has read only if all of it is right."""
        seen = _Snapshot(list(params.modules()) if isinstance(params, Module) else [], self._seen)
        candidates = candidates_of(params, self._marks, seen.places)
        owners = {name: c for c in candidates for name in c.names}
        known = {id(c.param): c for c in self.candidates}
        for c in candidates:  # the names of before that no other one has by now, and what was around it there
            before = known.get(id(c.param), c)
            for name in before.names if before is not c else ():
                if owners.get(name, c) is c:
                    c.remember(name, before.types.get(name, ()))
        self.chosen = self._choice.of(params, candidates, *complain)
        self.candidates = candidates
        self._idle = [c.param for c in candidates if not c.can_train]
        self._marks = {**self._marks, **{name: mark for c in candidates for name, mark in c.marks.items()}}
        self._seen = seen

    def look_at_all(self) -> None:
        """Nothing but a look: a compiler that traces it compiles again where a place has another parameter by then, or
        a mark was set."""
        if isinstance(self._module, Module):
            assert str(marks.count)  # of the number itself the compiler would make a variable
            _look_at_all(self._module)

    def given(self, candidate: Candidate, penalty: Penalty) -> dict[str, Any]:
        """What a parameter has by its penalty and by what was changed since. Of a change and a mark, the later."""
        given = dict(penalty.given)
        for (where, kind), (said, mark_count) in self._changes.items():
            if candidate.has_later_mark(mark_count, kind, penalty.given[kind]):
                continue
            if given[TERM_OF.get(kind, kind)] is not None if where is None else candidate.matches(where):
                given[kind] = said if where is not None or kind != "zeros" else said.in_place_of(penalty.given[kind])
        return given

    def note(self, where: Key | None, kind: str, said: Any) -> None:
        """That these were given a strength, or an aim."""
        self._changes.pop((where, kind), None)
        self._changes[where, kind] = said, marks.count

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": self.module, "_seen": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The module of a copy is held when it is first looked at, if anybody has it."""
        marks.see(max((number for _, number in state["_changes"].values()), default=0))
        vars(self).update(state, _seen=_Snapshot(), _is_copy=True)
        self._seen.mark_count = -1
        if isinstance(self._module, Module):
            self._module = weakref.ref(self._module)

    def _settle(self) -> None:
        """Finds out whether anybody else has the module of a copy, or its parameters."""
        gc.collect()  # modules in cycles are gone, too
        self._is_copy, self._module = False, self.module
        one = [object()]
        other = [*one]  # as an entry and a candidate hold a parameter
        alone = sys.getrefcount(other[0])
        if self._module is None:
            lonely = (c.names[0] for c, _ in self.chosen if sys.getrefcount(c.param) <= alone)
            self._lonely = next(lonely, None)

    def claim(self) -> None:
        """Before a use that matters: warns once of a copy that nothing trains."""
        if self._is_copy:
            self._settle()
        if self._lonely is not None:
            name, self._lonely = self._lonely, None
            warn(
                f"Regularizer: it is a copy whose parameter {name!r} no model has, so that its penalty is of no "
                "effect; copy or pickle it together with its model, or build another one"
            )


def _look_at_all(module: Module) -> None:
    for param in module._parameters.values():
        assert param is None or isinstance(param, Tensor)
    for child in module._modules.values():
        if child is not None:
            _look_at_all(child)


def _uncut(x: Any, known: Any) -> Any:
    """What a parameter is cut into, where ``fully_shard`` shows it whole, between forward and backward."""
    return known if isinstance(known, Tensor) and cuts(known) > cuts(x) else x


def _without(candidates: Iterable[Candidate], others: Iterable[Candidate]) -> dict[str, Candidate]:
    """Those whose parameters are not among the others', by their names."""
    known = {id(c.param) for c in others}
    return {c.names[0]: c for c in candidates if id(c.param) not in known}


def listed(names: Sequence[str]) -> str:
    return ", ".join([*map(repr, names[:_NAMES_SHOWN]), *["..."] * (len(names) > _NAMES_SHOWN)])
