"""How time and memory grow with the number of tensors, of elements and of threads: ``python -m benchmarks.growth FILE``
measures what the file lacks and draws it; `--axes`, `--threads`, `--most` and `--no-memory` measure a part.

The memory of a call is the peak above what was there before it, in pages: each call is the first of a process, forked
from one that has imported everything and run nothing.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

import fused_reg.optim
from benchmarks import contenders as c
from benchmarks.checks import Strengths, Tensors
from benchmarks.devices import Call, Device
from benchmarks.measure import describe
from benchmarks.memory import CLEAR_REFS, RETURN_FREED_MEMORY, resident
from benchmarks.report import caption
from benchmarks.results import Record, Results

#: What makes a list of each size: small tensors, or one matrix that is about square.
AXES: dict[str, tuple[Sequence[int], Callable[[int], list[Tensor]]]] = {
    "tensors": ([10**k for k in range(6)], lambda n: [torch.full((8, 8), 0.05) for _ in range(n)]),
    "elements": ([10**k for k in range(10)], lambda n: [torch.full((_root(n), n // _root(n)), 0.05)]),
}
_LARGE = 10**9  # elements, of which there is not memory for everything, nor time
TERMS: dict[str, Strengths] = {"": c.ELASTIC_NET} | c.NORMS
_SAMPLES, _SECONDS, _LEAST_S = 5, 0.1, 2e-3  # of a time: samples, how long at most, and how long each at least


def _root(n: int) -> int:
    return 10 ** (round(math.log10(n)) // 2)


def _forward_backward(params: Tensors, strengths: Strengths) -> Call:
    def call() -> None:
        c.forward_backward(partial(fused_reg.fused_penalty, params, **strengths))
        c.clear(params)

    return call


def with_grad(params: Tensors) -> Tensors:
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    return params


WORKS: dict[str, Callable[[Tensors, Strengths], Call]] = {
    "value": lambda params, s: torch.no_grad()(partial(fused_reg.fused_penalty, params, **s)),
    "value and gradient": lambda params, s: partial(fused_reg.value_and_grad, params, **s),
    "forward + backward": _forward_backward,
    "accumulate_grad_": lambda params, s: partial(fused_reg.accumulate_grad_, with_grad(params), **s),
    "prox_": lambda params, s: partial(fused_reg.prox_, params, **s, step=1e-9),
    "AdamW step": lambda params, s: fused_reg.optim.AdamW(with_grad(params), lr=1e-9, **s).step,
}


def points(axis: str, most: int = _LARGE) -> list[tuple[str, str, int]]:
    """Work, terms and size, of which each is measured."""
    every = [(work, terms, n) for n in AXES[axis][0] if n <= most for work in WORKS for terms in TERMS]
    return [x for x in every if not x[1] or (x[0] != "AdamW step" and x[2] < _LARGE)]


def _prepared(axis: str, work: str, terms: str, n: int) -> Call:
    params = [p.requires_grad_() for p in AXES[axis][1](n)]
    return WORKS[work](params, TERMS[terms])


def _milliseconds(call: Call) -> float:
    """The median of some samples; of a call that takes long there is one. One thread's time is the processor's, which
    what else runs on the machine does not lengthen."""
    clock = process_time if torch.get_num_threads() == 1 else perf_counter

    def seconds(calls: int) -> float:
        start = clock()
        for _ in range(calls):
            call()
        return (clock() - start) / calls

    seconds(1)
    samples = [seconds(1)]
    calls, end = max(1, math.ceil(_LEAST_S / samples[0])), clock() + _SECONDS - samples[0]
    while len(samples) < _SAMPLES and clock() < end:
        samples.append(seconds(calls))
    return 1e3 * sorted(samples)[len(samples) // 2]


def _peak_bytes(axis: str, work: str, terms: str, n: int) -> int:
    """Of a call, in a process of its own."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        _prepared("tensors", work, terms, 3)()  # what is loaded at a first call
        call = _prepared(axis, work, terms, n)
        if work == "AdamW step":  # whose states are made in the first
            call()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text("5")
        before = resident("VmRSS")
        call()
        os.write(writing, str(resident("VmHWM") - before).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return int(text)


def measure(results: Results, options: argparse.Namespace) -> None:
    """Add the rows that are not there yet, and write each."""
    known = {(r["axis"], r["work"], r["terms"], r["size"], r.get("threads")) for r in results.rows}
    for axis in options.axes:
        if options.memory and not any(row["axis"] == axis and "peak_bytes" in row for row in results.rows):
            command = [sys.executable, "-m", "benchmarks.growth", "--child", axis, f"--most={options.most}"]
            environment = os.environ | RETURN_FREED_MEMORY | {"PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            results.rows += map(json.loads, done.stdout.splitlines())
            results.write(options.output)
        for count in options.threads:
            torch.set_num_threads(count)
            for point in points(axis, options.most):
                if (axis, *point, count) not in known and not (count > 1 and point[1]):  # norms with one thread
                    milliseconds = _milliseconds(_prepared(axis, *point))
                    row = dict(zip(("work", "terms", "size"), point, strict=True))
                    results.rows.append({"axis": axis} | row | {"threads": count, "ms": milliseconds})
                    results.write(options.output)
                    gc.collect()


def found(results: Results, axis: str, work: str, terms: str, what: str, threads: int | None = None) -> Record:
    """Of each size the time or the memory."""
    wanted = {"axis": axis, "work": work, "terms": terms} | ({"threads": threads} if threads else {})
    return {row["size"]: row[what] for row in results.rows if wanted.items() <= row.items() and what in row}


# Of a line: the work, the terms, the colour (Okabe and Ito 2008). Norms are drawn of one work, or nobody saw a line.
_COLOURS = ("#56B4E9", "#009E73", "#999999", "#D55E00", "#E8B84A", "#CC79A7")
_LINES = [(work, "", colour, "-") for work, colour in zip(WORKS, _COLOURS, strict=True)]
_LINES += [
    ("value and gradient", norms, _COLOURS[1], style) for norms, style in zip(c.NORMS, (":", "--", "-."), strict=True)
]
# The axis, what, its unit and title; from which size on: the memory of less is a few pages.
_PANELS = (
    ("tensors", "ms", 1e3, "microseconds for each tensor", 1),
    ("elements", "ms", 1e6, "nanoseconds for each element", 100),
    ("tensors", "peak_bytes", 1.0, "bytes for each tensor of 64", 1000),
    ("elements", "peak_bytes", 1.0, "bytes for each element", 10**5),
)
_LEAST_BYTES = 1e-3  # a logarithm has no 0
_WIDTH, _HEIGHT = 5.6, 2.9  # inches, of a panel


def draw(results: Results, path: Path) -> None:
    """Write the picture: what each tensor and element costs, by how many there are. A line that rises at its end grows
    faster than linearly."""
    panels = [p for p in _PANELS if any(row["axis"] == p[0] and p[1] in row for row in results.rows)]
    with rc_context({"font.size": 10.5}):
        figure = Figure(figsize=(_WIDTH, _HEIGHT * len(panels) + 1), layout="constrained")
        for axes, (axis, what, unit, title, least) in zip(
            figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True
        ):
            for work, terms, colour, style in _LINES:
                sizes = found(results, axis, work, terms, what, 1 if what == "ms" else None)
                costs = {n: max(unit * x / n, _LEAST_BYTES) for n, x in sizes.items() if n >= min(least, max(sizes))}
                axes.plot(
                    list(costs), list(costs.values()), style, color=colour, label=", ".join(filter(None, (work, terms)))
                )
            axes.set(xscale="log", yscale="log", xlabel=axis, title=title)
            axes.spines[["top", "right"]].set_visible(False)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
        figure.supxlabel(textwrap.fill(caption(results), 72), fontsize=8, color="0.35")
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("build/bench/growth.json"))
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--most", type=int, default=_LARGE, help="the largest size; 10**9 elements take 20 GB")
    parser.add_argument("--child", choices=AXES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        for work, terms, n in points(options.child, options.most):
            row = {"axis": options.child, "work": work, "terms": terms, "size": n}
            print(json.dumps(row | {"peak_bytes": _peak_bytes(*row.values())}), flush=True)
        return
    fresh = Results(describe(Device()), **c.ELASTIC_NET)
    results = Results.read(options.output) if options.output.exists() else fresh
    measure(results, options)
    draw(results, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
