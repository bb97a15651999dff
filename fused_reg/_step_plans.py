"""What the steps of an optimizer have in common, kept as long as nothing changes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fused_reg import _devices, _ops
from fused_reg._arguments import as_number, check_values, is_dtensor, is_number, value_dtype
from fused_reg._fits import Fits
from fused_reg._partitioned import check_whole
from fused_reg._step_launches import MAXIMIZE, Batch, Launch, Numbers, Place
from fused_reg._step_references import REFERENCES, Penalized, fits_of, params_of, penalized, read_references
from fused_reg._terms import DEFAULTS, TERM_OF, group_code
from fused_reg.distributed.buckets import sharing
from fused_reg.distributed.shards import shards_of
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.share import Guest
from fused_reg.regularizer.strengths import Held, identity

#: How the penalty is in a step: its gradient is added to the loss's, or its proximal operator follows the step, with
#: the learning rate or with the rate of each element.
Prox: TypeAlias = "bool | Literal['preconditioned']"

PROX: dict[Prox, int] = {False: 0, True: 64, "preconditioned": 64 + 128}

_ODD = _ops.UNUSUAL | _ops.NEGATED | _ops.ODD_GRAD
_NO_ENTRY: dict[int, Entry] = {}


class Formula(NamedTuple):
    """What an optimizer has of its own, for a group."""

    options: int
    rates: Sequence[Any]  # weight_decay, the first and the second decay, eps
    keys: tuple[str, ...]  # of the states


class Plan(NamedTuple):
    """``rest``: the parameters without a gradient, of each group."""

    launches: list[Launch]
    rest: list[list[Penalized]]
    all_rest: list[Tensor]  # the same list as long as these are the same
    dtype: torch.dtype  # of the penalty
    may_be_inert: bool


class Plans:
    """Of an optimizer: the last one, and what it came from, which it keeps alive."""

    def __init__(self) -> None:
        self._fingerprint: tuple[bytes, bytes] | None = None
        self._guest: Guest | None = None
        self._batches: list[Batch] = []
        self._relations: list[Any] = []  # what the groups have of references, and whether these count
        self._rest: tuple[list[list[Penalized]], list[Tensor]] = [], []
        self._plan: Plan | None = None
        self._fits = Fits()
        self._given: list[Any] = []  # what is in the groups
        self._kept: list[Any] = []

    def of(self, optimizer: Any, guest: Guest | None) -> Plan | None:
        """None where the kernels do not take the step."""
        found = _ops.fingerprint(optimizer.param_groups, optimizer.state)
        is_alike = found is not None and guest is self._guest
        if is_alike and found == self._fingerprint and self._plan is not None:
            self._fits.check()
            return self._plan
        old, self._fingerprint, self._plan = self._fingerprint, None, None
        has_batches = is_alike and old is not None and found is not None and found[0] == old[0]
        formulas = [optimizer._formula(group) for group in optimizer.param_groups]
        numbers = [_numbers(optimizer, *each, guest) for each in zip(optimizer.param_groups, formulas, strict=True)]
        relations = [x for g in optimizer.param_groups for x in (has_penalty(g), *map(g.get, REFERENCES))]
        has_batches = has_batches and all(map(is_, relations, self._relations))
        if has_batches and all(batch.keys == formulas[batch.group].keys for batch in self._batches):
            batches = self._batches
        else:
            made = _batches(optimizer, formulas, guest)
            if made is None:
                return None
            batches, rest = made
            self._rest = rest, [p for own in rest for p in params_of(own)]
            if found is not None:
                found = _ops.fingerprint(optimizer.param_groups, optimizer.state)  # with states that are new
        merged: dict[Any, list[tuple[Batch, Numbers]]] = {}
        for batch in batches:
            own = numbers[batch.group]
            alike = (id(x) for x in own.own.values() if isinstance(x, Tensor))
            kind = own.options, batch.keys, batch.place, batch.norms, bool(batch.toward), bool(batch.importance)
            merged.setdefault((*kind, *alike), []).append((batch, own))
        launches = [Launch(optimizer, parts) for parts in merged.values()]
        may_be_inert = all(numbers[batch.group].may_be_inert for batch in batches)
        dtype = value_dtype(p for group in optimizer.param_groups for p in group["params"])
        plan = Plan(launches, *self._rest, dtype, may_be_inert)
        self._batches, self._relations, self._guest, self._fingerprint = batches, relations, guest, found
        if all(own.is_fixed for own in numbers):
            penalized_groups = filter(has_penalty, optimizer.param_groups)
            self._fits = fits_of(f"{type(optimizer).__name__}: ", penalized_groups, optimizer.param_groups)
            self._plan = plan
        self._given = [list(group.items()) for group in optimizer.param_groups]
        self._kept = list(optimizer.state.values())
        return plan


def _batches(
    optimizer: Any, formulas: Sequence[Formula], guest: Guest | None
) -> tuple[list[Batch], list[list[Penalized]]] | None:
    """And of each group what has no gradient."""
    entries = guest.entries if guest else _NO_ENTRY
    batches: list[Batch] = []
    rest: list[list[Penalized]] = []
    for i, group in enumerate(optimizer.param_groups):
        if has_penalty(group):
            check_whole(type(optimizer).__name__, group["params"])
        taken: dict[Any, list[Any]] = {}  # with what has the references
        rest.append([])
        for own in penalized(group):
            p = own.param
            if p.grad is None:
                rest[-1].append(own)
                continue
            entry = entries.get(id(p)) if p.requires_grad else None
            norms = group_code(entry.group) if entry is not None and entry.has_norms() else 0
            place = _place(p)
            if place is None or (entry is not None and norms and (place.is_cut or entry.is_cut or entry.is_joint)):
                return None
            source: Any = entry if guest else own if has_penalty(group) else None
            relation = tuple(getattr(source, name, None) is not None for name in REFERENCES)
            taken.setdefault((place, norms, relation), []).append((p, source))
        keys = formulas[i].keys
        for (place, norms, relation), pairs in taken.items():
            params = [p for p, _ in pairs]
            states = [optimizer.state[p] for p in params] if keys else []
            if optimizer._makes_states and not all(states):
                lists = list(inspect.signature(optimizer._init_group).parameters)[1:]
                optimizer._init_group(group, *([] for _ in lists))
            strengths = _strengths([entries.get(id(p)) if p.requires_grad else None for p in params]) if guest else {}
            present = zip(REFERENCES, relation, strict=True)
            references: list[Any] = [[getattr(x, name) for _, x in pairs] if has else [] for name, has in present]
            batches.append(Batch(i, place, norms, params, states, keys, strengths, *map(shards_of, references)))
    own_memory = [p for batch in batches if not batch.place.is_cut for p in batch.params]
    return None if _share_memory(own_memory) else (batches, rest)


def _share_memory(params: list[Tensor]) -> bool:
    """Whether one is there twice, or is a view of what another is of. torch's own steps follow one another; in one pass
    threads would write over one another."""
    try:
        if params:
            _ops.check_writable(params, (), ())
    except ValueError:
        return True
    return False


def _place(p: Any) -> Place | None:
    """None where there are no kernels."""
    if not is_dtensor(p):
        is_odd = _ops.survey([p]) & _ODD or p.is_complex() or not _devices.has_steps(p) or is_dtensor(p.grad)
        return None if is_odd else Place(p.device)
    local = p._local_tensor
    is_odd = any(placement.is_partial() for placement in p.placements) or p.device_mesh.get_coordinate() is None
    if is_odd or not is_dtensor(p.grad) or _ops.survey([local]) & _ODD or local.is_complex():
        return None
    return Place(p.device, sharing(p), True) if _devices.has_steps(local) else None


def _strengths(entries: Sequence[Entry | None]) -> dict[str, list[Held]]:
    found: dict[str, list[Held]] = {}
    for kind, term in TERM_OF.items():
        if not any(entry is not None and entry.has(term) for entry in entries):
            continue
        held = [DEFAULTS[kind] if entry is None else entry.strengths[kind] for entry in entries]
        found[kind] = held[:1] if len(set(map(identity, held))) == 1 else held
    return found


def _numbers(optimizer: Any, group: dict[str, Any], formula: Formula, guest: Guest | None) -> Numbers:
    check_options(f"{type(optimizer).__name__}: ", group, guest)
    lr, options = group["lr"], formula.options | (MAXIMIZE if group["maximize"] else 0)
    options |= PROX[guest.prox if guest else group["prox"]]
    is_read = isinstance(lr, Tensor) and lr.is_floating_point()  # by the operator
    own = {kind: x if isinstance(x, Tensor) else float(x) for kind, x in (("l1", group["l1"]), ("l2", group["l2"]))}
    own["step"] = lr if is_read else float(lr)
    is_fixed = is_read or type(lr) in (float, int)
    is_fixed &= {type(x) for x in formula.rates} <= {float, int} and type(group.get("betas", ())) is tuple
    rates = tuple(map(float, formula.rates))
    return Numbers(options, rates, own, is_fixed, isinstance(lr, Tensor) or lr == 0)


def has_penalty(group: Mapping[str, Any]) -> bool:
    return any(isinstance(x, Tensor) or x != 0 for x in (group["l1"], group["l2"]))


def check_options(where: str, group: dict[str, Any], guest: Guest | None = None) -> None:
    """Raises where an option of ours is wrong, or one that a guest brings; keeps references as tuples."""
    for key in ("l1", "l2"):
        strength = group[key]
        if not isinstance(strength, Tensor):
            if not is_number(strength):
                raise TypeError(f"{where}{key} must be a float or a 0-dim tensor, got {type(strength).__name__}")
            as_number(f"{where}{key}", strength)
        elif strength.ndim != 0 or not strength.is_floating_point():
            what = f"{strength.dtype} of shape {tuple(strength.shape)}"
            raise ValueError(f"{where}{key} must be a float or a 0-dim floating point tensor, got {what}")
        else:
            check_values({f"{where}{key}": strength})
    read_references(where, group)
    if not isinstance(group["lazy_rows"], bool):
        raise TypeError(f"{where}lazy_rows must be True or False, got {group['lazy_rows']!r}")
    prox = group["prox"]
    if not isinstance(prox, bool | str) or prox not in PROX:
        raise ValueError(f'{where}prox must be False, True or "preconditioned", got {prox!r}')
    prox = guest.prox if guest else prox
    if prox == "preconditioned" and group.get("momentum", 0) >= 1:
        raise ValueError(f'{where}momentum must be < 1 with prox="preconditioned", got {group["momentum"]}')
    if group.get("differentiable"):
        raise ValueError(f"{where}differentiable must be False, got True; take the optimizer of torch.optim")
