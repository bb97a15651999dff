"""The table of a `Regularizer`: each parameter with the strengths that it has now, and how these change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_reg import _devices
from fused_reg._terms import (
    OF_GROUPS,
    SHAPES,
    Group,
    LayerGroup,
    check_runs,
    lacking,
    misfit,
)
from fused_reg._warnings import warn
from fused_reg.regularizer.aims import Aim, aims_of, check_aims, new_aims
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.fits import check_beside
from fused_reg.regularizer.following import Source, listed
from fused_reg.regularizer.groups import Groups, check_saved
from fused_reg.regularizer.keys import Key
from fused_reg.regularizer.penalties import GivenZeros
from fused_reg.regularizer.references import References
from fused_reg.regularizer.strengths import (
    Cell,
    Given,
    Held,
    Schedule,
    ZeroShare,
    held,
    identity,
    scheduled,
    tensor_of,
    weighted,
)

#: For each kind of strength its number, and whether a schedule goes on from there.
Wishes: TypeAlias = "Mapping[str, tuple[float, bool]]"

#: Entries that reach an aim together, and what they shall have.
Shared: TypeAlias = "Sequence[tuple[Sequence[Entry], ZeroShare]]"

_Aims: TypeAlias = "dict[tuple[GivenZeros | None, LayerGroup], Aim | None]"


class Table:
    """The entries. ``version`` counts changes other than those in place."""

    def __init__(self, source: Source, references: References, groups: Groups, aims_at_each: bool = False) -> None:
        self.version = 0
        self._source = source
        self.references = references
        references.read(source.candidates, source.module)
        self._groups = groups
        groups.read(source.candidates)
        self._aims_at_each = aims_at_each
        self._aims: list[Aim] = []  # those of the entries,
        self._watched: list[tuple[Aim, list[Entry]]] = []  # and what may not fit them any more at a later step
        self._step = 0
        self._is_led = False  # whether somebody counts or sets the step
        self._skipped: Tensor | None = None  # how many of these steps were none, which a GPU knows
        self._cells: dict[str, Cell] = {}
        self._cells_version = -1
        self.entries: list[Entry] = []
        self._shapes: list[torch.Size] = []  # of their parameters, where it matters
        self._choose()
        references.check_used(self.entries)

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
        aims: _Aims = {}
        alike: dict[object, list[Held]] = {}
        for e in self.entries:
            for kind, own_strength in e.strengths.items():
                alike.setdefault((kind, identity(e.given[kind]), e.weight_of(kind)), []).append(own_strength)
        entries = []
        for candidate, penalty in self._source.chosen:
            names, given = candidate.names, self._source.given(candidate, penalty)
            before = next((known[key] for key in (id(candidate.param), *names) if key in known), None)
            group: Group = "tensor"  # where it has no norms, and others do not fit
            zeros = given.pop("zeros")
            if zeros is not None or any(given[term] is not None for term in OF_GROUPS):
                group = candidate.group_of("Regularizer", penalty.group)
                check_runs(f"Regularizer: params[{names[0]!r}]", candidate.param, group)
            elif candidate.knows(penalty.group) and not misfit(candidate.param, penalty.group):
                group = candidate.group_of("Regularizer", penalty.group)
            references = self.references.of(candidate.param, names, before)
            entry = Entry(candidate.param, names, candidate.types, group, {}, given, *references)
            entry.runs, entry.named_group = candidate.runs_of(penalty.group), penalty.group
            entry.is_lent = candidate.is_lent and (before is None or before.has_penalty)
            entry.zeros, entry.aim = zeros, self._aim_of(zeros, penalty.group, before, aims)
            entries.append(entry)
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
        has_aims = any(entry.zeros is not None and entry.named_group != "tensor" for entry in entries)
        if self._groups.are_weighted and not has_aims and all(entry.given["l2_norm"] is None for entry in entries):
            raise ValueError("Regularizer: group_weights must come with l2_norm, whose groups it weighs, got none")
        self.references.check_apart(entries)
        for entry in entries:
            check_beside("Regularizer", entry, entry.strengths)
        found = aims_of(entries)
        check_aims("Regularizer", found, are_new=True)
        self._set_aims(entries, found)
        return entries

    def _aim_of(self, zeros: GivenZeros | None, group: LayerGroup, before: Entry | None, known: _Aims) -> Aim | None:
        """As a strength: that of before, that of others that have it alike, or a new one."""
        if before is not None and before.zeros is zeros and before.named_group == group:
            return before.aim
        if (zeros, group) not in known:
            alike = {entry.aim for entry in self.entries if entry.zeros is zeros and entry.named_group == group}
            if len(alike) != 1:
                own = None if zeros is None or zeros.is_none else zeros.given
                alike = {None if own is None else Aim(own, group, self._aims_at_each, self.step)}
            known[zeros, group] = alike.pop()
        return known[zeros, group]

    def _set_aims(self, entries: Sequence[Entry], pools: Sequence[tuple[Aim, Sequence[Entry]]]) -> None:
        """These and no others."""
        aims = {id(entry): aim for aim, own in pools for entry in own}
        for entry in entries:
            entry.aim = aims.get(id(entry))
        self._aims = [aim for aim, _ in pools]
        self._watched = [(aim, [entry for entry in own if aim.is_to_watch(entry)]) for aim, own in pools]

    def check_aims(self) -> None:
        """Before a proximal step: since the last one a parameter may have been resized, and a bound been written."""
        check_aims("Regularizer", self._watched)

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

        def after(entry: Entry) -> dict[str, Held]:
            return {kind: values.get(id(_schedule_of(old)), old) for kind, old in entry.strengths.items()}

        if due:
            check_aims("Regularizer", self._watched, after)
        self._step, self._skipped, self._is_led = step, None, True
        for cell, asked in due:
            _fill(cell.value, values[asked])
        for aim, share in shares:
            aim.share = share

    def _shares(self, step: int) -> list[tuple[Aim, float]]:
        """What each aim is at this step, checked."""
        return [(aim, aim.at(step)) for aim in self._aims]

    def change(
        self, strengths: Mapping[str, Any], where: Key | None, check_aimed: Callable[[str, Sequence[Entry]], None]
    ) -> None:
        """Gives the entries that ``where`` means strengths of some kinds, and `GivenZeros`, checked before. A number is
        written into the tensor that holds the old one, if no entry or kind outside uses it. ``check_aimed``: raises
        where entries must not have an aim."""
        hold = _holder(self.step)
        zeros: GivenZeros | None = strengths.get("zeros")
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
            if any(entry in own.get(kind, ()) for kind in (*OF_GROUPS, "zeros")):
                group = candidate.group_of("set_strength", penalty.group)
                check_runs(f"set_strength: params[{entry.name!r}]", entry.param, group)
        self._groups.check_change(strengths, own)
        aimed = own.pop("zeros", [])
        said_zeros: dict[GivenZeros, list[Entry]] = {}
        for (_, penalty), entry in zip(self._source.chosen, self.entries, strict=True):
            if zeros is not None and entry in aimed:  # for all, what rules and marks have set apart stays so
                own_zeros = zeros if meant["zeros"] is not None else zeros.in_place_of(penalty.given["zeros"])
                said_zeros.setdefault(own_zeros, []).append(entry)
        aims = [
            pool
            for said, entries in said_zeros.items()
            if not said.is_none
            for pool in new_aims("set_strength", entries, said.given, self._aims_at_each, self.step)
        ]
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

        def after(entry: Entry) -> dict[str, Held]:
            return {**entry.strengths, **{kind: strength for kind, its, strength in new if entry in its}}

        pools = [*aims, *aims_of([entry for entry in self.entries if entry not in aimed])]
        check_aims("set_strength", pools, after, are_new=len(aimed) > 0)
        for entry in self.entries:
            check_beside("set_strength", entry, after(entry))
        check_aimed("set_strength", [entry for _, entries in aims for entry in entries])
        for kind, entries, strength in new:
            self._replace(entries, kind, strength)
            for entry in entries:
                entry.given[kind] = strengths[kind]
        for said, entries in said_zeros.items():
            for entry in entries:
                entry.zeros = said
                self.version += 1
        self._set_aims(self.entries, pools)
        for kind, strength in strengths.items():
            self._source.note(meant[kind], kind, strength)

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

    def load(
        self,
        step: int,
        saved: Mapping[str, Wishes],
        aims: Shared | None,
        references: Any,
        check_aimed: Callable[[str, Sequence[Entry]], None],
    ) -> None:
        """Takes a step and, for each name, strengths, and references, checked before. A schedule that goes on gives its
        own strength for that step. ``aims``: None: those that are here. ``check_aimed``: as of `change`."""
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
        shared = [(own, aim.given) for aim, own in aims_of(self.entries)] if aims is None else aims
        pools = [
            pool for own, given in shared for pool in new_aims("load_state_dict", own, given, self._aims_at_each, step)
        ]

        def after(e: Entry) -> dict[str, Held]:
            return {k: values.get(id(_schedule_of(e.strengths[k], keep)), x) for k, (x, keep) in saved[e.name].items()}

        check_aims("load_state_dict", pools, after, are_new=aims is not None)
        for e in self.entries:
            check_beside("load_state_dict", e, after(e))
        check_aimed("load_state_dict", [entry for _, entries in pools for entry in entries])
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
        self._set_aims(self.entries, pools)
        self._step, self._skipped = step, None
        self.version += 1


def _schedule_of(strength: Held, keep: bool = True) -> Schedule | None:
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
