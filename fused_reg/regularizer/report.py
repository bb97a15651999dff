"""What a `Regularizer` reports: numbers for every parameter and strength group, from a few launches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fused_reg import _ops, _routes
from fused_reg._partitioned import check_whole
from fused_reg._terms import GROUPS, Strengths, group_count
from fused_reg.distributed import Bucket, checked_buckets, shards_of
from fused_reg.regularizer.calls import named
from fused_reg.regularizer.strengths import KINDS, Cell, Held, identity, tensor_of
from fused_reg.regularizer.table import Entry, Table

Row = dict[str, Any]

_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Report:
    """The state of a regularizer's parameters. ``str`` of it is a table.

    Attributes:
        rows: a dictionary for each strength group (``level`` "group"), followed by those of its parameters
            ("parameter"), and one for all ("total"): ``name``, ``elements``, ``value`` of the penalty, Euclidean
            ``norm``, ``zeros`` (the elements that are exactly 0), ``zero_share`` (of the elements, 0 to 1). Groups and
            parameters also have ``l1``, ``l2``, ``l2_norm`` and ``group``, and if that is not "tensor" ``slices`` and
            ``zero_slices`` (the rows or columns of which all elements are 0).
    """

    rows: list[Row] = field(default_factory=list)

    def scalars(self, prefix: str = "regularizer") -> dict[str, float]:
        """The changing numbers under tags, for any logger: ``for tag, x in report.scalars().items():
        writer.add_scalar(tag, x, step)``.

        Args:
            prefix: what every tag begins with.

        Returns:
            ``prefix/value``, ``prefix/norm`` and ``prefix/zero_share``, and the same for every parameter,
            ``prefix/name/value`` and so on; for every strength group ``prefix/group 0/l1`` and its other strengths.
        """
        scalars = {}
        for row in self.rows:
            path = prefix if row["level"] == "total" else f"{prefix}/{row['name']}"
            kinds = ["value", "norm", "zero_share"]
            if row["level"] == "group":
                kinds += ["l1", "l2", "l2_norm"]
            scalars.update({f"{path}/{kind}": float(row[kind]) for kind in kinds})
        return scalars

    def __str__(self) -> str:
        slices = any("slices" in row for row in self.rows)
        header = ["", "elements", "l1", "l2", "l2_norm", "value", "norm", "zeros", "zero slices" if slices else ""]
        lines = [header, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def _cells(row: Row) -> list[str]:
    strengths = [f"{row[kind]:g}" if row["level"] == "group" else "" for kind in KINDS]
    return [
        ("  " if row["level"] == "parameter" else "") + row["name"],
        f"{row['elements']:,}",
        *strengths,
        f"{row['value']:.6g}",
        f"{row['norm']:.6g}",
        f"{row['zeros']:,} ({100 * row['zero_share']:.1f} %)",
        f"{row['zero_slices']:,} of {row['slices']:,}" if "slices" in row else "",
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
    for kind, strength in zip(KINDS, entry.strengths, strict=True):
        tensor = tensor_of(strength)
        if isinstance(strength, Cell):
            words.append(f"{kind}={float(strength.value):g} ({'schedule' if strength.schedule else 'tensor'})")
        elif tensor is not None:
            words.append(f"{kind}={float(tensor.detach()):g} (tensor)")
        elif strength != 0:
            words.append(f"{kind}={strength:g}")
    return ", ".join(words if entry.group == "tensor" else [*words, f'group="{entry.group}"']) or "none"


def report_of(table: Table) -> Report:
    """The report of the parameters that are not frozen now."""
    groups = [[e for e in group if e.param.requires_grad] for group in table.groups()]
    groups = [group for group in groups if group]
    entries = [e for group in groups for e in group]
    check_whole("Regularizer", [e.param for e in entries], [e.name for e in entries])
    measured = _measure(entries)
    rows: list[Row] = []
    leaves: list[Row] = []
    for i, group in enumerate(groups):
        own = [measured[id(e)] for e in group]
        strengths = {kind: own[0][kind] for kind in ("l1", "l2", "l2_norm", "group")}
        rows += [_sum("group", f"group {i}", own) | strengths, *own]
        leaves += own
    return Report([*rows, _sum("total", "total", leaves)])


def _sum(level: str, name: str, rows: Sequence[Row]) -> Row:
    row: Row = {"level": level, "name": name}
    row |= {kind: sum(r[kind] for r in rows) for kind in ("elements", "zeros")}
    row["value"] = sum(r["value"] for r in rows)
    row["norm"] = math.hypot(*(r["norm"] for r in rows))
    row["zero_share"] = row["zeros"] / max(row["elements"], 1)
    if level == "group" and rows[0]["group"] != "tensor":
        row |= {kind: sum(r[kind] for r in rows) for kind in ("slices", "zero_slices")}
    return row


@torch.no_grad()
def _measure(entries: Sequence[Entry]) -> dict[int, Row]:
    """A row for each entry: some launches for each device and kind of group, and one transfer from each device."""
    measured: dict[torch.device, list[tuple[list[Entry], Tensor]]] = {}
    for kind, group in GROUPS.items():
        own = [e for e in entries if e.group == kind]
        params = [e.param for e in own]
        try:
            parts = _routes.run("report", _parts, _parts, params, group, are_whole=True) if params else []
        except (TypeError, ValueError, RuntimeError) as error:
            raise named(error, [e.name for e in own]) from error
        for places, columns in parts:
            measured.setdefault(columns.device, []).append(([own[i] for i in places], columns))
    return {id(e): row for device, parts in measured.items() for e, row in _rows_on(device, parts)}


def _parts(params: list[Tensor], group: int) -> list[tuple[list[int], Tensor]]:
    """The places of the parameters of each bucket, and what is measured of them."""
    return [(b.places, _columns(b)) for b in checked_buckets(params, shards_of(params), Strengths(group=group))]


def _rows_on(device: torch.device, parts: Sequence[tuple[list[Entry], Tensor]]) -> Iterator[tuple[Entry, Row]]:
    entries = [e for own, _ in parts for e in own]
    tensors = {identity(s): t for e in entries for s in e.strengths if (t := tensor_of(s)) is not None}
    columns = [x.reshape(-1) for _, x in parts] + [t.reshape(1) for t in tensors.values()]
    numbers = iter(torch.cat([column.to(device, torch.float64) for column in columns]).tolist())  # the transfer
    measured = [list(islice(numbers, 6)) for _ in entries]
    values = dict(zip(tensors, numbers, strict=True))

    def number(strength: Held) -> float:
        return strength if isinstance(strength, float) else values[identity(strength)]

    for entry, row in zip(entries, measured, strict=True):
        yield entry, _row(entry, *map(number, entry.strengths), *row)


def _columns(bucket: Bucket) -> Tensor:
    """[parameters, 6] float64, the numbers that `_row` takes of each."""
    shards = bucket.shards[:-1]
    norms = bucket.norms_of_tensors()
    absolute, squares, zeros = bucket.over_all(_ops.sums(shards, True, *Strengths()).T)
    are_sliced = bucket.strengths.group != GROUPS["tensor"]
    slice_norms, zero_slices = bucket.over_rest(bucket.sums_of_slices()) if are_sliced else (norms, norms)
    return torch.stack([absolute, squares, norms, zeros, slice_norms, zero_slices], dim=1)


def _value(entry: Entry, terms: Sequence[tuple[float, float]], norm: float) -> float:
    """The penalty of a parameter, from each strength and its sum. Sums of float64 elements may overflow or lose digits
    where the penalty does not: then the penalty itself is taken."""
    present = [(strength, term) for strength, term in terms if strength != 0]
    if entry.param.dtype is not torch.float64 or norm == 0 or all(2.0**-1000 < x < math.inf for _, x in present):
        return sum(strength * term for strength, term in present)
    columns = [() if strength == 0 else (strength,) for strength, _ in terms]
    return _routes.penalty([entry.param], Strengths.of(columns, GROUPS[entry.group] if columns[2] else 0)).item()


def _row(
    entry: Entry,
    l1: float,
    l2: float,
    l2_norm: float,
    absolute: float,
    squares: float,
    norm: float,
    zeros: float,
    slice_norms: float,
    zero_slices: float,
) -> Row:
    terms = ((l1, absolute), (l2, squares), (l2_norm, norm if entry.group == "tensor" else slice_norms))
    row: Row = {
        "level": "parameter",
        "name": entry.name,
        "elements": entry.param.numel(),
        **{"l1": l1, "l2": l2, "l2_norm": l2_norm, "group": entry.group},
        "value": _value(entry, terms, norm),
        "norm": norm,
        "zeros": int(zeros),
        "zero_share": zeros / max(entry.param.numel(), 1),
    }
    if entry.group != "tensor":
        slices = group_count(entry.param, GROUPS[entry.group])
        row |= {"slices": slices, "zero_slices": min(int(zero_slices), slices)}
    return row
