"""What a run writes: the machine, its rows and targets; to JSON and back."""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
        """The run that `write` wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        if "figures" in data:  # the files of version 0.1.0
            data["targets"] = data.pop("figures")
        return cls(**data)

    def write(self, path: Path) -> None:
        """Write the JSON, whole or not at all."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as folder:
            (part := Path(folder, "part")).write_text(text, encoding="utf-8")
            os.replace(part, path)

    def add_absent(self, case: str, what: str, implementation: str, reason: str) -> None:
        self.absent.append({"case": case, "what": what, "implementation": implementation, "reason": reason})

    @property
    def gpu(self) -> Record | None:
        return self.machine.get("gpu")

    @property
    def lacks_ours(self) -> bool:
        """Whether ours, or a whole part of the run, failed."""
        return any(not a["implementation"] or a["implementation"].startswith("fused_reg") for a in self.absent)

    def find(self, case: str, mode: str, name: str, family: str = "", capability: str = "") -> Record | None:
        """The row, by default of the instruction set that the machine chose itself; of mode memory, its record."""
        if mode == "memory":
            return next((row for row in self.memory if (row["case"], row["implementation"]) == (case, name)), None)
        key = (case, mode, name, family, capability or self.machine["capability"])
        columns = ("case", "mode", "implementation", "family", "capability")
        return next((row for row in self.rows if tuple(row[column] for column in columns) == key), None)
