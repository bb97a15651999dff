"""Whether a run meets the targets of the project, which are in `targets.csv`.

A target is a bound of what is read of the rows of a case and mode: of the contender `of`, and of those in `to`, between
semicolons. Its claim's ``{capability}`` is the instruction set, by default the one that the machine chose itself.
"""

from pathlib import Path

import pandas as pd

from benchmarks.cases import CASES
from benchmarks.results import Record, Results

AVX2_CASES, MEMORY_CASES = ("resnet50", "one_tensor"), ("resnet50", "gpt2")


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
        for case in target.cases.split():
            if target.read.startswith("percent") and CASES[case].bytes <= results.gpu["l2_bytes"]:
                continue
            names = [target.of, *filter(None, target.to.split(";"))]
            rows = [results.find(case, target.mode, name, target.family, target.capability) for name in names]
            present = [row for row in rows if row]
            is_measured = rows[0] and len(present) >= min(2, len(rows))  # of several others, one is enough
            claim = f"{CASES[case].title}, {target.claim.format(capability=target.capability or own)}"
            measured = _READS[target.read](*present) if is_measured else None
            found.append((claim, measured, target.bound, target.bounded == ">="))
    if results.gpu:
        ulps = results.agreement["max_ulp"] if results.agreement else None
        found.append(("random lists: ulps between the CPU's value and the GPU's, at most", ulps, 1.0, False))
    keys = ("claim", "measured", "target", "at_least", "met")
    return [dict(zip(keys, (*target, is_met(*target[1:])), strict=True)) for target in found]


def is_met(measured: float | None, bound: float, at_least: bool) -> bool | None:
    if measured is None:
        return None
    return measured >= bound if at_least else measured <= bound
