"""The targets of the project on a CPU, in `cuda_figures.py` on a GPU, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.cases import CASES
from benchmarks.cuda_figures import cuda_figures
from benchmarks.limits import LIMITS
from benchmarks.peers import COMPILED_LOOP, LOOP, OURS
from benchmarks.rows import Figure
from benchmarks.run import Results

# Forward and backward with `.grad` None: at least so many times as fast.
_SPEEDUPS = {
    LOOP: {"resnet50": 7.0, "gpt2": 7.0, "mlp": 3.0, "net": 3.0, "small_tensors": 8.0},
    COMPILED_LOOP: {"resnet50": 1.7, "gpt2": 1.7, "mlp": 2.0, "net": 2.0},
}

# Where memory is the limit: at most so many times the limit's time.
_LIMITED_CASES = ("resnet50", "vit_b16", "gpt2", "one_tensor")
_LIMIT_RATIO, _LIMIT_RATIO_AVX2 = 1.25, 1.6
AVX2_CASES = ("resnet50", "one_tensor")

# At most what torch.compile's needs.
MEMORY_CASES = ("resnet50", "gpt2")
_MEMORY_RATIO = 1.0


def with_figures(results: Results) -> Results:
    """The results with every target, measured or not."""
    if results.machine.gpu:
        return replace(results, figures=list(cuda_figures(results)))
    return replace(results, figures=[*_speedups(results), *_limits(results), *_memory(results)])


def _speedups(results: Results) -> Iterator[Figure]:
    for peer, targets in _SPEEDUPS.items():
        for case, target in targets.items():
            row = results.find(case, "fresh", peer.name)
            claim = f"{CASES[case].title}, forward + backward: times as fast as {peer.name}"
            yield Figure(claim, row.ratio_to_ours if row else None, target, at_least=True)


def _limits(results: Results) -> Iterator[Figure]:
    kinds = (
        (_LIMITED_CASES, results.machine.capability, _LIMIT_RATIO),
        (AVX2_CASES, "AVX2", _LIMIT_RATIO_AVX2),
    )
    for cases, capability, target in kinds:
        for mode, (limit, *_) in LIMITS["cpu"].items():
            for case in cases:
                row = results.find(case, mode, OURS.name, capability)
                claim = f"{CASES[case].title}, {mode}, {capability}: of the time of `{limit}`"
                yield Figure(claim, row.ratio_to_limit if row else None, target, at_least=False)


def _memory(results: Results) -> Iterator[Figure]:
    for case in MEMORY_CASES:
        peaks = {row.implementation: row.peak_bytes for row in results.memory if row.case == case}
        ours, compiled = peaks.get(OURS.name), peaks.get(COMPILED_LOOP.name)
        claim = f"{CASES[case].title}, forward + backward: of the peak memory of {COMPILED_LOOP.name}"
        yield Figure(claim, ours / compiled if ours and compiled else None, _MEMORY_RATIO, at_least=False)
