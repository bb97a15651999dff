"""The targets of the project on a GPU, and whether a run meets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.cases import CASES, DEVICE_CASES, Case
from benchmarks.limits import LIMITS
from benchmarks.optimizers import ATTACHED, FUSED_SGD, NO_PENALTY
from benchmarks.peers import COMPILED, LOOP, OURS, Peer, limited
from benchmarks.rows import CUDA_GRAPH, Figure, Mode, Row
from benchmarks.run import Results
from benchmarks.table import LIMITED_TITLES, MODE_TITLES

# The host's microseconds on ResNet-50.
_HOST_US: dict[Mode, float] = {"value": 60.0, "fresh": 250.0}

# What is one launch.
_LAUNCHES: dict[Mode, str] = {"value_and_grad": "value and gradient", "present": "accumulate_grad_", "prox": "prox_"}
_STEP_CASE = "resnet50"

# Of the bandwidth, where the list is larger than the L2 cache.
_PERCENT = 90.0
_BANDWIDTHS: dict[Mode, str] = {
    "value": "read",
    "value_and_grad": "copy",
    "present": "read-modify-write",
    "prox": "scale",
}

# Forward and backward with `.grad` None: at least so many times as fast as the loop, and as the best torch.compile.
_SPEEDUPS = {"resnet50": (30.0, 5.0), "tinyllama_bf16": (5.0, 1.0), "tinyllama": (5.0, 1.0)}

_MAX_ULP = 1.0


def cuda_figures(results: Results) -> Iterator[Figure]:
    """Every target, measured or not."""
    yield from _launches(results)
    yield from _host_times(results)
    yield from _bandwidths(results)
    yield from _speedups(results)
    max_ulp = results.agreement.max_ulp if results.agreement else None
    yield Figure("random lists: ulps between the CPU's value and the GPU's, at most", max_ulp, _MAX_ULP, at_least=False)


def _launches(results: Results) -> Iterator[Figure]:
    for mode, work in _LAUNCHES.items():
        for case in _cases():
            row = results.find(case.name, mode, limited(mode))
            yield Figure(f"{case.title}, {work}: launches, copies and fills", _operations(row), 1, at_least=False)
    both = [_operations(results.find(_STEP_CASE, "step", name, family=FUSED_SGD)) for name in (ATTACHED, NO_PENALTY)]
    added = None if both[0] is None or both[1] is None else both[0] - both[1]
    claim = f"{CASES[_STEP_CASE].title}, step of {FUSED_SGD}, regularizer attached: launches, copies and fills added"
    yield Figure(claim, added, 1, at_least=False)


def _operations(row: Row | None) -> int | None:
    return row.costs.operations if row and row.costs else None


def _host_times(results: Results) -> Iterator[Figure]:
    for mode, target in _HOST_US.items():
        row = results.find("resnet50", mode, OURS.name)
        claim = f"{CASES['resnet50'].title}, {MODE_TITLES[mode]}: host microseconds"
        yield Figure(claim, row.costs.host_us if row and row.costs else None, target, at_least=False)


def _bandwidths(results: Results) -> Iterator[Figure]:
    """Of the bandwidth on a gigabyte, and of the plain operation on the same bytes."""
    l2_bytes = results.machine.gpu.l2_bytes if results.machine.gpu else 0
    for case in _cases():
        if case.bytes <= l2_bytes:
            continue
        for mode, (limit, *_) in LIMITS["cuda"].items():
            row = results.find(case.name, mode, limited(mode))
            claim = f"{case.title}, {LIMITED_TITLES[mode]}: percent of"
            percent = row.costs.percent_of_roofline if row and row.costs else None
            yield Figure(f"{claim} the {_BANDWIDTHS[mode]} bandwidth", percent, _PERCENT, at_least=True)
            same = 100 / row.ratio_to_limit if row and row.ratio_to_limit else None
            yield Figure(f"{claim} the speed of `{limit}`", same, _PERCENT, at_least=True)


def _speedups(results: Results) -> Iterator[Figure]:
    """By what a call costs, device or host; ours as it is called, against the loop and compiled code as called, and
    each in a CUDA graph against compiled code in one."""
    for case, (loop_target, compile_target) in _SPEEDUPS.items():
        claim = f"{CASES[case].title}, forward + backward: times as fast as"
        yield Figure(f"{claim} {LOOP.name}", _speedup(results, case, [LOOP]), loop_target, at_least=True)
        best = _speedup(results, case, COMPILED)
        yield Figure(f"{claim} the best torch.compile", best, compile_target, at_least=True)
        best = _speedup(results, case, COMPILED, CUDA_GRAPH)
        yield Figure(f"{claim} the best torch.compile, both in a CUDA graph", best, 1.0, at_least=True)


def _speedup(results: Results, case: str, peers: Sequence[Peer], family: str = "") -> float | None:
    """How many times the cost of ours the cheapest of the peers costs."""
    ours = results.find(case, "fresh", OURS.name, family=family)
    rows: list[Row | None] = [results.find(case, "fresh", peer.name, family=family) for peer in peers]
    costs = [row.cost_us for row in rows if row]
    return min(costs) / ours.cost_us if ours and costs else None


def _cases() -> list[Case]:
    return [CASES[name] for name in DEVICE_CASES["cuda"]]
