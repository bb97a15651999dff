"""The table of a `Regularizer`: each parameter with the strengths that it has now, and how these change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from fused_reg._arguments import Group
from fused_reg._selection import Candidate
from fused_reg._strengths import KINDS, Cell, Given, Held, Penalty, held, identity, number, scheduled, tensor_of


@dataclass(eq=False)
class Entry:
    """A parameter and its strengths."""

    param: Tensor
    names: list[str]
    group: Group
    l1: Held
    l2: Held
    l2_norm: Held

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def strengths(self) -> tuple[Held, Held, Held]:
        return self.l1, self.l2, self.l2_norm

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.names)


class Table:
    """The entries. ``version`` counts changes other than those in place."""

    def __init__(self, chosen: Iterable[tuple[Candidate, Penalty]]) -> None:
        self.version = 0
        self.step = 0
        self._cells: dict[str, Cell] = {}
        self._cells_version = -1
        cells: dict[int, Held] = {}  # one for each schedule, however many rules and marks name it

        def hold(name: str, strength: Given) -> Held:
            if not callable(strength) or isinstance(strength, Tensor):
                return held(name, strength, 0)
            if id(strength) not in cells:
                cells[id(strength)] = held(name, strength, 0)
            return cells[id(strength)]

        self.entries: list[Entry] = []
        for candidate, penalty in chosen:
            names = candidate.names
            own = (hold(f"Regularizer: {kind} of {names[0]!r}", getattr(penalty, kind)) for kind in KINDS)
            self.entries.append(Entry(candidate.param, names, penalty.group, *own))

    def groups(self) -> list[list[Entry]]:
        """The strength groups: the entries with the same strengths, of the same kind."""
        groups: dict[object, list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault((*map(identity, entry.strengths), entry.group), []).append(entry)
        return list(groups.values())

    def cells(self) -> dict[str, Cell]:
        """The cells, each once, named by one place where it is used."""
        if self._cells_version == self.version:
            return self._cells
        found: dict[int, tuple[str, Cell]] = {}
        for entry in self.entries:
            for kind, strength in zip(KINDS, entry.strengths, strict=True):
                if isinstance(strength, Cell):
                    found.setdefault(id(strength), (f"{kind} of {entry.name!r}", strength))
        self._cells, self._cells_version = dict(found.values()), self.version
        return self._cells

    def place_cells(self) -> None:
        """Puts the cells where the parameters are, or on the CPU, from where every device takes them."""
        devices = {entry.param.device for entry in self.entries}
        device = self.entries[0].param.device if len(devices) == 1 else torch.device("cpu")
        device = torch.device("cpu") if device.type == "meta" else device
        for cell in self.cells().values():
            cell.move(device)

    def go_to(self, step: int) -> None:
        """A step of every schedule: first all numbers, then the writes."""
        due = [
            (cell, scheduled(f"Regularizer: {name}", cell.schedule, step))
            for name, cell in self.cells().items()
            if cell.schedule is not None
        ]
        self.step = step
        for cell, value in due:
            _fill(cell.value, value)

    def set(self, entries: Sequence[Entry], kind: str, strength: float | Tensor | Callable[[int], float]) -> None:
        """Gives these entries a strength, checked before. A number is written into the tensor that holds the old one,
        if no entry outside uses it."""
        if not isinstance(strength, float):
            new = held(f"set_strength: {kind}", strength, self.step)
            self._replace(entries, kind, lambda _: new)
            return
        inside = {(id(entry), kind) for entry in entries}
        fresh: dict[object, Held] = {}
        for old in {identity(s): s for e in entries if tensor_of(s := getattr(e, kind)) is not None}.values():
            users = {(id(e), k) for e in self.entries for k in KINDS if getattr(e, k) is old}
            if users <= inside:
                _set_in_place(old, strength)
                fresh[identity(old)] = old
            else:
                fresh[identity(old)] = Cell.holding(strength)
        self._replace(entries, kind, lambda old: fresh.get(identity(old), strength))

    def _replace(self, entries: Sequence[Entry], kind: str, new: Callable[[Held], Held]) -> None:
        changes = [(entry, new(old)) for entry in entries if new(old := getattr(entry, kind)) is not old]
        for entry, strength in changes:
            setattr(entry, kind, strength)
        self.version += bool(changes)

    def state(self) -> list[dict[str, Any]]:
        """The strength groups in plain numbers and names."""
        return [
            {
                "params": [entry.name for entry in group],
                **{kind: number(s) for kind, s in zip(KINDS, group[0].strengths, strict=True)},
                "group": group[0].group,
                "scheduled": [kind for kind in KINDS if _has_schedule(getattr(group[0], kind))],
            }
            for group in self.groups()
        ]

    def load(self, step: int, state: Sequence[Mapping[str, Any]]) -> None:
        """Takes the strengths of a `state` that `check` has passed."""
        saved = {name: group for group in state for name in group["params"]}
        wanted: dict[object, dict[tuple[float, bool], Held]] = {}  # of each tensor: what its users shall have
        for e in self.entries:
            for kind in KINDS:
                wanted.setdefault(identity(getattr(e, kind)), {})[_wish(saved[e.name], kind)] = getattr(e, kind)
        for wishes in wanted.values():
            for (value, keep), old in list(wishes.items()):
                schedule = old.schedule if isinstance(old, Cell) and keep else None
                if tensor_of(old) is None:
                    wishes[value, keep] = value
                elif len(wishes) == 1:
                    _set_in_place(old, value, schedule)
                else:
                    wishes[value, keep] = Cell.holding(value, schedule)
        for e in self.entries:
            for kind in KINDS:
                setattr(e, kind, wanted[identity(getattr(e, kind))][_wish(saved[e.name], kind)])
        self.step = step
        self.version += 1

    def check(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Raises ValueError unless a `state` is of the same parameters, in the same kinds of groups."""
        where = "load_state_dict: "
        saved = {name: group for group in state for name in group["params"]}
        own = {entry.name for entry in self.entries}
        for only, what in ((own - saved.keys(), "lacks"), (saved.keys() - own, "has the unknown")):
            if only:
                raise ValueError(f"{where}state_dict must have the same parameters, but {what} {min(only)!r}")
        for entry in self.entries:
            group = saved[entry.name]
            if group["group"] != entry.group:
                raise ValueError(
                    f"{where}group of {entry.name!r} must be {entry.group!r} as here, got {group['group']!r}"
                )
            for kind in KINDS:
                held(f"{where}{kind} of {entry.name!r}", group[kind], 0)
                if kind in group["scheduled"] and not _has_schedule(getattr(entry, kind)):
                    raise ValueError(
                        f"{where}{kind} of {entry.name!r} must have a schedule, as in the state_dict, got "
                        f"{number(getattr(entry, kind))}"
                    )


def _wish(group: Mapping[str, Any], kind: str) -> tuple[float, bool]:
    return float(group[kind]), kind in group["scheduled"]


def _has_schedule(strength: Held) -> bool:
    return isinstance(strength, Cell) and strength.schedule is not None


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
