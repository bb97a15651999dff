"""What an optimizer holds of a `Regularizer`: its parameters, and the rates at which they step."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_reg import _devices
from fused_reg._arguments import value_dtype
from fused_reg._lazy_rows import lend_grad, put_back, rows_of, touched
from fused_reg._terms import ABSENT, GROUPS, OF_GROUPS, group_code, group_text
from fused_reg.regularizer.calls import Part
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.fits import fits_of_strengths
from fused_reg.regularizer.projection import Projection
from fused_reg.regularizer.strengths import identity, tensor_of
from fused_reg.regularizer.table import Table

if TYPE_CHECKING:
    from fused_reg.regularizer.attachment import Mode


class Guest(NamedTuple):
    """A penalty in the pass of an optimizer of ours. As long as it is the same object, so are its strengths."""

    owner: Any  # its attachment
    prox: Any  # as the option of the optimizer
    dtype: torch.dtype  # of its value
    entries: Mapping[int, Entry]  # by the identity of their parameters


class Share:
    """``group_of``: the optimizer's, for each entry; ``part``: for values and gradients. With mode "prox" its sums
    have no sign, and ``shrinking`` is the same without the parameters that a step leaves alone."""

    entries: list[Entry]
    params: list[Tensor]
    group_of: list[int]
    part: Part
    shrinking: Part

    def __init__(self, table: Table, mode: Mode) -> None:
        self.table = table
        self._mode = mode
        self._options: list[Any] = []  # what was in the optimizer at the last look
        self._seen: list[Tensor] = []
        self._guest: tuple[Guest, Any] | None = None
        self._projection: tuple[list[bool], Projection] | None = None  # of which entries

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_options": [], "_seen": [], "_guest": None, "_projection": None}

    def has_changed(self, optimizer: Optimizer) -> bool:
        """Whether other parameters or options are in the optimizer, or other strengths in the table, by now."""
        self.table.follow()
        options: list[Any] = [self.table.version]
        params: list[Tensor] = []
        for group in optimizer.param_groups:
            options += group.get("maximize"), group.get("weight_decay"), len(group["params"])
            params += group["params"]
        if options == self._options and all(map(is_, params, self._seen)):
            return False
        self._options, self._seen = options, params
        return True

    def read(self, optimizer: Optimizer, elsewhere: Container[int]) -> None:
        """Finds the regularizer's parameters among the optimizer's; ``elsewhere``: by identity, what others handle."""
        options, self._options = self._options, []  # until all is right
        groups = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        entries = [e for e in self.table.entries if id(e.param) in groups]
        if not entries:
            raise ValueError("attach: optimizer must hold a parameter of the regularizer, got one that holds none")
        for entry in entries:
            if id(entry.param) in elsewhere:
                raise ValueError(
                    f"attach: a parameter must be handled once, but another attachment handles {entry.name!r} already"
                )
            for kind, strength in entry.strengths.items():
                if (tensor := tensor_of(strength)) is not None and tensor.requires_grad:
                    raise ValueError(
                        f"attach: {kind} of {entry.name!r} must be a constant, got a tensor that requires grad, and an "
                        "attached penalty gives it none; add regularizer() to the loss"
                    )
        self.check_aimed("attach", [entry for entry in entries if entry.aim is not None])
        for entry in entries:
            self._check_set(entry, optimizer, groups)
        self.entries, self.params = entries, [entry.param for entry in entries]
        self.group_of = [groups[id(p)] for p in self.params]
        self._groups = sorted(set(self.group_of))
        self._guest, self._projection, self._maximized = None, None, []
        if self._mode != "grad":
            self.part, self.shrinking = Part(self.table, entries), Part(self.table, entries)
            self.part.check_closed_form("attach: ")
            self._check_by_element()
            self._strengths = fits_of_strengths(entries)
        else:
            maximized = [bool(group.get("maximize")) for group in optimizer.param_groups]
            self._maximized = [maximized[i] for i in self.group_of]
            self.part = Part(self.table, entries, self._maximized)
            self.part.refuse_constraints("attach: ")
        self._options = options

    def check_aimed(self, function: str, aimed: Sequence[Entry]) -> None:
        """Raises where the mode has no zeros, and these have them, or shall have."""
        if self._mode == "grad" and aimed:
            name = aimed[0].name
            raise ValueError(f'{function}: mode must be "prox" where parameters have zeros, as {name!r}, got "grad"')

    def _check_set(self, entry: Entry, optimizer: Optimizer, groups: Mapping[int, int]) -> None:
        """Raises where an optimizer has parameters whose groups are one in part, or maximizes some of them alone."""
        for other in entry.together:
            if id(other.param) in groups:
                signs = (bool(optimizer.param_groups[groups[id(e.param)]].get("maximize")) for e in (entry, other))
                if self._mode == "grad" and len(set(signs)) > 1:
                    raise ValueError(
                        f"attach: {entry.name!r} and {other.name!r}, whose groups are one, must both be maximized, or "
                        "none of them"
                    )
            elif other.param.requires_grad:
                raise ValueError(
                    f"attach: optimizer must hold all parameters whose groups are one, got {entry.name!r} without "
                    f"{other.name!r}"
                )

    def _check_by_element(self) -> None:
        for entry in self.entries if self._mode == "preconditioned" else ():
            if (term := next((t for t in ABSENT if t not in ("l1", "l2") and entry.has(t)), None)) is not None:
                raise ValueError(
                    f'attach: mode "preconditioned" must have no term but l1 and l2, got {term} of {entry.name!r}'
                )

    def penalty(self) -> Tensor:
        with torch.no_grad():
            return self.part.penalty()

    def touched(self) -> dict[int, Tensor]:
        """By the places of the entries whose gradients are sparse, the rows that these have."""
        found: dict[int, Tensor] = {}
        for i, entry in enumerate(self.entries):
            if (index := touched(f"attach: params[{entry.name!r}]", entry.param)) is None:
                continue
            if apart := "zeros" if entry.aim is not None else entry.joint_by * entry.is_joint:
                raise ValueError(
                    f"attach: lazy_rows must come without {apart}, got both for the sparse gradient of {entry.name!r}"
                )
            norm = next(filter(entry.has, OF_GROUPS), None)
            if norm is not None and group_code(entry.group) != GROUPS["row"]:
                raise ValueError(
                    f"attach: {norm} of {entry.name!r} must be of rows where its gradient is sparse, because a batch "
                    f"has other groups in part, got {group_text(entry.group)}"
                )
            found[i] = index
        return found

    def part_of(self, rows: Mapping[int, Tensor]) -> Part:
        """`part` with copies of these rows in the place of their parameters."""
        if not rows:
            return self.part
        entries = [_of_rows(e, rows[i]) if i in rows else e for i, e in enumerate(self.entries)]
        return Part(self.table, entries, self._maximized)

    def accumulate_grad_(
        self, rows: Mapping[int, Tensor], scale: float | Tensor | None, skip_missing: bool
    ) -> tuple[Tensor, Tensor]:
        """As of a `Part`."""
        part = self.part_of(rows)
        for i in rows:
            lend_grad(part.params[i], self.params[i])
        return part.accumulate_grad_(scale, skip_missing)

    def prox_(
        self, rows: Mapping[int, Tensor], step: float | Tensor | list[float | Tensor], chosen: list[bool] | None
    ) -> None:
        """As of a `Part`."""
        part = self.part_of(rows) if rows else self.shrinking
        part.prox_(step, chosen)
        for i, index in rows.items():
            put_back(self.params[i], index, part.params[i])

    def guest(self, owner: Any, prox: Any) -> Guest:
        like = self.params[0].device, self.params[0].dtype
        if self._guest is None or self._guest[1] != like:
            self.table.place_cells()
            entries = {id(e.param): e for e in self.entries}
            self._guest = Guest(owner, prox, value_dtype(self.params), entries), like
        return self._guest[0]

    def rest(self, params: list[Tensor]) -> Part | None:
        """Those of these parameters that have a penalty, of which a step leaves out all."""
        known = {id(p) for p in params}
        entries = [e for e in self.entries if id(e.param) in known and e.param.requires_grad]
        return Part(self.table, entries, is_one_of=True) if entries else None

    def in_step(self) -> list[bool]:
        """Which parameters a step changes now."""
        return [p.grad is not None and p.requires_grad for p in self.params]

    def project_(self, chosen: list[bool] | None, found_inf: Tensor | None) -> None:
        """Makes those zero that an aim wants to be; ``chosen``: which entries a step has changed; None: all."""
        if not self.table.has_aims():
            return
        used = [p.requires_grad for p in self.params] if chosen is None else chosen
        if self._projection is None or self._projection[0] != used:
            self._projection = used, Projection(list(compress(self.entries, used)))
        self._projection[1].project_(found_inf)

    def check_fits(self) -> None:
        """Before the optimizer's step, which a proximal step follows."""
        self.part.check()
        self._strengths.check()

    def check_rates(self, optimizer: Optimizer) -> None:
        """Raises unless each of the groups has a rate that a proximal step can have. A GPU is not waited for."""
        for i in self._groups:
            group = optimizer.param_groups[i]
            rate = group.get("lr")
            if type(rate) is float and 0 <= rate < math.inf:
                continue
            is_one = not isinstance(rate, bool | str) and hasattr(rate, "__float__") and getattr(rate, "ndim", 0) == 0
            if not (rate.numel() == 1 if isinstance(rate, Tensor) else is_one):
                raise ValueError(
                    f'attach: mode "{self._mode}" must find a learning rate in each group of a regularized parameter, '
                    f'got lr={rate!r} in group {i}; mode "grad" needs none'
                )
            number = rate_of(group)
            if (
                not (isinstance(number, Tensor) and not _devices.is_at_hand(number))
                and not 0 <= float(number) < math.inf
            ):
                raise ValueError(
                    f'attach: mode "{self._mode}" must find learning rates that are finite and >= 0, got '
                    f"lr={float(number)} in group {i}"
                )
        self._check_rates_of_sets(optimizer)

    def _check_rates_of_sets(self, optimizer: Optimizer) -> None:
        """There is no closed form with several rates."""
        if len(self._groups) == 1 or not any(entry.together for entry in self.entries):
            return
        group_of = dict(zip(map(id, self.params), self.group_of, strict=True))
        for entry in self.entries:
            if not entry.together or not entry.has_norms():
                continue
            first = next(other for other in entry.together if id(other.param) in group_of)
            own, its = (identity(rate_of(optimizer.param_groups[group_of[id(e.param)]])) for e in (entry, first))
            if own != its:
                raise ValueError(
                    f"attach: the learning rate of {entry.name!r} must be that of {first.name!r} in a proximal step, "
                    "because their groups are one"
                )

    def rates(self, optimizer: Optimizer, found_inf: Tensor | None) -> float | Tensor | list[float | Tensor]:
        """The learning rate, or one for each entry; 0 where a fused optimizer has skipped its step, which the host does
        not know."""
        rates = {i: rate_of(optimizer.param_groups[i]) for i in self._groups}
        if found_inf is not None:
            taken = (found_inf == 0).double()
            scaled = {identity(rate): taken * rate for rate in rates.values()}
            rates = {i: scaled[identity(rate)] for i, rate in rates.items()}
        if len(set(map(identity, rates.values()))) == 1:
            return rates[self.group_of[0]]
        return [rates[i] for i in self.group_of]


def _of_rows(entry: Entry, index: Tensor) -> Entry:
    toward, importance = (None if x is None else rows_of(x, index) for x in (entry.toward, entry.importance))
    param = rows_of(entry.param, index).requires_grad_()
    return replace(entry, param=param, toward=toward, importance=importance)


def rate_of(group: dict[str, Any]) -> float | Tensor:
    """The rate of a group that has one: a float or a 0-dim tensor."""
    rate = group["lr"]
    if not isinstance(rate, Tensor):
        return float(rate)
    rate = rate.detach().reshape(())
    return rate if rate.is_floating_point() else rate.double()
