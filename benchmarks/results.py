"""What a run writes: the machine, its rows, and how these stand to the project's targets; to JSON and back.

A target, a line of `targets.csv`, bounds what is read of the rows of a case and mode: of the contender `of`, and of
those in `to`. Semicolons are between several of `to`, families, instruction sets and numbers of threads, by default the
machine's own; a claim names the last three as ``{family}``, ``{capability}`` and ``{threads}``.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.checks import CASES

Record = dict[str, Any]


@dataclass
class Results:
    """One run. A record of `rows` is the time of one contender of one mode on one case, of `memory` the peak of one
    forward and backward, of `absent` what the run left out, and why."""

    machine: Record
    l1: float
    l2: float
    rows: list[Record] = field(default_factory=list)
    memory: list[Record] = field(default_factory=list)
    absent: list[Record] = field(default_factory=list)
    rooflines: list[Record] = field(default_factory=list)
    agreement: Record | None = None
    targets: list[Record] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Results":
        data = json.loads(path.read_text(encoding="utf-8"))
        data.pop("figures", None)  # of version 0.1.0, with other targets
        return cls(**data)

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
            (part := Path(folder, "part")).write_text(text, encoding="utf-8")
            os.replace(part, path)

    def add_absent(self, case: str, what: str, implementation: str, reason: str) -> None:
        record = {"case": case, "what": what, "implementation": implementation, "reason": reason}
        if record not in self.absent:
            self.absent.append(record)

    @property
    def gpu(self) -> Record | None:
        return self.machine.get("gpu")

    @property
    def lacks_ours(self) -> bool:
        """Whether ours, or a whole part of the run, failed."""
        return any(not a["implementation"] or a["implementation"].startswith("fused_reg") for a in self.absent)

    def find(self, case: str, mode: str, name: str, family="", capability="", threads=0) -> Record | None:
        """The row, by default of the instruction set and the threads that the machine chose itself; of mode memory, its
        record."""
        wanted = {"case": case, "implementation": name}
        if mode != "memory":
            wanted |= {"mode": mode, "family": family, "capability": capability or self.machine["capability"]}
            wanted |= {"threads": threads or self.machine["threads"]}
        rows = self.memory if mode == "memory" else self.rows
        return next((row for row in rows if wanted.items() <= row.items()), None)


def _operations(*rows: Record) -> int | None:
    """Everything that the first makes the GPU do, beyond what the second does."""
    first, *others = [[row["costs"][kind] for kind in ("launches", "copies", "fills")] for row in rows]
    return None if any(None in counts for counts in (first, *others)) else sum(first) - sum(map(sum, others))


def _speedup(*rows: Record) -> float:
    """Of the first against the cheapest other, by what a call adds to a loop of calls: the GPU's time or the host's."""
    ours, *others = (max(1e3 * row["median_ms"], row["costs"]["host_us"]) for row in rows)
    return min(others) / ours


_READS = {
    "ratio": lambda row, other: row["median_ms"] / other["median_ms"],
    "added us": lambda row, other: 1e3 * (row["median_ms"] - other["median_ms"]),
    "peak ratio": lambda row, other: row["peak_bytes"] / other["peak_bytes"],
    "host us": lambda row: row["costs"]["host_us"],
    "percent of roofline": lambda row: row["costs"].get("percent_of_roofline"),
    "percent of limit": lambda row: row["ratio_to_limit"] and 100 / row["ratio_to_limit"],
    "operations": _operations,
    "speedup": _speedup,
}


def targets(results: Results) -> list[Record]:
    """Every target with what the run measured for it, or None, and whether that meets it; of a bandwidth only where the
    list is larger than the L2 cache."""
    device, own = "cuda" if results.gpu else "cpu", results.machine["capability"]
    table = pd.read_csv(Path(__file__).with_name("targets.csv"), keep_default_na=False)
    found = []
    for target in table[table.device == device].itertuples():
        several = (str(x).split(";") for x in (target.family, target.capability, target.threads))
        for case, family, capability, threads in product(target.cases.split(), *several):
            if target.read.startswith("percent") and CASES[case].bytes <= results.gpu["l2_bytes"]:
                continue
            names = [target.of, *filter(None, target.to.split(";"))]
            rows = [results.find(case, target.mode, name, family, capability, int(threads or 0)) for name in names]
            present = [row for row in rows if row]
            is_measured = rows[0] and len(present) >= min(2, len(rows))  # of several others, one is enough
            measured = _READS[target.read](*present) if is_measured else None
            at_least = target.bounded == ">="
            met = None if measured is None else measured >= target.bound if at_least else measured <= target.bound
            claim = target.claim.format(family=family, capability=capability or own, threads=threads)
            bound = {"target": target.bound, "at_least": at_least, "met": met}
            found.append({"claim": f"{CASES[case].title}, {claim}", "measured": measured} | bound)
    return found
