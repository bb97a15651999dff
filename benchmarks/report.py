"""The tables and the picture of a run, from its JSON: ``python -m benchmarks.report results.json`` prints the tables,
``python -m benchmarks.report results.json picture.png`` draws, and prints how many targets are met."""

import sys
import textwrap
from collections import defaultdict
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.checks import CASES, MODES
from benchmarks.contenders import COMPILED_LOOP, FOREACH_NORM, LOOP, OURS
from benchmarks.results import Record, Results

_NOTABLE = {"float32": 1e-4, "bfloat16": 1e-2}  # worse than this, an error is shown beside the time

_NOTES = """Medians in ms, and in brackets how many times that of the first column. At the end, of the first column: its
20th and 80th percentiles, the GB/s of the bytes that the work must move, its time divided by the first limit's."""

_SLOWEST_NOTE = (
    """Where ours is slowest: of every kind of work the case, instructions and threads of the worst ratio."""
)

_GPU_NOTES = """Times are the device's, by events, with the call in the queue and none of it in the L2 cache (a call of
more than about a thousand launches fills the queue: its time holds the host's). host us: until the call returns, with
an empty queue. peak bytes: above the inputs, of a CUDA graph what its capture allocated."""


def document(results: Results, name: str) -> str:
    """All tables; `name` is that of the run's JSON."""
    title = f"# Measured on the {results.gpu['name'] if results.gpu else 'CPU'}"
    origin = f"Written by `python -m benchmarks.report benchmarks/results/{name}`."
    worst = [] if results.gpu else [_SLOWEST_NOTE, slowest(results)]
    parts = [
        title,
        f"{origin} {caption(results)}.",
        *worst,
        _NOTES,
        *(_of_mode(results, mode) for mode in MODES.values()),
    ]
    if results.gpu:
        found = [f"- {r['name']}: {r['gb_per_s']:.0f} GB/s, {r['bytes'] / 1e9:.2f} GB" for r in results.rooflines]
        costs = []
        for row in results.rows:
            line = {"costs": joined(row["case"], row["mode"], row["implementation"], row["family"])}
            costs.append(line | {k.replace("_", " "): "-" if x is None else number(x) for k, x in row["costs"].items()})
        parts += [_GPU_NOTES, "\n".join(found), table(costs)]
    memory = []
    for row in results.memory:
        line = {"memory of forward + backward, MB": joined(sized(row["case"]), row["implementation"])}
        line |= {"peak": f"{row['peak_bytes'] / 1e6:.0f}", "kept without `.grad`": f"{row['kept_bytes'] / 1e6:.0f}"}
        memory.append(line)
    absent = [f"- {joined(sized(a['case']), a['what'], a['implementation'])}: {a['reason']}" for a in results.absent]
    verdicts = []
    for target in [t for t in results.targets if t["measured"] is not None]:
        bound = f"{'at least' if target['at_least'] else 'at most'} {target['target']:g}"
        line = {"target": target["claim"], "measured": f"{target['measured']:.2f}", "bound": bound}
        verdicts.append(line | {"": "met" if target["met"] else "missed"})
    parts += [table(memory), "\n".join(absent), table(verdicts)]
    return "\n\n".join(filter(None, parts)) + "\n"


def verdict(results: Results) -> str:
    """How many targets are met, in a line."""
    met = [target["met"] for target in results.targets]
    return f"of {len(met)} targets {met.count(True)} met, {met.count(False)} missed, {met.count(None)} not measured"


def slowest(results: Results) -> str:
    """A line for each kind of work: the case, instructions and threads in which ours does worst beside the best peer,
    and beside the first limit."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for row in results.rows:
        groups[row["mode"], row["family"], row["case"], row["capability"], row["threads"]].append(row)
    found: dict[tuple[str, str], list[list[tuple[float, str]]]] = defaultdict(lambda: [[], []])
    for (name, family, case, capability, threads), rows in groups.items():
        mode = MODES[name]
        ours = next((row for row in rows if row["implementation"] == mode.ours), None)
        peers = [row for row in rows if row["role"] == "peer"]
        where = f"{CASES[case].title}, {capability}, {threads}"
        if ours and peers:
            best = min(peers, key=lambda row: row["median_ms"])
            text = joined(best["implementation"], where)
            found[mode.title, family][0].append((ours["median_ms"] / best["median_ms"], text))
        if ours and ours["ratio_to_limit"]:
            found[mode.title, family][1].append((ours["ratio_to_limit"], where))
    lines = []
    for kind, worst in found.items():
        cells = ["{:.2f}: {}".format(*max(each)) if each else "-" for each in worst]
        heads = ("ours / the fastest peer, at worst", "ours / the limit, at worst")
        lines.append({"kind of work": joined(*kind)} | dict(zip(heads, cells, strict=True)))
    return table(lines)


def _of_mode(results: Results, mode) -> str:
    """A line for each case, a column for each contender."""
    own, order, lines = results.machine["capability"], list(CASES), {}
    rows = [row for row in results.rows if row["mode"] == mode.mode]
    ours = mode.ours if any(row["implementation"] == mode.ours for row in rows) else OURS
    rows.sort(
        key=lambda row: (
            row["capability"] != own,
            -row["threads"],
            order.index(row["case"]),
            row["implementation"] != ours,
        )
    )
    columns = dict.fromkeys(row["implementation"] for row in rows)
    for row in rows:
        threads = f"{row['threads']} threads" * (row["threads"] != results.machine["threads"])
        label = joined(sized(row["case"]), row["family"], row["capability"] * (row["capability"] != own), threads)
        line = lines.setdefault(label, {mode.title: label} | dict.fromkeys(columns, "-"))
        median = row["median_ms"]
        first = results.find(row["case"], mode.mode, ours, row["family"], row["capability"], row["threads"])
        ratio = f" ({median / first['median_ms']:.1f}x)" if first and first is not row else ""
        line[row["implementation"]] = joined(number(median) + ratio, notable_errors(row))
        if first is row:
            line |= {"p20, p80": f"{number(row['p20_ms'])}, {number(row['p80_ms'])}"}
            line |= {"GB/s": number(row["gb_per_s"])} if mode.roofline else {}
            line |= {"to limit": f"{row['ratio_to_limit']:.2f}"} if row["ratio_to_limit"] else {}
    return table(list(lines.values()))


def table(lines: list[Record]) -> str:
    """In Markdown, the first column to the left; nothing without lines."""
    heads = list(dict.fromkeys(head for line in lines for head in line))
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *([line.get(head, "-") for head in heads] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else ""


def caption(results: Results) -> str:
    """The machine in one line."""
    machine = results.machine
    facts = f"{{cpu}}, {{threads}} thread{'s' * (machine['threads'] != 1)}, {{capability}}"
    if results.gpu:
        facts = "{name}, {capability}, {multiprocessors} multiprocessors, driver {driver}, CUDA {cuda}"
    device = facts.format(**(results.gpu or machine))
    commit = machine["commit"][:10] + (" with changes" if machine["dirty"] else "")
    return f"{device}, torch {machine['torch']}, fused_reg {machine['fused_reg']} ({commit}), {machine['date']}"


def sized(name: str) -> str:
    """The title and size of a case; of what is none, its name."""
    if (case := CASES.get(name)) is None:
        return name
    elements = f"{case.elements / 1e6:.1f}M" if case.elements >= 1e6 else f"{case.elements:,}"
    return f"{case.title} ({len(case.shapes):,} tensor{'s' * (len(case.shapes) > 1)}, {elements})"


def joined(*parts: str | None) -> str:
    return ", ".join(filter(None, parts))


def number(x: float) -> str:
    """Three digits, and no exponent of a time."""
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def notable_errors(row: Record) -> str:
    """The errors of a peer that a reader must know; empty if there are none."""
    errors = {"value": row["value_error"], "gradient": row["gradient_error"]}
    return joined(*(f"{k} {100 * e:.2g} % off" for k, e in errors.items() if e and e > _NOTABLE[row["dtype"]]))


# Of a bar: its colour (Okabe and Ito 2008: people who see fewer can tell them apart), and whose time in which mode it
# is, divided by whose, the first that was measured. Fresh memory costs page faults, which are not the memory's speed.
_COLOURS = {COMPILED_LOOP: "#E69F00", LOOP: "#999999", FOREACH_NORM: "#CC79A7"}
_PEERS = {name: (colour, "fresh", name, [OURS]) for name, colour in _COLOURS.items()}
_LIMITED = {
    "value / x.sum()": ("#56B4E9", "value", ["x.sum(), one tensor"]),
    "value, gradient / y.copy_(x)": ("#009E73", "value_and_grad", ["y.copy_(x), warm y", "y.copy_(x), one tensor"]),
    "accumulate_grad_ / g.add_(x)": ("#D55E00", "present", ["g.add_(x, alpha=a), one tensor"]),
    "prox_ / x.mul_(a)": ("#E8B84A", "prox", ["x.mul_(a), one tensor"]),
}
_LIMITED = {label: (colour, mode, MODES[mode].ours, limits) for label, (colour, mode, limits) in _LIMITED.items()}
_LARGE = 10_000_000  # elements: from here on it is the memory that a case costs, below the calls

# Inches. For a column of 390 to 700 pixels: narrow, in large letters, a panel below the other.
_WIDTH, _BAR, _FRAME = 5.6, 0.2, 1.6


def draw(results: Results, path: Path) -> None:
    """Write the picture: forward and backward of every case, and what the large ones reach of the machine's limits."""
    times = {case: row["median_ms"] for case in CASES if (row := results.find(case, "fresh", OURS))}
    large = [case for case in CASES if CASES[case].elements >= _LARGE and results.find(case, "value_and_grad", OURS)]
    heads = {case: f"{sized(case)}, fused_reg {number(ms)} ms" for case, ms in times.items()}
    title, unit = "Penalty, forward + backward, .grad None", "times fused_reg's time, logarithmic"
    first = (title, unit, heads, _PEERS, "{ratio:.1f}x, {ms} ms")
    title, unit = "fused_reg against the speed of memory", "times the plain operation's time"
    second = (title, unit, {case: sized(case) for case in large}, _LIMITED, "{ratio:.2f}x, {speed:.0f} GB/s")
    heights = [_FRAME + _BAR * (len(bars) + 1.5) * len(cases) for _, _, cases, bars, _ in (first, second)]
    with rc_context({"font.size": 10.5}):
        figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
        for row, panel in zip(figure.subfigures(2, 1, height_ratios=heights), (first, second), strict=True):
            _draw_panel(results, row, *panel)
        figure.supxlabel(textwrap.fill(caption(results), 72), fontsize=8, color="0.35")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def _draw_panel(results, row, title, unit, cases, bars, text) -> None:
    """Under the head of each case a bar of each kind: its width, and a text behind it."""
    axes, group, least = row.subplots(), len(bars) + 1.5, 1.0
    for i, (case, head) in enumerate(cases.items()):
        axes.annotate(head, (0, i * group), (2, 0), ("axes fraction", "data"), "offset points", va="center")
        for k, (label, (colour, *bar)) in enumerate(bars.items()):
            width, behind = _bar(results, case, text, *bar)
            place, least = i * group + k + 1, min(least, width or 1)
            axes.barh(place, width, 0.9, color=colour, label=label if i == 0 else None)
            axes.annotate(behind, (max(width, 1), place), (5, 0), textcoords="offset points", va="center")
    if "logarithmic" in unit:
        axes.set(xscale="log", xlim=(least, None))
    else:
        axes.axvline(1, color="0.2", linewidth=1, linestyle="--")
    axes.set(ylim=(len(cases) * group - 0.9, -0.8), yticks=[], xlabel=f"{unit}; less is better")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.spines[["top", "right"]].set_visible(False)
    row.suptitle(title, x=0.01, ha="left", weight="bold")
    if cases:
        row.legend(loc="outside lower left", ncols=3 - len(bars) % 3, frameon=False, columnspacing=1)


def _bar(results: Results, case: str, text: str, mode: str, name: str, others: list[str]) -> tuple[float, str]:
    row = results.find(case, mode, name)
    other = next(filter(None, (results.find(case, mode, other) for other in others)), None)
    if row is None or other is None:
        return 0.0, f"{name} not measured"
    ratio = row["median_ms"] / other["median_ms"]
    text = text.format(ratio=ratio, ms=number(row["median_ms"]), speed=row["gb_per_s"])
    return ratio, joined(text, notable_errors(row))


if __name__ == "__main__":
    _source, *_picture = map(Path, sys.argv[1:])
    if _picture:
        draw(Results.read(_source), *_picture)
        print(verdict(Results.read(_source)))
    else:
        print(document(Results.read(_source), _source.name), end="")
