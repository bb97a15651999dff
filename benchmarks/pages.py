"""The measured tables of the README and of the pages, from the committed results: ``python -m benchmarks.pages`` writes
them and the paragraph behind each."""

import re
import textwrap
from collections.abc import Iterable
from itertools import product
from pathlib import Path

from benchmarks.checks import CASES, MODES, RELATIVE_MODES, STEP_MODES
from benchmarks.contenders import COMPILED_LOOP, FOREACH_NORM, LOOP, OURS
from benchmarks.growth import WORKS, found
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.pat import table as pat_table
from benchmarks.relative import COPY, USES
from benchmarks.report import caption, joined, notable_errors, number, sized, slowest, table
from benchmarks.results import Record, Results

ROOT = Path(__file__).parent.parent
_STEP, _FUSED, _FOREACH = "fused_reg.optim", "torch fused, weight_decay", "torch foreach, weight_decay"
_LARGE = ("resnet50", "gpt2")
_ADD, _ACCUMULATE, _IN_LOSS = "g.add_(x, alpha=a), one tensor", "fused_reg.accumulate_grad_", "loop in the loss"
_TIMES = (
    ("forward + backward, .grad None, ms", "fresh", "", (OURS, COMPILED_LOOP, LOOP, FOREACH_NORM)),
    ("AdamW step, ms", "step", "AdamW", (_STEP, "torch.compile, weight_decay", _IN_LOSS, _FUSED)),
)
# The mode and family, and whose time is divided by whose.
_RATIOS = {
    "`accumulate_grad_`, of the time of `g.add_(x, alpha=a)` over the same memory": ("present", "", _ACCUMULATE, _ADD),
    "the same, times as fast as torch.compile of the loop": ("present", "", COMPILED_LOOP, _ACCUMULATE),
    "`prox_`, of the time of `x.mul_(a)`": ("prox", "", OURS, "x.mul_(a), one tensor"),
    "`attach` to torch's fused SGD, of its time with `weight_decay`": ("attached", "SGD", "fused_reg attached", _FUSED),
    "`fused_reg.optim.SGD`, times as fast as with the loop in the loss": ("step", "SGD", _IN_LOSS, _STEP),
}

_RELATIVE = dict(zip(RELATIVE_MODES, ("value_and_grad", "accumulate_grad_", "prox_"), strict=True))


class Committed:
    """The results of the penalties, of the steps, of the slowest places, of growth, of references, and beside PAT."""

    def __init__(self, folder: Path = ROOT / "benchmarks" / "results") -> None:
        self.penalties, self.steps = (Results.read(folder / f"{name}.json") for name in ("cpu", "cpu-steps"))
        self.slowest, self.growth = (Results.read(folder / f"{name}.json") for name in ("cpu-slowest", "growth"))
        self.relative, self.pat = (Results.read(folder / f"{name}.json") for name in ("cpu-relative", "pat"))

    def find(self, case: str, mode: str, *row: str) -> Record | None:
        return (self.steps if mode in STEP_MODES else self.penalties).find(case, mode, *row)

    def ratio(self, case: str, mode: str, family: str, of: str, to: str, capability: str = "") -> str:
        return _ratio(self.steps if mode in STEP_MODES else self.penalties, case, mode, family, of, to, capability)

    def times(self) -> str:
        lines: list[list[str]] = []
        for title, mode, family, names in _TIMES:
            lines.append([f"**{name}**" for name in (title, *names)])
            for case in [case for case in CASES if case != "small_tensors_160"]:  # for the README's length
                rows = [self.find(case, mode, name, family) for name in names]
                if rows[0]:
                    lines.append([sized(case), *(_time(row, rows[0]) for row in rows)])
        heads = [head.strip("*") for head in lines[0]]
        return table([dict(zip(heads, line, strict=True)) for line in lines[1:]])

    def ratios(self) -> str:
        lines = []
        for label, row in _RATIOS.items():
            lines.append({"in place": label} | {CASES[case].title: self.ratio(case, *row) for case in _LARGE})
        return table(lines)

    def of_steps(self) -> str:
        lines = []
        for name, kind in OPTIMIZERS.items():
            line, to = {"step with L1, L2 and value": name}, _FUSED if kind.tier == "fused" else _FOREACH
            for case in CASES:
                if self.find(case, "step", _STEP, name):
                    row = (case, "step", name, _STEP, to)
                    line[CASES[case].title] = f"{self.ratio(*row)}, {self.ratio(*row, 'AVX2')}"
            lines.append(line)
        return table(lines)

    def of_relative(self) -> str:
        """Of the time of a copy over as many bytes; and how many times as fast as the loop."""
        lines = []
        for (mode, function), family in product(_RELATIVE.items(), USES):
            line, ours = {"ResNet-50, of the time of a copy": f"`{function}`, {family}"}, MODES[mode].ours
            for capability, threads in product(("AVX512", "AVX2"), (1, 2)):
                row = ("resnet50", mode, family, ours, COPY, capability, threads)
                line[f"{capability}, {threads} thread{'s' * (threads > 1)}"] = _ratio(self.relative, *row)
            row = ("resnet50", mode, family, LOOP, ours)
            lines.append(line | {"times as fast as the loop": _ratio(self.relative, *row)})
        return table(lines)

    def of_growth(self) -> str:
        """What each tensor and each element costs, of few and of the most."""
        lines = []
        for work in WORKS:
            line = {"of each, with L1 and L2": work}
            for axis, few, unit, name in (
                ("tensors", 1000, 1e3, "us a tensor"),
                ("elements", 10**6, 1e6, "ns an element"),
            ):
                times, twice = (found(self.growth, axis, work, "", "ms", threads) for threads in (1, 2))
                most, memory = max(times), found(self.growth, axis, work, "", "peak_bytes")
                line[f"{name}, of {few:,}"], line[f"of {most:,}"] = (number(unit * times[n] / n) for n in (few, most))
                line[f"2 threads, {axis}"] = f"{times[most] / twice[most]:.2f}x" if most in twice else "-"
                line[f"bytes {name[3:]}"] = number(memory[max(memory)] / max(memory))
            lines.append(line)
        return table(lines)


def _ratio(results: Results, case: str, mode: str, family: str, of: str, to: str, *where: object) -> str:
    rows = [results.find(case, mode, name, family, *where) for name in (of, to)]
    return f"{rows[0]['median_ms'] / rows[1]['median_ms']:.2f}" if all(rows) else "-"


def _time(row: Record | None, ours: Record) -> str:
    if row is None:
        return "-"
    ratio = "" if row is ours else f" ({row['median_ms'] / ours['median_ms']:.1f}x)"
    return joined(number(row["median_ms"]) + ratio, notable_errors(row))


def written(committed: Committed) -> Iterable[tuple[Path, str]]:
    """Each page with the text that it should have."""
    machines = f"on a shared machine: {caption(committed.penalties)}; steps: {caption(committed.steps)}."
    times = f"In brackets: how many times our time. Medians of rounds that are interleaved, {machines}"
    ratios, steps = (
        f"Medians, {machines}",
        "Of the time of torch's fused step with `weight_decay` (RMSprop has none: the foreach one)",
    )
    pages = {
        "README.md": [(committed.times(), times)],
        "docs/performance.md": [
            (committed.ratios(), ratios),
            (committed.of_steps(), f"{steps}, with AVX-512, and with AVX2."),
            (
                slowest(committed.slowest),
                f"{caption(committed.slowest)}; a place ends with its instructions and threads.",
            ),
            (
                committed.of_relative(),
                "A copy is `y.copy_(x)` of half as many elements as the work reads and writes. The loop: AVX-512 and 2 "
                f"threads. Medians: {caption(committed.relative)}.",
            ),
            (committed.of_growth(), f'{caption(committed.growth)}; one thread, but for "2 threads": how much faster.'),
        ],
        "docs/examples/pat.md": [
            (
                pat_table(committed.pat),
                "In brackets: how many times the time of the first that does the same. Medians of rounds that are "
                f"interleaved: {caption(committed.pat)}, torchao {committed.pat.machine['torchao']}.",
            ),
        ],
    }
    for name, blocks in pages.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        for block in blocks:
            text = _replaced(text, *block)
        yield ROOT / name, text


def _replaced(text: str, made: str, paragraph: str) -> str:
    """The table that begins with the same words, and the paragraph behind it."""
    head = re.escape(made[: made.index(" |", 1)])
    block = f"{made}\n\n{textwrap.fill(paragraph, 128)}\n\n"
    text, count = re.subn(rf"^{head} .*?\n\n.*?\n\n", lambda _: block, text, flags=re.DOTALL | re.MULTILINE)
    assert count == 1, head
    return text


if __name__ == "__main__":
    for _path, _text in written(Committed()):
        _path.write_text(_text, encoding="utf-8")
