"""What a run writes: the machine, its rows and figures; to JSON and back."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import Absent, Agreement, Costs, Figure, MemoryRow, Mode, Roofline, Row


@dataclass(frozen=True)
class Gpu:
    """The accelerator of a run."""

    name: str
    capability: str  # sm_90
    multiprocessors: int
    l2_bytes: int
    memory_bytes: int
    driver: str
    cuda: str  # that torch was built with
    timer_us: float  # between two events with nothing between: part of every device time


@dataclass(frozen=True)
class Machine:
    """What the times depend on, and nothing that says whose machine it is."""

    cpu: str
    cores: int
    threads: int
    capability: str
    huge_pages: str
    os: str
    python: str
    torch: str
    fused_reg: str
    build: dict[str, str]
    commit: str
    dirty: bool  # the working tree differed from the commit
    date: str  # UTC, when the run started
    load: float | None  # of the machine, over the minute before: what else it was doing
    gpu: Gpu | None = None


@dataclass(frozen=True)
class Results:
    """One run."""

    machine: Machine
    l1: float
    l2: float
    rows: Sequence[Row]
    memory: Sequence[MemoryRow]
    absent: Sequence[Absent]
    figures: Sequence[Figure]
    rooflines: Sequence[Roofline] = ()
    agreement: Agreement | None = None

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._as_json(), file, indent=1)
                file.write("\n")
            os.chmod(temporary, 0o644)  # mkstemp's files are the user's alone
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _as_json(self) -> dict[str, Any]:
        data = asdict(self)
        data["targets"] = [
            target | {"met": f.passed} for target, f in zip(data.pop("figures"), self.figures, strict=True)
        ]
        return data

    @classmethod
    def read(cls, path: Path) -> Results:
        """The run that `write` wrote.

        Raises:
            TypeError: the file is of another version of the rows.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            machine=_decoded(Machine, data["machine"], gpu=Gpu),
            l1=data["l1"],
            l2=data["l2"],
            rows=[_decoded(Row, row, costs=Costs) for row in data["rows"]],
            memory=[MemoryRow(**row) for row in data["memory"]],
            absent=[Absent(**row) for row in data["absent"]],
            # "figures", without "met": the files of version 0.1.0
            figures=[_figure(target) for target in data.get("targets", data.get("figures"))],
            rooflines=tuple(Roofline(**roofline) for roofline in data.get("rooflines", ())),
            agreement=Agreement(**data["agreement"]) if data.get("agreement") else None,
        )

    @property
    def lacks_ours(self) -> bool:
        """Whether ours, or a whole part of the run, failed."""
        return any(not absent.implementation or absent.implementation.startswith("fused_reg") for absent in self.absent)

    def find(
        self, case: str, mode: Mode, implementation: str, capability: str | None = None, family: str = ""
    ) -> Row | None:
        """The row, by default of the instruction set that the machine chose itself."""
        capability = capability or self.machine.capability
        for row in self.rows:
            key = (row.case, row.mode, row.implementation, row.capability, row.family)
            if key == (case, mode, implementation, capability, family):
                return row
        return None


def _decoded(kind: type[Any], data: dict[str, Any], **parts: type[Any]) -> Any:
    """An object whose parts, where there are any, are objects themselves."""
    return kind(**data | {name: part(**data[name]) for name, part in parts.items() if data.get(name)})


def _figure(target: dict[str, Any]) -> Figure:
    return Figure(**{name: value for name, value in target.items() if name != "met"})
