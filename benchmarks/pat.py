"""Steps of fused_reg beside those of torchao's pruning-aware training (PAT): ``python -m benchmarks.pat FILE``.

The networks, their groups and the lines that a user writes are those of ``examples/pat_setups.py``. A step is the
optimizer's, with its zeros; the gradients are there. Memory is the peak of the first steps in a process of its own
above weights and gradients: states, copies, and what a step takes for itself.
"""

import argparse
import ctypes
import gc
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import process_time
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

import fused_reg.optim
from benchmarks import report
from benchmarks.checks import WrongResultError
from benchmarks.devices import Call, Device, Stopwatch, race
from benchmarks.measure import describe
from benchmarks.memory import CLEAR_REFS, RETURN_FREED_MEMORY, resident
from benchmarks.results import Record, Results

sys.path.append(str(Path(__file__).parents[1] / "examples"))

import pat_setups as of

SHARE, STRENGTH = 0.75, 1e-3
BASE, HEALING = "the optimizer alone", "PAT, healing"
AIMS = ("fused_reg.optim, zeros", "fused_reg, zeros", "PAT, MinSparsityConstraint")  # each the peers of the first
LASSOS = ("fused_reg.optim, group lasso", "fused_reg, group lasso", "PAT, group lasso")
_LONG, _SHORT = 10**9, 2  # steps: a ramp that stays near its end, and one that is over after a step
_TOLERANCE = 1e-5
_WARM_UP, _SAMPLE_S = 3, 5e-3  # calls, and the least that a sample takes


class Case(NamedTuple):
    title: str
    make: Callable[[], nn.Module]
    kind: str

    def model(self) -> nn.Module:
        """With small gradients; seeded."""
        torch.manual_seed(0)
        model = self.make()
        for p in model.parameters():
            p.grad = torch.randn_like(p).mul_(1e-3)
        return model


def _convolutions(channels: list[int]) -> nn.Module:
    from prune import network  # which needs scikit-learn

    return network(channels)


CASES = {
    "convolutions": Case("convolutions, 15,258", partial(_convolutions, [16, 32, 32]), "convolutions"),
    "convolutions_large": Case("convolutions, 11.8M", partial(_convolutions, [256, 1024, 1024]), "convolutions"),
    "transformer": Case("transformer, 100,938", of.Transformer, "transformer"),
    "transformer_large": Case("transformer, 25.2M", partial(of.Transformer, 512, 8, 8), "transformer"),
}


class Processor(Device):
    """Times by the processor's clock, which what else runs on the machine does not lengthen; of one thread."""

    def stopwatch(self, call: Call) -> Stopwatch:
        def seconds(calls: int) -> float:
            start = process_time()
            for _ in range(calls):
                call()
            return (process_time() - start) / calls

        seconds(_WARM_UP)
        calls = math.ceil(_SAMPLE_S / seconds(1))
        return calls, partial(seconds, calls), None


Contenders = Mapping[str, Callable[[nn.Module], Optimizer]]  # each makes its optimizer for a network


def contenders(case: Case) -> Contenders:
    """PAT sums up its thresholds over the steps, of which the first is without one for us: with half the strength both
    do the same in the second."""
    ours, pat, dense = (getattr(of, f"{whose}_{case.kind}") for whose in ("ours", "pat", "dense"))
    optim = fused_reg.optim
    aims = (partial(ours, optim=optim), ours, pat)
    found = dict(zip(AIMS, (partial(_made, setup, SHARE) for setup in aims), strict=True))
    found |= {BASE: dense, HEALING: found[AIMS[-1]]}
    if case.kind == "convolutions":
        strengths = (STRENGTH, STRENGTH, STRENGTH / 2)
        lassos = zip((partial(of.ours_lasso, optim=optim), of.ours_lasso, of.pat_lasso), strengths, strict=True)
        found |= dict(zip(LASSOS, (partial(_made, *lasso) for lasso in lassos), strict=True))
    return found


def _made(setup: of.Setup, amount: float, model: nn.Module) -> Optimizer:
    return setup(model, amount, _LONG if setup in (of.pat_convolutions, of.pat_transformer, of.pat_lasso) else _SHORT)


def prepared(case: Case, name: str) -> tuple[nn.Module, Optimizer]:
    """After a step without zeros and one with all of them; healing begins with the next."""
    model = case.model()
    optimizer = contenders(case)[name](model)
    optimizer.step()
    if name.startswith("PAT"):
        optimizer.num_steps = optimizer.healing_start_step - 10**6
    optimizer.step()
    if name == HEALING:
        optimizer.num_steps = optimizer.healing_start_step
    return model, optimizer


def check(models: Mapping[str, nn.Module]) -> None:
    """All that do the same have the same weights now, and the share of zeros that is wanted."""
    for first, *others in (AIMS, LASSOS):
        for name in (name for name in (first, *others) if first in models):
            for ours, theirs in zip(models[first].parameters(), models[name].parameters(), strict=True):
                if (error := (ours - theirs).abs().max() / ours.abs().max()) > _TOLERANCE:
                    raise WrongResultError(f"{name}: a weight is {error:.2g} of the largest off")
            shares = {mask.float().mean().item() for mask in of.zero_groups(models[name]).values()}
            if name in AIMS and shares != {SHARE}:
                raise WrongResultError(f"{name}: the shares of zero groups must be {SHARE}, got {shares}")


def times(case: Case, rounds: int, seconds: float) -> list[Record]:
    made = {name: prepared(case, name) for name in contenders(case)}
    check({name: model for name, (model, _) in made.items()})
    timings = race([optimizer.step for _, optimizer in made.values()], rounds, seconds, Processor())
    return [{"implementation": name} | timing for name, timing in zip(made, timings, strict=True)]


def peak_bytes(name: str, contender: str) -> int:
    """In a process of its own, which has seen everything on the small network."""
    if not CLEAR_REFS.exists():
        raise SystemExit("benchmarks.pat: only Linux tells the peak of a part of a process; take --no-memory")
    environment = os.environ | RETURN_FREED_MEMORY | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.pat", "--child", name, contender]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _peak_here(name: str, contender: str) -> int:
    prepared(CASES[CASES[name].kind], contender)
    model = CASES[name].model()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR_REFS.write_text("5")  # the peak restarts at what is there now
    before = resident("VmRSS")
    optimizer = contenders(CASES[name])[contender](model)
    for _ in range(3):
        optimizer.step()
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pat", description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=Path("build/bench/pat.json"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a case, at most")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="of the large networks")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if of.PruneOptimizer is None:
        raise SystemExit("benchmarks.pat: needs torchao; run pip install 'fused_reg[pat]'")
    if options.child:
        print(_peak_here(*options.child))
        return
    torch.set_num_threads(1)
    results = Results(describe(Device()) | {"torchao": version("torchao")}, l1=0.0, l2=0.0)
    for name in options.cases:
        case = CASES[name]
        results.rows += [{"case": name} | row for row in times(case, options.rounds, options.seconds)]
        if options.memory and name != case.kind:
            weights = sum(p.numel() * p.element_size() for p in case.make().parameters())
            for contender in contenders(case):
                if contender != HEALING:  # which takes no less
                    row = {"case": name, "implementation": contender, "parameter_bytes": weights}
                    results.memory.append(row | {"peak_bytes": peak_bytes(name, contender)})
        results.write(options.output)
    print(table(results))


def table(results: Results) -> str:
    """A line for each contender. In brackets: how many times the time of the first that does the same."""
    lines = []
    for name in (BASE, *AIMS, HEALING, *LASSOS):
        line = {"optimizer step, ms": name}
        for case in CASES:
            rows = {row["implementation"]: row for row in results.rows if row["case"] == case}
            line[CASES[case].title] = _time(rows, name) if name in rows else "-"
        for row in results.memory:
            if row["implementation"] == name:
                title = f"memory, of the weights: {CASES[row['case']].title}"
                line[title] = f"{row['peak_bytes'] / row['parameter_bytes']:.2f}"
        lines.append(line)
    return report.table(lines)


def _time(rows: Mapping[str, Record], name: str) -> str:
    first = next((same[0] for same in ((*AIMS, HEALING), LASSOS) if name in same[1:]), None)
    ratio = f" ({rows[name]['median_ms'] / rows[first]['median_ms']:.1f}x)" if first else ""
    return report.number(rows[name]["median_ms"]) + ratio


if __name__ == "__main__":
    main()
