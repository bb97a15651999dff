"""What the penalty costs, beside the other ways of writing it and the limits of the machine: ``python -m benchmarks``
measures, prints and draws everything, with ``--quick`` a part in two minutes."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import report
from benchmarks.checks import CASES, MODES
from benchmarks.contenders import ACCUMULATE, OURS, PEERS
from benchmarks.measure import Run
from benchmarks.optimizers import OPTIMIZERS

_RESULTS, _BUILD = Path("benchmarks/results"), Path("build/bench")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what it leaves open is in `presets.json`, by the kind of device and whether it is quick."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure fused_reg and its peers.")
    add, names = parser.add_argument, list(dict.fromkeys(peer.name for peer in PEERS))
    add("--device", choices=("cpu", "cuda"), default="cpu", help="what to measure; default: cpu")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help="fewer cases, modes, peers and rounds, in under two minutes")
    form.add_argument("--slowest", action="store_true", help="the places of a CPU where ours may lose to a loop")
    add("--cases", nargs="+", choices=CASES, help="default: those of the device; quick: fewer")
    add("--modes", nargs="+", choices=MODES, help="default: all; quick: fewer")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, help="whose steps; default: all; quick: fewer")
    add("--peers", nargs="*", choices=names, help="default: all that the device has; quick: fewer")
    add("--rounds", type=int, help="samples of each time, at most (at least 5)")
    add("--seconds", type=float, help="stop the rounds of a case and mode after this long")
    add("--threads", type=int, help="default: as torch chooses")
    add("--compile-all", action="store_true", help="also compile what takes minutes to compile")
    add("--compile-seconds", type=float, help="compile nothing more after this long; default on a GPU: 200, quick 90")
    add("--no-children", action="store_true", help="on a CPU: neither peak memory nor AVX2")
    add("--output", type=Path, help=f"JSON to write; default: in {_BUILD}, of a whole GPU {_RESULTS}")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.rounds is not None and options.rounds < 5:
        parser.error(f"--rounds must be at least 5, got {options.rounds}")
    presets = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))
    options.optimizers = options.optimizers or (["SGD", "AdamW"] if options.quick else list(OPTIMIZERS))
    form = "quick" if options.quick else "slowest" if options.slowest else ""
    options.parts = [] if options.cases or options.modes else None  # the order of the presets is that of their cases
    for name, value in presets[options.device + f", {form}" * bool(form)].items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)
    peers = [p.name for p in PEERS if options.device in p.devices] if options.peers is None else options.peers
    options.peers = list(dict.fromkeys([OURS, ACCUMULATE, *peers]))
    if options.output is None:
        options.output = _BUILD / f"{form or 'full'}.json"
        if options.device == "cuda":
            name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
            options.output = _BUILD / f"{name}-quick.json" if options.quick else _RESULTS / f"{name}.json"
    return options


def main() -> int:
    """0 if everything was measured, 1 if ours was not; a missed target is no error."""
    options = parse()
    results = Run(options).measure()
    picture, text = options.output.with_suffix(".png"), options.output.with_suffix(".md")
    report.draw(results, picture)
    text.write_text(document := report.document(results, options.output.name), encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 180).print(Markdown(document))
    print(f"\nwritten: {options.output}, {picture}, {text}")
    return 1 if results.lacks_ours else 0


if __name__ == "__main__":
    sys.exit(main())
