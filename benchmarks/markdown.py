"""The tables of a run: ``python -m benchmarks.markdown results.json``."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd

from benchmarks import contenders as c
from benchmarks import optimizers as o
from benchmarks.cases import CASES, MODES, NORM_MODES
from benchmarks.limits import LIMITS
from benchmarks.results import Record, Results

# What tables of a CPU's run have in their columns, and the heads of the columns of a step.
_PEERS, _COMPILED = (c.OURS, c.COMPILED_LOOP, c.LOOP, c.FOREACH_NORM), (c.OURS, c.COMPILED_LOOP, o.NO_PENALTY)
_ADDING = (c.ACCUMULATE, *_PEERS, c.FOREACH_ADD)
_COMPOSED = {"fresh": _PEERS, "present": _ADDING, "compiled_fresh": _COMPILED, "compiled_present": _COMPILED}
_STEPS = {o.NO_PENALTY: o.NO_PENALTY, o.WEIGHT_DECAY: f"`{o.WEIGHT_DECAY}`", c.OURS: "step + fused_reg"}
_STEPS |= {o.ATTACHED: "attached", o.ATTACHED_PROX: "attached, prox", o.LOOP_IN_LOSS: o.LOOP_IN_LOSS}
_LIMITED = {"present": "accumulate_grad_", "prox": "prox_"}

# All that a row has, and the heads of its columns.
_ROW = {"implementation": "", "family": "family", "median_ms": "median ms", "p20_ms": "p20", "p80_ms": "p80"}
_ROW |= {"gb_per_s": "GB/s", "costs.percent_of_roofline": "% of roofline", "costs.launches": "launches"}
_ROW |= {"costs.copies": "copies", "costs.fills": "fills", "costs.host_us": "host µs", "costs.peak_bytes": "peak bytes"}
_ROW |= {"ratio_to_ours": "to ours", "ratio_to_limit": "to limit", "compile_s": "compiled in s"}
_ROW |= {"value_error": "value off by", "gradient_error": "gradient off by"}

# Worse than this, an error is shown beside the time.
_NOTABLE = {"float32": 1e-4, "bfloat16": 1e-2}

_NOTES = (
    "GB/s: of the bytes that the work must move. to ours, to limit: the time, divided by that of ours and of the first "
    "limit. On a GPU times are the device's, by events, with the call in the queue and none of it in the L2 cache (a "
    "call of more than about a thousand launches fills the queue: its time holds the host's); host µs: until the call "
    "returns, with an empty queue; peak bytes: above the inputs, of a CUDA graph what its capture allocated."
)


def document(results: Results, name: str) -> str:
    """The tables under a title; `name` is that of the run's JSON. Of a run on a GPU every row, with the targets."""
    parts = every_row(results) if results.gpu else _cpu_parts(results)
    title = f"# Measured on the {results.gpu['name'] if results.gpu else 'CPU'}"
    origin = f"Written by `python -m benchmarks.markdown benchmarks/results/{name}`."
    brackets = "" if results.gpu else " In brackets: how many times our time."
    return "\n\n".join([title, origin + brackets, *filter(None, parts)]) + "\n"


def _cpu_parts(results: Results) -> Iterator[str]:
    rows = [row for row in results.rows if row["capability"] == results.machine["capability"]]
    rows.sort(key=lambda row: list(CASES).index(row["case"]))
    frame, titles = pd.DataFrame(rows), {mode: MODES[mode].title for mode in NORM_MODES}
    frame["sized"] = [f"{title(r['case'])} ({r['tensors']:,} tensors, {count(r['elements'])})" for r in rows]
    frame["label"] = [joined(title(row["case"]), titles.get(row["mode"]), row["family"]) for row in rows]
    for mode, names in _COMPOSED.items():
        heads = {"sized": f"{MODES[mode].title}, ms"} | {name: name for name in names}
        yield _pivot(frame[frame["mode"] == mode], heads)
    yield _limits(results)
    heads = {name: name for name in (c.OURS, c.LOOP, "loop, softshrink")}
    yield _pivot(frame[frame["mode"] == "prox"], {"label": "proximal step, ms"} | heads)
    yield _pivot(frame[frame["mode"].isin(NORM_MODES)], {"label": "sum of norms, ms"} | heads)
    yield _pivot(frame[frame["mode"] == "step"], {"label": "optimizer step, ms"} | _STEPS, ratios=False)
    yield _memory(results)
    yield "\n".join(dict.fromkeys(f"{title(a['case'])}: {a['implementation']} {a['reason']}." for a in results.absent))
    yield f"Medians. {caption(results)}."


def _pivot(frame: pd.DataFrame, heads: Mapping[str, str], ratios: bool = True) -> str:
    """A line for each label, a column for each name: milliseconds, how many times the first's, and how far off."""
    label, *names = heads
    frame = frame[frame["implementation"].isin(names)]
    names = [name for name in names if name in set(frame["implementation"])]
    ours = dict(frame[frame["implementation"] == names[0]][[label, "median_ms"]].values) if names and ratios else {}

    def cell(row: Record) -> str:
        is_peer = row["implementation"] != names[0] and row[label] in ours
        ratio = f" ({row['median_ms'] / ours[row[label]]:.1f}x)" if is_peer else ""
        return joined(number(row["median_ms"]) + ratio, notable_errors(row))

    cells = frame.assign(cell=[cell(row) for row in frame.to_dict("records")])
    wide = cells.pivot(index=label, columns="implementation", values="cell")
    wide = wide.reindex(index=frame[label].unique(), columns=names).fillna("-").reset_index()
    return table([heads[name] for name in (label, *names)], wide.values)


def _limits(results: Results) -> str:
    lines = []
    for row in results.rows:
        is_bounded = row["implementation"] == c.limited(row["mode"]) and CASES[row["case"]].is_large
        for limit in LIMITS["cpu"].get(row["mode"], ()) if is_bounded else ():
            if bound := results.find(row["case"], row["mode"], limit.name, capability=row["capability"]):
                what = _LIMITED.get(row["mode"], MODES[row["mode"]].title)
                label = joined(title(row["case"]), what, row["family"], row["capability"])
                ratio = f"{row['median_ms'] / bound['median_ms']:.2f}"
                lines.append([label, number(row["median_ms"]), f"{row['gb_per_s']:.1f}", f"`{limit.name}`", ratio])
    return table(["against the limits of the machine", "ms", "GB/s", "limit", "of its time"], lines)


def every_row(results: Results) -> Iterator[str]:
    """All that was measured: the rows by case and mode, what is absent, and the targets."""
    yield f"{caption(results)}. {_NOTES}"
    yield "\n".join(f"- {r['name']}: {r['gb_per_s']:.0f} GB/s, {r['bytes'] / 1e9:.2f} GB" for r in results.rooflines)
    if found := results.agreement:
        same = f"Values of {found['lists']:,} random lists: {found['equal']:,} have the CPU's bits"
        yield f"{same}, the others are at most {found['max_ulp']} ulp apart."
    for (case, mode, used), rows in groupby(
        results.rows, key=lambda row: (row["case"], row["mode"], row["capability"])
    ):
        head = joined(f"### {title(case)}: {MODES[mode].title}", used if used != results.machine["capability"] else "")
        frame = pd.json_normalize(list(rows)).replace({"": None}).reindex(columns=list(_ROW)).dropna(axis=1, how="all")
        cells = frame.map(lambda x: x if isinstance(x, str) else "" if pd.isna(x) else number(x))
        yield f"{head}\n\n{table([_ROW[name] for name in frame], cells.values)}"
    yield _memory(results)
    yield "\n".join(
        f"- {joined(title(a['case']), a['what'], a['implementation'])}: {a['reason']}" for a in results.absent
    )
    measured = [target for target in results.targets if target["measured"] is not None]
    yield table(["target", "measured", "bound", ""], [[t["claim"], *target_cells(t)] for t in measured])
    yield f"{len(results.targets) - len(measured)} more targets are not measured by this run."


def _memory(results: Results) -> str:
    sizes = [[f"{row[k] / 1e6:.0f}" for k in ("peak_bytes", "kept_bytes")] for row in results.memory]
    names = [joined(title(row["case"]), row["implementation"]) for row in results.memory]
    lines = [[name, *of_name] for name, of_name in zip(names, sizes, strict=True)]
    return table(["memory of forward + backward, MB", "peak", "kept without `.grad`"], lines)


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left; nothing without lines."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) if len(lines) else ""


def caption(results: Results) -> str:
    """The machine in one line."""
    machine = results.machine
    device = "{cpu}, {threads} threads, {capability}".format(**machine)
    if results.gpu:
        device = "{name}, {capability}, {multiprocessors} multiprocessors, driver {driver}, CUDA {cuda}".format(
            **results.gpu
        )
    commit = machine["commit"][:10] + (" with changes" if machine["dirty"] else "")
    return f"{device}, torch {machine['torch']}, fused_reg {machine['fused_reg']} ({commit}), {machine['date']}"


def title(case: str) -> str:
    """Of a case; of what is none, its name."""
    return CASES[case].title if case in CASES else case


def joined(*parts: str | None) -> str:
    return ", ".join(filter(None, parts))


def number(x: float) -> str:
    """Three digits, and no exponent of a time."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def count(elements: int) -> str:
    return f"{elements / 1e6:.1f}M" if elements >= 1e6 else f"{elements:,}"


def notable_errors(row: Record) -> str:
    """The errors of a peer that a reader must know; empty if there are none."""
    errors = {"value": row["value_error"], "gradient": row["gradient_error"]}
    return joined(*(f"{k} {100 * e:.2g} % off" for k, e in errors.items() if e and e > _NOTABLE[row["dtype"]]))


def target_cells(target: Record) -> list[str]:
    """What was measured, the bound, and whether it is met."""
    measured, bound = target["measured"], f"{'at least' if target['at_least'] else 'at most'} {target['target']:g}"
    if measured is None:
        return ["-", bound, "not measured"]
    is_met = measured >= target["target"] if target["at_least"] else measured <= target["target"]
    return [f"{measured:.2f}", bound, "met" if is_met else "missed"]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    print(document(Results.read(source), source.name), end="")
