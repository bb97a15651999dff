"""The targets of the project on a CPU, in `cuda_figures.py` on a GPU, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.cases import CASES, DEVICE_CASES
from benchmarks.cuda_figures import cuda_figures
from benchmarks.limits import LIMITS
from benchmarks.optimizers import ATTACHED, FUSED_SGD, LOOP_IN_LOSS, NO_PENALTY, WEIGHT_DECAY
from benchmarks.peers import ACCUMULATE, COMPILED_LOOP, LOOP, OURS, limited
from benchmarks.rows import COMPILED_MODES, Figure, Mode
from benchmarks.run import Results
from benchmarks.table import LIMITED_TITLES, MODE_TITLES

# Forward and backward with `.grad` None: at least so many times as fast.
_SPEEDUPS = {
    LOOP: {"resnet50": 7.0, "gpt2": 7.0, "mlp": 3.0, "net": 3.0, "small_tensors": 8.0},
    COMPILED_LOOP: {"resnet50": 1.7, "gpt2": 1.7, "mlp": 2.0, "net": 2.0},
}

# A training step that is compiled as a whole: not slower than with the loop in it, which is compiled too.
_COMPILED_STEP_SPEEDUP = 1.0

# Where memory is the limit: at most so many times the limit's time.
_LIMITED_CASES = ("resnet50", "vit_b16", "gpt2", "one_tensor")
_LIMITED_MODES: tuple[Mode, ...] = ("value", "value_and_grad")
_LIMIT_RATIO, _LIMIT_RATIO_AVX2 = 1.25, 1.6
AVX2_CASES = ("resnet50", "one_tensor")

# In place: at most so many times the limit's time; `accumulate_grad_` at least so many times as fast as torch.compile.
_IN_PLACE_CASES = ("resnet50", "gpt2")
_IN_PLACE_MODES: tuple[Mode, ...] = ("present", "prox")
_IN_PLACE_RATIO, _ACCUMULATE_SPEEDUP = 1.2, 3.0

# A step of SGD with an attached regularizer: at most so many times that with `weight_decay`, at least so many times as
# fast as with the loop; of 4 tensors, at most so many microseconds more than without a penalty.
_STEP_RATIO, _STEP_SPEEDUP = 2.2, 2.0
_SMALL_CASES, _ADDED_US = ("net", "mlp"), 30.0

# At most what torch.compile's needs.
MEMORY_CASES = ("resnet50", "gpt2")
_MEMORY_RATIO = 1.0


def with_figures(results: Results) -> Results:
    """The results with every target, measured or not."""
    if results.machine.gpu:
        return replace(results, figures=list(cuda_figures(results)))
    measured = (_speedups, _compiled_steps, _limits, _in_place, _steps, _memory)
    figures = [figure for part in measured for figure in part(results)]
    return replace(results, figures=figures)


def _speedups(results: Results) -> Iterator[Figure]:
    for peer, targets in _SPEEDUPS.items():
        for case, target in targets.items():
            row = results.find(case, "fresh", peer.name)
            claim = f"{CASES[case].title}, forward + backward: times as fast as {peer.name}"
            yield Figure(claim, row.ratio_to_ours if row else None, target, at_least=True)


def _compiled_steps(results: Results) -> Iterator[Figure]:
    for case in DEVICE_CASES["cpu"]:
        for mode in COMPILED_MODES:
            row = results.find(case, mode, COMPILED_LOOP.name)
            claim = f"{CASES[case].title}, {MODE_TITLES[mode]}: times as fast as with the loop"
            yield Figure(claim, row.ratio_to_ours if row else None, _COMPILED_STEP_SPEEDUP, at_least=True)


def _limits(results: Results) -> Iterator[Figure]:
    kinds = (
        (_LIMITED_CASES, results.machine.capability, _LIMIT_RATIO),
        (AVX2_CASES, "AVX2", _LIMIT_RATIO_AVX2),
    )
    for cases, capability, target in kinds:
        for mode in _LIMITED_MODES:
            limit, *_ = LIMITS["cpu"][mode]
            for case in cases:
                row = results.find(case, mode, OURS.name, capability)
                claim = f"{CASES[case].title}, {mode}, {capability}: of the time of `{limit}`"
                yield Figure(claim, row.ratio_to_limit if row else None, target, at_least=False)


def _in_place(results: Results) -> Iterator[Figure]:
    for mode in _IN_PLACE_MODES:
        limit, *_ = LIMITS["cpu"][mode]
        for case in _IN_PLACE_CASES:
            row = results.find(case, mode, limited(mode))
            claim = f"{CASES[case].title}, {LIMITED_TITLES[mode]}: of the time of `{limit}`"
            yield Figure(claim, row.ratio_to_limit if row else None, _IN_PLACE_RATIO, at_least=False)
    for case in _IN_PLACE_CASES:
        claim = f"{CASES[case].title}, {LIMITED_TITLES['present']}: times as fast as {COMPILED_LOOP.name}"
        times = _times(results, case, "present", COMPILED_LOOP.name, ACCUMULATE.name)
        yield Figure(claim, times[0] / times[1] if times else None, _ACCUMULATE_SPEEDUP, at_least=True)


def _steps(results: Results) -> Iterator[Figure]:
    for case in _IN_PLACE_CASES:
        claim = f"{CASES[case].title}, step of {FUSED_SGD}, regularizer attached"
        times = _times(results, case, "step", ATTACHED, WEIGHT_DECAY, FUSED_SGD)
        measured = times[0] / times[1] if times else None
        yield Figure(f"{claim}: of the time with {WEIGHT_DECAY}", measured, _STEP_RATIO, at_least=False)
        times = _times(results, case, "step", LOOP_IN_LOSS, ATTACHED, FUSED_SGD)
        measured = times[0] / times[1] if times else None
        yield Figure(f"{claim}: times as fast as with the {LOOP_IN_LOSS}", measured, _STEP_SPEEDUP, at_least=True)
    for case in _SMALL_CASES:
        claim = f"{CASES[case].title}, step of {FUSED_SGD}, regularizer attached: microseconds added"
        times = _times(results, case, "step", ATTACHED, NO_PENALTY, FUSED_SGD)
        yield Figure(claim, 1e3 * (times[0] - times[1]) if times else None, _ADDED_US, at_least=False)


def _times(
    results: Results, case: str, mode: Mode, one: str, other: str, family: str = ""
) -> tuple[float, float] | None:
    """The milliseconds of both, if both were measured."""
    rows = [results.find(case, mode, name, family=family) for name in (one, other)]
    return (rows[0].median_ms, rows[1].median_ms) if rows[0] and rows[1] else None


def _memory(results: Results) -> Iterator[Figure]:
    for case in MEMORY_CASES:
        peaks = {row.implementation: row.peak_bytes for row in results.memory if row.case == case}
        ours, compiled = peaks.get(OURS.name), peaks.get(COMPILED_LOOP.name)
        claim = f"{CASES[case].title}, forward + backward: of the peak memory of {COMPILED_LOOP.name}"
        yield Figure(claim, ours / compiled if ours and compiled else None, _MEMORY_RATIO, at_least=False)
