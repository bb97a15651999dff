"""The table of a `Regularizer`: each parameter with the strengths that it has now, and how these change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_reg import _devices
from fused_reg._terms import SHAPES, TERM_OF, Group, lacking
from fused_reg._warnings import warn
from fused_reg.regularizer.following import Source
from fused_reg.regularizer.keys import Key, Named
from fused_reg.regularizer.references import References
from fused_reg.regularizer.strengths import (
    Cell,
    Given,
    Held,
    Schedule,
    held,
    identity,
    is_absent,
    scheduled,
    tensor_of,
)

#: For each kind of strength its number, and whether a schedule goes on from there.
Wishes: TypeAlias = "Mapping[str, tuple[float, bool]]"


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

    @property
    def name(self) -> str:
        return self.names[0]

    def is_given(self, kind: str) -> bool:
        """Whether its term is, also as 0 in `set_strength`."""
        return self.given[TERM_OF[kind]] is not None

    def has(self, term: str) -> bool:
        """Whether a term is there. A tensor is not looked at."""
        return not is_absent(self.strengths[term])

    @property
    def relation(self) -> tuple[bool, bool]:
        """Whether it has reference weights, and importances: entries that differ are in calls of their own."""
        return self.toward is not None, self.importance is not None


class Table:
    """The entries. ``version`` counts changes other than those in place."""

    def __init__(self, source: Source, references: References) -> None:
        self.version = 0
        self._source = source
        self.references = references
        references.read(source.candidates)
        self._step = 0
        self._is_led = False  # whether somebody counts or sets the step
        self._skipped: Tensor | None = None  # how many of these steps were none, which a GPU knows
        self._cells: dict[str, Cell] = {}
        self._cells_version = -1
        self.entries: list[Entry] = []
        self.entries = self._chosen_entries()

    def follow(self) -> None:
        """Reads the module again where it has changed."""
        if self._source.has_changed():
            said = self._source.read_again()
            self.entries = self._chosen_entries()
            self.version += 1
            if said:
                warn(said)

    def is_standing(self) -> bool:
        """Whether it has a schedule, and no step was counted or set."""
        return self._step == 0 and not self._is_led and any(cell.schedule is not None for cell in self.cells().values())

    def look_at_all(self) -> None:
        """For a compiler: see `Source.look_at_all`."""
        self._source.look_at_all()

    def claim(self) -> None:
        """Before a use that matters."""
        self._source.claim()

    def _chosen_entries(self) -> list[Entry]:
        """What is given as it was before is held as it was, of the same parameter, of one with its name, or of others
        that have it alike."""
        hold = _holder(self.step)
        known = {name: e for e in self.entries for name in e.names} | {id(e.param): e for e in self.entries}
        alike: dict[object, list[Held]] = {}
        for e in self.entries:
            for kind, own_strength in e.strengths.items():
                alike.setdefault((kind, identity(e.given[kind])), []).append(own_strength)
        entries = []
        for candidate, penalty in self._source.chosen:
            names, given = candidate.names, self._source.given(candidate, penalty)
            before = next((known[key] for key in (id(candidate.param), *names) if key in known), None)
            own: dict[str, Held] = {}
            for kind, strength in given.items():
                others = alike.get((kind, identity(strength)), [])
                if before is not None and identity(before.given[kind]) == identity(strength):
                    own[kind] = before.strengths[kind]
                elif len({identity(other): other for other in others}) == 1:
                    own[kind] = others[0]
                else:
                    own[kind] = hold(kind, f"Regularizer: {kind} of {names[0]!r}", strength)
            references = self.references.of(candidate.param, names, before)
            own_types, group = candidate.types, penalty.group
            entries.append(Entry(candidate.param, names, own_types, group, own, given, *references))
        return entries

    def groups(self) -> list[list[Entry]]:
        """The strength groups: the entries with the same strengths, of the same kind."""
        groups: dict[object, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((*map(identity, entry.strengths.values()), entry.group), []).append(entry)
        return list(groups.values())

    def cells(self) -> dict[str, Cell]:
        """The cells, each once, named by one place where it is used."""
        if self._cells_version == self.version:
            return self._cells
        found: dict[int, tuple[str, Cell]] = {}
        for entry in self.entries:
            for kind, strength in entry.strengths.items():
                if isinstance(strength, Cell):
                    found.setdefault(id(strength), (f"{kind} of {entry.name!r}", strength))
        self._cells, self._cells_version = dict(found.values()), self.version
        return self._cells

    def place_cells(self) -> None:
        """Puts the cells where the parameters are, or on the CPU, from where every device takes them."""
        devices = {entry.param.device for entry in self.entries}
        first = self.entries[0].param
        device = first.device if len(devices) == 1 and _devices.has_data(first) else _devices.HOST
        for cell in self.cells().values():
            cell.move(device)

    @property
    def step(self) -> int:
        """The steps counted. A GPU is waited for if it knows which of them were skipped."""
        if self._skipped is not None:
            self._step, self._skipped = self._step - int(self._skipped), None
        return self._step

    def count(self, found_inf: Tensor | None) -> None:
        """A step of an optimizer, which has skipped it if ``found_inf`` is not 0: that is looked at when it matters."""
        if found_inf is None or any(cell.schedule is not None for cell in self.cells().values()):
            if found_inf is None or not found_inf:
                self.go_to(self.step + 1)
            return
        skipped = (found_inf != 0).long()
        self._step, self._skipped = self._step + 1, skipped if self._skipped is None else self._skipped + skipped

    def go_to(self, step: int) -> None:
        """A step of every schedule: first all numbers, each schedule asked once, then the writes."""
        values: dict[int, float] = {}
        due: list[tuple[Cell, int]] = []
        for name, cell in self.cells().items():
            if (schedule := cell.schedule) is not None:
                due.append((cell, id(schedule)))
                if id(schedule) not in values:
                    values[id(schedule)] = scheduled(f"Regularizer: {name}", schedule, step)
        self._step, self._skipped, self._is_led = step, None, True
        for cell, asked in due:
            _fill(cell.value, values[asked])

    def change(self, strengths: Mapping[str, Given], where: Key | None) -> None:
        """Gives the entries that ``where`` means strengths of some kinds, checked before. A number is written into the
        tensor that holds the old one, if no entry or kind outside uses it."""
        hold = _holder(self.step)
        new = {kind: hold(kind, f"set_strength: {kind}", strength) for kind, strength in strengths.items()}
        # For all is for all that have such a term, and where none has one yet, for all.
        meant = {k: "*" if where is None and not any(e.is_given(k) for e in self.entries) else where for k in new}
        own = {
            kind: [e for e in self.entries if (e.is_given(kind) if names is None else e.matches(names))]
            for kind, names in meant.items()
        }
        for kind in SHAPES.keys() & own.keys():
            if SHAPES[kind].shapes not in new and not any(e.is_given(kind) for e in own[kind]):
                raise ValueError(lacking("set_strength: ", kind, strengths[kind]))
        places = {(id(entry), kind) for kind, entries in own.items() for entry in entries}
        for kind, strength in new.items():
            if isinstance(strength, float):
                for old in _in_tensors(own[kind], kind):
                    if self._uses(old) <= places:
                        _check_fits(f"set_strength: {kind}", old, strength)
        for kind, strength in new.items():
            self._replace(own[kind], kind, strength)
            for entry in own[kind]:
                entry.given[kind] = strengths[kind]
            self._source.note(meant[kind], kind, strengths[kind])

    def _replace(self, entries: Sequence[Entry], kind: str, strength: Held) -> None:
        fresh: dict[object, Held] = {}  # for what is in a tensor and shall be a number
        if isinstance(strength, float):
            for old in _in_tensors(entries, kind):
                if self._uses(old) <= {(id(entry), kind) for entry in entries}:
                    _set_in_place(old, strength)
                    fresh[identity(old)] = old
                else:
                    fresh[identity(old)] = Cell.holding(strength)
        for entry in entries:
            new = fresh.get(identity(old := entry.strengths[kind]), strength)
            self.version += new is not old
            entry.strengths[kind] = new

    def _uses(self, strength: Held) -> set[tuple[int, str]]:
        return {(id(e), kind) for e in self.entries for kind, own in e.strengths.items() if own is strength}

    def load(self, step: int, saved: Mapping[str, Wishes], references: Any) -> None:
        """Takes a step and, for each name, strengths, and references, checked before. A schedule that goes on gives its
        own strength for that step."""
        wanted: dict[object, dict[tuple[float, bool], Held]] = {}  # of each tensor: what its users shall have
        for e in self.entries:
            for kind, old in e.strengths.items():
                wanted.setdefault(identity(old), {})[saved[e.name][kind]] = old
        values: dict[int, float] = {}  # of the schedules that go on
        for e in self.entries:
            for kind, old in e.strengths.items():
                (value, keep), name = saved[e.name][kind], f"load_state_dict: {kind} of {e.name!r}"
                schedule = _schedule_of(old, keep)
                if schedule is not None and id(schedule) not in values:
                    values[id(schedule)] = scheduled(name, schedule, step)
                if len(wanted[identity(old)]) == 1:
                    _check_fits(name, old, values.get(id(schedule), value))
        for wishes in wanted.values():
            for (value, keep), old in list(wishes.items()):
                schedule = _schedule_of(old, keep)
                now = values.get(id(schedule), value)
                if tensor_of(old) is None:
                    wishes[value, keep] = value
                elif len(wishes) == 1:
                    _set_in_place(old, now, schedule)
                else:
                    wishes[value, keep] = Cell.holding(now, schedule)
        for e in self.entries:
            for kind, old in e.strengths.items():
                e.strengths[kind] = wanted[identity(old)][saved[e.name][kind]]
        self.references.load(references, self.entries)
        self._step, self._skipped = step, None
        self.version += 1


def _schedule_of(strength: Held, keep: bool) -> Schedule | None:
    return strength.schedule if isinstance(strength, Cell) and keep else None


def _holder(step: int) -> Callable[[str, str, Given], Held]:
    """How strengths as given are held from this step on: one cell for each schedule, however often it is given."""
    cells: dict[int, Held] = {}

    def hold(kind: str, name: str, strength: Given) -> Held:
        if not callable(strength) or isinstance(strength, Tensor):
            return held(kind, name, strength, step)
        if id(strength) not in cells:
            cells[id(strength)] = held(kind, name, strength, step)
        return cells[id(strength)]

    return hold


def _in_tensors(entries: Iterable[Entry], kind: str) -> list[Held]:
    """The tensors and cells that hold these strengths, each once."""
    held_now = [entry.strengths[kind] for entry in entries]
    return [s for s in {identity(s): s for s in held_now}.values() if tensor_of(s) is not None]


def _check_fits(name: str, strength: Held, value: float) -> None:
    """Raises ValueError where a tensor of a small type cannot take the number, before anything is written."""
    tensor = tensor_of(strength)
    if tensor is not None and value > (largest := torch.finfo(tensor.dtype).max):
        raise ValueError(f"{name} must be at most {largest}, to fit its tensor of {tensor.dtype}, got {value}")


def _set_in_place(strength: Held, value: float, schedule: Callable[[int], float] | None = None) -> None:
    """Writes a number into the tensor of a strength. Its schedule, which would write over that, is replaced."""
    tensor = tensor_of(strength)
    assert tensor is not None
    _fill(tensor, value)
    if isinstance(strength, Cell):
        strength.schedule = schedule


@torch.no_grad()
def _fill(tensor: Tensor, value: float) -> None:
    tensor.view(1).fill_(value)  # AOTAutograd of torch 2.13 loses what is written to a float64 scalar itself
