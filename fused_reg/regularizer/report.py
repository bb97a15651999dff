"""What a `Regularizer` reports: numbers for every parameter and strength group, from a few launches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from operator import add
from typing import Any

import torch
from torch import Tensor

from fused_reg import _ops, _routes
from fused_reg._partitioned import check_whole
from fused_reg._terms import (
    ABSENT,
    DEFAULTS,
    GROUPS,
    KINDS,
    TERM_OF,
    TERMS,
    Strengths,
    group_code,
    group_text,
)
from fused_reg.distributed.buckets import Bucket
from fused_reg.distributed.joint import Joint
from fused_reg.distributed.parts import checked_buckets
from fused_reg.distributed.shards import shards_of
from fused_reg.functional import fused_penalty
from fused_reg.regularizer.aims import Aim, aims_of
from fused_reg.regularizer.calls import joint_of, named, weights_of
from fused_reg.regularizer.entry import Entry
from fused_reg.regularizer.fits import fits_of
from fused_reg.regularizer.strengths import Cell, Column, Held, identity, tensor_of
from fused_reg.regularizer.table import Table

Row = dict[str, Any]

_NAMES_SHOWN = 3

#: Of a strength group whose zeros are an aim.
_AIMED = ("zeros_aim", "zeros_reached")

#: What is measured of every parameter: the sum that each strength is a factor of, and more.
_MEASURES = (*TERMS, "norm", "zeros", "zero_slices")
_ADDED = {"norm": math.hypot}  # others by +


@dataclass(frozen=True)
class Report:
    """The state of a regularizer's parameters. ``str`` of it is a table.

    Attributes:
        rows: a dictionary for each strength group (``level`` "group"), followed by those of its parameters
            ("parameter"), and one for all ("total"): ``name``, ``elements``, ``value`` of the penalty, Euclidean
            ``norm``, ``zeros`` (the elements that are exactly 0), ``zero_share`` (of the elements, 0 to 1). Groups and
            parameters also have their strengths (``l1`` and so on) and ``group``, and if that is not "tensor"
            ``slices`` and ``zero_slices`` (the rows or columns of which all elements are 0). Slices that are one group
            with those of other parameters, by ``together``, are in the row of the first of these, and so is the value
            of their norms. Groups whose ``zeros`` are an aim have ``zeros_aim``, the share to which the next step
            leads, of elements or of slices, and ``zeros_reached``, that of now, of all parameters that have the aim.
    """

    rows: list[Row] = field(default_factory=list)

    @property
    def total(self) -> dict[str, Any]:
        """The row of all parameters; ``report.total["value"]`` is the penalty."""
        return self.rows[-1]

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The row of this name, of a parameter first: ``report["0.weight"]["zeros"]``, ``report["group 0"]["l1"]``.

        Raises:
            KeyError: there is none.
        """
        rows = sorted(self.rows, key=lambda row: row["level"] != "parameter")
        found = next((row for row in rows if row["name"] == name), None)
        if found is None:
            near = get_close_matches(str(name), [row["name"] for row in rows], n=1, cutoff=0)
            raise KeyError(f"report: name must be that of a row, got {name!r}; the nearest is {near[0]!r}")
        return found

    def scalars(self, prefix: str = "regularizer") -> dict[str, float]:
        """The changing numbers under tags, for any logger: ``for tag, x in report.scalars().items():
        writer.add_scalar(tag, x, step)``.

        Args:
            prefix: what every tag begins with.

        Returns:
            ``prefix/value``, ``prefix/norm`` and ``prefix/zero_share``, and the same for every parameter,
            ``prefix/name/value`` and so on; for every strength group ``prefix/group 0/l1`` and its other strengths, and
            its ``zeros_aim`` and ``zeros_reached``, if it has ``zeros``.
        """
        scalars = {}
        for row in self.rows:
            path = prefix if row["level"] == "total" else f"{prefix}/{row['name']}"
            kinds = ["value", "norm", "zero_share"]
            if row["level"] == "group":
                kinds += [*self._kinds(), *(kind for kind in _AIMED if kind in row)]
            scalars.update({f"{path}/{kind}": float(row[kind]) for kind in kinds})
        return scalars

    def __str__(self) -> str:
        slices = any("slices" in row for row in self.rows)
        aims = any("zeros_aim" in row for row in self.rows)
        kinds = self._kinds()
        more = ["zero slices" if slices else "", "aim" if aims else ""]
        header = ["", "elements", *kinds, "value", "norm", "zeros", *more]
        lines = [header, *(_cells(row, kinds) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _kinds(self) -> list[str]:
        """The strengths to show: the first three, and of the others those that any parameter has."""
        used = {k for row in self.rows for k, term in TERM_OF.items() if row.get(term, ABSENT[term]) != ABSENT[term]}
        return [kind for i, kind in enumerate(KINDS) if i < 3 or kind in used]


def _cells(row: Row, kinds: Sequence[str]) -> list[str]:
    strengths = [f"{row[kind]:g}" if row["level"] == "group" else "" for kind in kinds]
    return [
        ("  " if row["level"] == "parameter" else "") + row["name"],
        f"{row['elements']:,}",
        *strengths,
        f"{row['value']:.6g}",
        f"{row['norm']:.6g}",
        f"{row['zeros']:,} ({100 * row['zero_share']:.1f} %)",
        f"{row['zero_slices']:,} of {row['slices']:,}" if "slices" in row else "",
        f"{100 * row['zeros_reached']:.1f} of {100 * row['zeros_aim']:.1f} %" if "zeros_aim" in row else "",
    ]


def summary_of(table: Table) -> str:
    """A line for each strength group: its strengths, its size, and its first names."""
    lines = []
    for group in table.groups():
        elements = sum(entry.param.numel() for entry in group)
        names = ", ".join([entry.name for entry in group[:_NAMES_SHOWN]] + ["..."] * (len(group) > _NAMES_SHOWN))
        lines.append(
            f"  {_described(group[0])}: {len(group)} parameter{'s' * (len(group) != 1)}, "
            f"{elements:,} element{'s' * (elements != 1)}: {names}\n"
        )
    return "".join(lines)


def _described(entry: Entry) -> str:
    """The strengths of an entry, in words: ``l1=0.001 (schedule), l2=0.1``."""
    words = []
    for kind, strength in entry.strengths.items():
        tensor = tensor_of(strength)
        if isinstance(strength, Cell):
            words.append(f"{kind}={float(strength.value):g} ({'schedule' if strength.schedule else 'tensor'})")
        elif tensor is not None:
            words.append(f"{kind}={float(tensor.detach()):g} (tensor)")
        elif strength != DEFAULTS[kind]:
            words.append(f"{kind}={strength:g}")
    if entry.aim is not None:
        words.append(entry.aim.text)
    return ", ".join(words if entry.group == "tensor" else [*words, group_text(entry.group)]) or "none"


def report_of(table: Table) -> Report:
    """The report of the parameters that are not frozen now."""
    groups = [[e for e in group if e.param.requires_grad] for group in table.groups()]
    groups = [group for group in groups if group]
    entries = [e for group in groups for e in group]
    check_whole("Regularizer", [e.param for e in entries], [e.name for e in entries])
    measured = _measure([e for e in table.entries if e.param.requires_grad])
    aimed = {id(aim): _aimed(aim, [measured[id(e)] for e in own]) for aim, own in aims_of(entries)}
    rows: list[Row] = []
    leaves: list[Row] = []
    for i, group in enumerate(groups):
        own = [measured[id(e)] for e in group]
        strengths = {kind: own[0][kind] for kind in (*KINDS, "group")}
        rows += [_sum("group", f"group {i}", own) | strengths | aimed.get(id(group[0].aim), {}), *own]
        leaves += own
    return Report([*rows, _sum("total", "total", leaves)])


def _sum(level: str, name: str, rows: Sequence[Row]) -> Row:
    row: Row = {"level": level, "name": name}
    row |= {kind: sum(r[kind] for r in rows) for kind in ("elements", "zeros")}
    row["value"] = sum(r["value"] for r in rows)
    row["norm"] = math.hypot(*(r["norm"] for r in rows))
    row["zero_share"] = row["zeros"] / max(row["elements"], 1)
    if level == "group" and rows[0]["group"] != "tensor":
        row |= {kind: sum(r.get(kind, 0) for r in rows) for kind in ("slices", "zero_slices")}
    return row


def _aimed(aim: Aim, rows: Sequence[Row]) -> Row:
    """What an aim is now, and what is reached of it by the parameters that have it."""
    whole, zeros = ("elements", "zeros") if aim.group == "tensor" else ("slices", "zero_slices")
    reached = sum(row[zeros] for row in rows) / max(sum(row[whole] for row in rows), 1)
    return {"zeros_aim": aim.share_of_all, "zeros_reached": reached}


@torch.no_grad()
def _measure(entries: Sequence[Entry]) -> dict[int, Row]:
    """A row for each entry: some launches for each device and kind of group, and one transfer from each device."""
    fits_of(entries).check()
    measured: dict[torch.device, list[tuple[list[Entry], Tensor]]] = {}
    for kind, is_joint in dict.fromkeys((e.kind, e.is_joint) for e in entries):
        whole = [e for e in entries if (e.kind, e.is_joint) == (kind, is_joint)]
        cut = [(e, part) for e in whole for part in e.cut(e.param)]
        own, params, group = [e for e, _ in cut], [part for _, part in cut], group_code(kind)
        weights_of(whole)
        args = params, _numbers_of(own, group), joint_of(whole, len(params)) if is_joint else None
        try:
            parts = _routes.run("report", _parts, _parts, *args, are_whole=True)
        except (TypeError, ValueError, RuntimeError) as error:
            raise named(error, [e.name for e in own]) from error
        for places, columns in parts:
            measured.setdefault(columns.device, []).append(([own[i] for i in places], columns))
    return {id(e): row for device, parts in measured.items() for e, row in _rows_on(device, parts)}


def _parts(params: list[Tensor], numbers: Strengths, joint: Joint | None) -> list[tuple[list[int], Tensor]]:
    """The places of the parameters of each bucket, and what is measured of them."""
    return [(b.places, _columns(b)) for b in checked_buckets(params, shards_of(params), numbers, joint)]


def _numbers_of(entries: Sequence[Entry], group: int) -> Strengths:
    """What the sums of their terms need beside the parameters: the numbers of all but the first three."""
    numbers = {}
    for kind in KINDS[3:]:
        if TERM_OF[kind] in TERMS and any(e.has(TERM_OF[kind]) for e in entries):
            column = Column([e.strengths[kind] for e in entries]).get()
            numbers[kind] = column if isinstance(column, Tensor) else (column,)
    return Strengths(group=group).having(**numbers)


def _rows_on(device: torch.device, parts: Sequence[tuple[list[Entry], Tensor]]) -> Iterator[tuple[Entry, Row]]:
    entries = [e for own, _ in parts for e in own]
    tensors = {identity(s): t for e in entries for s in e.strengths.values() if (t := tensor_of(s)) is not None}
    columns = [x.reshape(-1) for _, x in parts] + [t.reshape(1) for t in tensors.values()]
    numbers = iter(torch.cat([column.to(device, torch.float64) for column in columns]).tolist())  # the transfer
    measured: dict[int, dict[str, float]] = {}  # of those that are cut the sums
    for e in entries:
        part = dict(zip(_MEASURES, islice(numbers, len(_MEASURES)), strict=True))
        rest = measured.get(id(e))
        measured[id(e)] = part if rest is None else {k: _ADDED.get(k, add)(x, rest[k]) for k, x in part.items()}
    values = dict(zip(tensors, numbers, strict=True))

    def number(strength: Held) -> float:
        return strength if isinstance(strength, float) else values[identity(strength)]

    for entry in {id(e): e for e in entries}.values():
        yield entry, _row(entry, {kind: number(s) for kind, s in entry.strengths.items()}, measured[id(entry)])


def _columns(bucket: Bucket) -> Tensor:
    """[parameters, measures] float64: the `_MEASURES` of each."""
    norms = bucket.norms_of_tensors()
    sums = _ops.sums(bucket.shards, True, *bucket.strengths._replace(group=0))[:-1]  # without the empty tensor's
    absolute, squares, *others, zeros = bucket.over_all(sums.T)
    are_sliced = bucket.strengths.group != GROUPS["tensor"] or bucket.joint is not None
    slice_norms, zero_slices = bucket.over_rest(bucket.sums_of_slices()) if are_sliced else (norms, norms)
    return torch.stack([absolute, squares, slice_norms, *others, norms, zeros, zero_slices], dim=1)


def _row(entry: Entry, strengths: dict[str, float], measures: dict[str, float]) -> Row:
    norm, zeros = measures["norm"], measures["zeros"]
    row: Row = {
        "level": "parameter",
        "name": entry.name,
        "elements": entry.param.numel(),
        **strengths,
        "group": entry.group,
        "value": _value(entry, strengths, measures),
        "norm": norm,
        "zeros": int(zeros),
        "zero_share": zeros / max(entry.param.numel(), 1),
    }
    if entry.group != "tensor" and entry.is_first:
        slices = entry.group_count
        row |= {"slices": slices, "zero_slices": min(int(measures["zero_slices"]), slices)}
    return row


def _value(entry: Entry, strengths: dict[str, float], measures: dict[str, float]) -> float:
    """The penalty of a parameter, from each strength and its sum. Sums of float64 elements may overflow or lose digits
    where the penalty does not: then the penalty itself is taken, as where it is of more than the weights."""
    present = [term for term in TERMS if strengths[term] != 0]
    are_exact = all(2.0**-1000 < measures[term] < math.inf for term in present)
    is_plain = not any(entry.relation)
    if is_plain and (entry.param.dtype is not torch.float64 or measures["norm"] == 0 or are_exact):
        return sum(strengths[term] * measures[term] for term in present)
    given: dict[str, Any] = {kind: s for kind, s in strengths.items() if TERM_OF[kind] in present}
    of_norms = given.pop("l2_norm") * measures["l2_norm"] if entry.is_joint and "l2_norm" in given else 0.0
    if not given:
        return of_norms
    if "l2_norm" in given:
        given["group"] = entry.group
    given |= {name: x if x is None else entry.cut(x) for name, x in entry.references()}
    return of_norms + fused_penalty(entry.cut(entry.param.detach()), **given).item()
