"""The table of a `Regularizer`: each parameter with the strengths that it has now, and how these change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_reg import _devices
from fused_reg._arguments import is_dtensor
from fused_reg._terms import (
    CONSTRAINTS,
    OF_GROUPS,
    SHAPES,
    TERM_OF,
    TOGETHER,
    Group,
    LayerGroup,
    check_runs,
    group_code,
    group_count,
    lacking,
    misfit,
)
from fused_reg._warnings import warn
from fused_reg.regularizer.aims import Aim, aims_of
from fused_reg.regularizer.following import Source, listed
from fused_reg.regularizer.groups import Groups, check_saved
from fused_reg.regularizer.keys import Key, Named
from fused_reg.regularizer.references import References
from fused_reg.regularizer.strengths import (
    Cell,
    Given,
    Held,
    Schedule,
    ZeroShare,
    held,
    identity,
    is_absent,
    scheduled,
    tensor_of,
    weighted,
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
    weight: float | None = None  # of its groups, by which the strength of their norms is multiplied
    aim: Aim | None = None
    runs: int = 1  # of rows, each of which has groups of its own: those of a convolution with groups
    together: Sequence[Entry] = ()  # those with which its groups are one, itself among them
    is_turned: bool = False  # its groups are columns, and with others, which have rows
    weights: Tensor | None = None  # one for each group, or each of those that are one

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
        return next((entry for entry in others if entry.param.requires_grad), self) is self

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
        """Whether its term is, also as 0 in `set_strength`."""
        return self.given[TERM_OF[kind]] is not None

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


class Table:
    """The entries. ``version`` counts changes other than those in place."""

    def __init__(self, source: Source, references: References, groups: Groups, aims_at_each: bool = False) -> None:
        self.version = 0
        self._source = source
        self.references = references
        references.read(source.candidates)
        self._groups = groups
        groups.read(source.candidates)
        self._aims_at_each = aims_at_each
        self._aims: list[Aim] = []  # those of the entries
        self._step = 0
        self._is_led = False  # whether somebody counts or sets the step
        self._skipped: Tensor | None = None  # how many of these steps were none, which a GPU knows
        self._cells: dict[str, Cell] = {}
        self._cells_version = -1
        self.entries: list[Entry] = []
        self._shapes: list[torch.Size] = []  # of their parameters, where it matters
        self._choose()

    def _choose(self) -> None:
        self.entries = self._chosen_entries()
        self._shapes = self._shapes_now()

    def _shapes_now(self) -> list[torch.Size]:
        return [entry.param.shape for entry in self.entries] if self._groups.are_of_sizes else []

    def follow(self) -> None:
        """Reads the module again where it has changed, and chooses again where a parameter was resized."""
        self.references.converted = {}
        if self._source.has_changed():
            with self._source.reading_again() as said:
                self._choose()
            self.version += 1
            if said:
                warn(said)
        elif self._shapes != self._shapes_now():
            self._choose()
            self.version += 1
        elif self.references.follow(self.entries):
            self.version += 1
        if converted := self.references.converted:
            self.references.keep(converted)
            names = listed(list(dict.fromkeys(name for _, name in converted)))
            warn(
                f"Regularizer: it follows its module: {names} converted; their toward and importance are converted "
                "copies from now on"
            )

    def is_standing(self) -> bool:
        """Whether it has a schedule, and no step was counted or set."""
        return self._step == 0 and not self._is_led and self._has_schedule()

    def has_aims(self) -> bool:
        return len(self._aims) > 0

    def _has_schedule(self) -> bool:
        has_one = any(cell.schedule is not None for cell in self.cells().values())
        return has_one or any(aim.schedule is not None for aim in self._aims)

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
                alike.setdefault((kind, identity(e.given[kind]), e.weight_of(kind)), []).append(own_strength)
        entries, aims = [], [*self._aims]
        for candidate, penalty in self._source.chosen:
            names, given = candidate.names, self._source.given(candidate, penalty)
            before = next((known[key] for key in (id(candidate.param), *names) if key in known), None)
            group: Group = "tensor"  # where it has no norms, and others do not fit
            aim = None if penalty.zeros is None else self._aim_of(penalty.zeros, penalty.group, aims)
            if aim is not None or any(given[term] is not None for term in OF_GROUPS):
                group = candidate.group_of("Regularizer", penalty.group)
                check_runs(f"Regularizer: params[{names[0]!r}]", candidate.param, group)
            elif candidate.knows(penalty.group) and not misfit(candidate.param, penalty.group):
                group = candidate.group_of("Regularizer", penalty.group)
            references = self.references.of(candidate.param, names, before)
            runs = candidate.runs_of(penalty.group)
            entries.append(
                Entry(candidate.param, names, candidate.types, group, {}, given, *references, runs=runs, aim=aim)
            )
        self._groups.settle(entries, self._source)
        for entry in entries:
            before = next((known[key] for key in (id(entry.param), *entry.names) if key in known), None)
            for kind, strength in entry.given.items():
                weight = entry.weight_of(kind)
                others = alike.get((kind, identity(strength), weight), [])
                same = before is not None and identity(before.given[kind]) == identity(strength)
                if before is not None and same and before.weight_of(kind) == weight:
                    entry.strengths[kind] = before.strengths[kind]
                elif len({identity(other): other for other in others}) == 1:
                    entry.strengths[kind] = others[0]
                else:
                    entry.strengths[kind] = hold(kind, f"Regularizer: {kind} of {entry.name!r}", strength, weight)
        found = aims_of(entries)
        has_groups = any(aim.group != "tensor" for aim, _ in found)
        if self._groups.are_weighted and not has_groups and all(entry.given["l2_norm"] is None for entry in entries):
            raise ValueError("Regularizer: group_weights must come with l2_norm, whose groups it weighs, got none")
        for aim, own in found:
            aim.check(own)
        self._aims = [aim for aim, _ in found]
        return entries

    def _aim_of(self, zeros: ZeroShare, group: LayerGroup, aims: list[Aim]) -> Aim:
        """The one of these that has been given the same, or a new one."""
        aim = next((aim for aim in aims if aim.is_of(zeros, group)), None)
        if aim is None:
            aim = Aim(zeros, group, self._aims_at_each)
            aim.share = aim.at(self.step)
            aims.append(aim)
        return aim

    def groups(self) -> list[list[Entry]]:
        """The strength groups: the entries with the same strengths, of the same kind."""
        groups: dict[object, list[Entry]] = {}
        for entry in self.entries:
            key = *map(identity, entry.strengths.values()), entry.group, id(entry.aim)
            groups.setdefault(key, []).append(entry)
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
        if found_inf is None or self._has_schedule():
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
                    kind = name.partition(" ")[0]
                    values[id(schedule)] = scheduled(kind, f"Regularizer: {name}", schedule, step)
        shares = self._shares(step)
        self._step, self._skipped, self._is_led = step, None, True
        for cell, asked in due:
            _fill(cell.value, values[asked])
        for aim, share in shares:
            aim.share = share

    def _shares(self, step: int) -> list[tuple[Aim, float]]:
        """What each aim is at this step, checked."""
        return [(aim, aim.at(step)) for aim in self._aims]

    def change(self, strengths: Mapping[str, Given], where: Key | None) -> None:
        """Gives the entries that ``where`` means strengths of some kinds, checked before. A number is written into the
        tensor that holds the old one, if no entry or kind outside uses it."""
        hold = _holder(self.step)
        # For all is for all that have such a term, and where none has one yet, for all.
        meant = {k: "*" if where is None and not any(e.is_given(k) for e in self.entries) else where for k in strengths}
        own = {
            kind: [e for e in self.entries if (e.is_given(kind) if names is None else e.matches(names))]
            for kind, names in meant.items()
        }
        for kind in SHAPES.keys() & own.keys():
            if SHAPES[kind].shapes not in strengths and not any(e.is_given(kind) for e in own[kind]):
                raise ValueError(lacking("set_strength: ", kind, strengths[kind]))
        for (candidate, penalty), entry in zip(self._source.chosen, self.entries, strict=True):
            if any(entry in own.get(term, ()) for term in OF_GROUPS):
                group = candidate.group_of("set_strength", penalty.group)
                check_runs(f"set_strength: params[{entry.name!r}]", entry.param, group)
        self._groups.check_change(strengths, own)
        places = {(id(entry), kind) for kind, entries in own.items() for entry in entries}
        new: list[tuple[str, list[Entry], Held]] = []  # for those of one weight at a time
        for kind, entries in own.items():
            for weight in dict.fromkeys(entry.weight_of(kind) for entry in entries):
                alike = [entry for entry in entries if entry.weight_of(kind) == weight]
                new.append((kind, alike, hold(kind, f"set_strength: {kind}", strengths[kind], weight)))
        for kind, entries, strength in new:
            if isinstance(strength, float):
                for old in _in_tensors(entries, kind):
                    if self._uses(old) <= places:
                        _check_fits(f"set_strength: {kind}", old, strength)
        for kind, entries, strength in new:
            self._replace(entries, kind, strength)
            for entry in entries:
                entry.given[kind] = strengths[kind]
        for kind, strength_given in strengths.items():
            self._source.note(meant[kind], kind, strength_given)

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
        check_saved(self.entries, saved)
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
                    values[id(schedule)] = scheduled(kind, name, schedule, step)
                if len(wanted[identity(old)]) == 1:
                    _check_fits(name, old, values.get(id(schedule), value))
        shares = self._shares(step)
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
        for aim, share in shares:
            aim.share = share
        self._step, self._skipped = step, None
        self.version += 1


def _schedule_of(strength: Held, keep: bool) -> Schedule | None:
    return strength.schedule if isinstance(strength, Cell) and keep else None


def _holder(step: int) -> Callable[[str, str, Given, float | None], Held]:
    """How strengths as given are held from this step on: one cell for each schedule and weight, however often it is
    given."""
    cells: dict[tuple[int, float | None], Held] = {}

    def hold(kind: str, name: str, strength: Given, weight: float | None) -> Held:
        key, own = (id(strength), weight), weighted(name, strength, weight)
        if not callable(own) or isinstance(own, Tensor):
            return held(kind, name, own, step)
        if key not in cells:
            cells[key] = held(kind, name, own, step)
        return cells[key]

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
