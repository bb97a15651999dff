"""The strengths in plain numbers and names, as `Regularizer.state_dict` gives them and `load_state_dict` takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fused_reg._terms import DEFAULTS, KINDS
from fused_reg.regularizer.aims import aims_of
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.penalties import as_zeros
from fused_reg.regularizer.strengths import ZeroShare, as_saved, is_scheduled, number
from fused_reg.regularizer.table import Shared, Table, Wishes

_KEYS = ("params", *KINDS, "group", "scheduled")
_LATER = set(KINDS[3:])  # which a state that is older lacks


def state_of(table: Table) -> list[dict[str, Any]]:
    """The strength groups."""
    return [
        {
            "params": [entry.name for entry in group],
            **{kind: number(s) for kind, s in group[0].strengths.items()},
            "group": group[0].group,
            "scheduled": [kind for kind, s in group[0].strengths.items() if is_scheduled(s)],
        }
        for group in table.groups()
    ]


def state_of_aims(table: Table) -> list[dict[str, Any]]:
    """Each aim, with those that reach it together."""
    return [
        {
            "params": [entry.name for entry in own],
            "zeros": aim.share_of_all if aim.schedule else aim.given,
            "scheduled": aim.schedule is not None,
        }
        for aim, own in aims_of(table.entries)
    ]


def parsed_aims(state: Any, entries: Sequence[Entry]) -> Shared:
    """What these entries shall have; raises ValueError unless a `state_of_aims` of such may have given it."""
    where = "load_state_dict: aims"
    if not isinstance(state, list | tuple):
        raise ValueError(f"{where} must be a list, as `state_dict` gives it, got {type(state).__name__}")
    known = {name: entry for entry in entries for name in entry.names}
    found: list[tuple[list[Entry], ZeroShare]] = []
    taken: list[Entry] = []
    for i, pool in enumerate(state):
        if not isinstance(pool, Mapping) or {*pool} != {"params", "zeros", "scheduled"}:
            got = list(pool) if isinstance(pool, Mapping) else type(pool).__name__
            raise ValueError(f"{where}[{i}] must have the keys params, zeros, scheduled, got {got}")
        zeros, names = as_zeros(f"{where}[{i}]: zeros", pool["zeros"]), pool["params"]
        if zeros is None or callable(zeros.given) or not isinstance(names, list | tuple):
            raise ValueError(f"{where}[{i}] must have a list of names and a share or pattern, got {dict(pool)}")
        own = [known[name] for name in names if isinstance(name, str) and name in known]
        taken += own
        if not own or len(own) < len(names) or len(set(taken)) < len(taken):
            raise ValueError(f"{where}[{i}] must name parameters that are regularized, each once, got {names}")
        found.append((own, _schedule_of(own) if pool["scheduled"] else zeros.given))
    return found


def _schedule_of(entries: Sequence[Entry]) -> ZeroShare:
    """That of their zeros, which is one."""
    first = entries[0].zeros
    for entry in entries:
        if first is None or not callable(first.given) or entry.zeros is None or entry.zeros.given is not first.given:
            got = "none" if entry.zeros is None else entry.zeros.given
            raise ValueError(
                f"load_state_dict: zeros of {entry.name!r} must have a schedule, as in the state_dict, and one with "
                f"{entries[0].name!r}, got {got}"
            )
    assert first is not None
    return first.given


def parsed(state: Any, entries: Sequence[Entry]) -> dict[str, Wishes]:
    """What these parameters shall have, by their names. Raises ValueError unless a `state_of` the same parameters, in
    the same kinds of groups, may have given it."""
    if not isinstance(state, list | tuple):
        raise ValueError(
            f"load_state_dict: groups must be a list, as `state_dict` gives it, got {type(state).__name__}"
        )
    found: dict[str, tuple[Wishes, str]] = {}
    for i, group in enumerate(state):
        wishes = _wishes(f"load_state_dict: groups[{i}]", group)
        for name in group["params"]:
            if name in found:
                raise ValueError(f"load_state_dict: groups must name each parameter once, got {name!r} twice")
            found[name] = wishes, group["group"]
    # By one of the names of each: the state may be of the module before it was wrapped, or after.
    own = {entry.name: next((name for name in entry.names if name in found), entry.name) for entry in entries}
    used = set(own.values())
    for only, what in ((used - found.keys(), "lacks"), (found.keys() - used, "has the unknown")):
        if only:
            raise ValueError(f"load_state_dict: state_dict must have the same parameters, but {what} {min(only)!r}")
    for entry in entries:
        wishes, kind_of_group = found[own[entry.name]]
        if isinstance(kind_of_group, list):  # as JSON has it
            kind_of_group = tuple(kind_of_group)
        if kind_of_group != entry.group:
            raise ValueError(
                f"load_state_dict: group of {entry.name!r} must be {entry.group!r} as here, got {kind_of_group!r}"
            )
        for kind, (_, has_schedule) in wishes.items():
            if has_schedule and not is_scheduled(own_strength := entry.strengths[kind]):
                raise ValueError(
                    f"load_state_dict: {kind} of {entry.name!r} must have a schedule, as in the state_dict, got "
                    f"{number(own_strength)}"
                )
    return {name: found[saved][0] for name, saved in own.items()}


def _wishes(where: str, group: Any) -> Wishes:
    if not isinstance(group, Mapping) or {*group} | _LATER != {*_KEYS}:
        got = list(group) if isinstance(group, Mapping) else type(group).__name__
        raise ValueError(f"{where} must have the keys {', '.join(_KEYS)}, got {got}")
    for key, what in (("params", "names"), ("scheduled", "kinds of strengths")):
        given = group[key]
        allowed = isinstance(given, list | tuple) and all(isinstance(x, str) for x in given)
        if not allowed or (key == "params" and not given) or (key == "scheduled" and not set(given) <= set(KINDS)):
            raise ValueError(f"{where}: {key} must be a list of {what}, got {given!r}")
    first = group["params"][0]
    return {
        kind: (
            as_saved(kind, f"load_state_dict: {kind} of {first!r}", group.get(kind, default)),
            kind in group["scheduled"],
        )
        for kind, default in DEFAULTS.items()
    }
