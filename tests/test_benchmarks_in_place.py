"""The benchmarks of what is written in place and of sums of norms: wrong results are refused, and the targets."""

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import fused_reg
from benchmarks import checks, markdown
from benchmarks.cases import CASES, Case
from benchmarks.checks import WrongResultError
from benchmarks.figures import with_figures
from benchmarks.groups import blocks, norms
from benchmarks.norms import norm_candidates
from benchmarks.peers import PEERS, Peer
from benchmarks.penalties import Problem, penalty_candidates
from benchmarks.proximal import prox_candidates
from benchmarks.run import Results
from benchmarks.timing import STRENGTHS

CPU = torch.device("cpu")
CPU_RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "cpu.json"

# A tensor of several pieces, rows longer than a piece, a convolution, a bias, a scalar row.
SHAPES = Case("shapes", "shapes", ((600, 7), (3, 500), (5, 4, 3, 3), (300,), (1, 1)))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=str)
def problem(request, monkeypatch):
    monkeypatch.setitem(checks.PIECES, "cpu", 256)
    return Problem(dataclasses.replace(SHAPES, dtype=request.param).make_params(CPU), STRENGTHS)


def _candidates(problem, mode):
    if mode == "prox":
        return prox_candidates(problem.oracle, flat=False)
    if mode == "present":
        return penalty_candidates(problem, mode, [PEERS["fused_reg.accumulate_grad_"], PEERS["torch._foreach_add_"]])
    return norm_candidates(problem.oracle, mode)


def _refused(problem, mode):
    """The contenders that are wrong."""
    wrong = set()
    for candidate in _candidates(problem, mode):
        try:
            candidate.build().verify()
        except WrongResultError:
            wrong.add((candidate.name, candidate.family))
    return wrong


@pytest.mark.parametrize("group", ["tensor", "row"])
def test_blocks_are_the_whole_tensor(problem, group):
    for p in problem.params:
        seen = torch.cat([piece.flatten() for _, (piece,) in blocks(group, p)])
        assert torch.equal(seen, p.detach().flatten())
        assert all(piece.numel() <= 256 for _, (piece,) in blocks(group, p))
        exact = torch.linalg.vector_norm(p.detach().double().reshape(len(p) if group == "row" else 1, -1), dim=1)
        torch.testing.assert_close(norms(group, p).flatten(), exact)


@pytest.mark.parametrize("mode", ["present", "norm_value", "norm_fresh", "prox"])
def test_all_are_right(problem, mode):
    assert _refused(problem, mode) == set()


def test_a_proximal_step_is_timed_where_it_starts(problem):
    """The timed step leaves the weights alone, the checked one makes zeros, and the check puts them back."""
    ours = [c.build() for c in prox_candidates(problem.oracle, flat=True) if c.role == "ours"]
    assert [c.family for c in ours] == ["", "norms of tensors", "norms of rows"]
    weights = ours[0].call.args[0]
    for contender in ours:
        contender.verify()
        for _ in range(3):
            contender.call()
        assert all(torch.equal(w, p.detach()) for w, p in zip(weights, problem.params, strict=True))
        assert all(w.data_ptr() != p.data_ptr() for w, p in zip(weights, problem.params, strict=True))


WRONG_PROX = {
    "l1": lambda p, l1, l2, **rest: fused_reg.prox_(p, 1.01 * l1, l2, **rest),
    "l2": lambda p, l1, l2, **rest: fused_reg.prox_(p, l1, 1.01 * l2, **rest),
    "l2_norm": lambda p, l1, l2, l2_norm, **rest: fused_reg.prox_(p, l1, l2, l2_norm=3 * l2_norm, **rest),
    "nothing": lambda *args, **rest: None,
}


@pytest.mark.parametrize("name", WRONG_PROX)
def test_our_wrong_prox_is_refused(name, monkeypatch):
    problem = Problem(SHAPES.make_params(CPU), STRENGTHS)
    candidates = prox_candidates(problem.oracle, flat=True)
    right, wrong = fused_reg.prox_, WRONG_PROX[name]

    def prox_(*args, **rest):
        monkeypatch.setattr("fused_reg.prox_", right)
        wrong(*args, **rest)
        monkeypatch.setattr("fused_reg.prox_", prox_)

    monkeypatch.setattr("fused_reg.prox_", prox_)
    refused = 0
    for candidate in candidates:
        if candidate.role == "ours" and (candidate.family or name != "l2_norm"):
            with pytest.raises(WrongResultError):
                candidate.build().verify()
            refused += 1
    assert refused == (2 if name == "l2_norm" else 3)


def test_missing_zeros_are_refused(monkeypatch):
    problem = Problem(SHAPES.make_params(CPU), STRENGTHS)
    right = fused_reg.prox_

    def almost(params, *args, **rest):
        right(params, *args, **rest)
        for p in params:
            p.masked_fill_(p == 0, 1e-12)

    monkeypatch.setattr("fused_reg.prox_", almost)
    for candidate in prox_candidates(problem.oracle, flat=True):
        if candidate.role == "ours":
            with pytest.raises(WrongResultError, match="are zero instead of"):
                candidate.build().verify()


@pytest.mark.parametrize("mode", ["norm_value", "norm_fresh"])
@pytest.mark.parametrize("factor", [1.00001, torch.nan])
def test_our_wrong_norms_are_refused(mode, factor, monkeypatch):
    right = fused_reg.fused_penalty
    monkeypatch.setattr("fused_reg.fused_penalty", lambda p, **rest: factor * right(p, **rest))
    problem = Problem(SHAPES.make_params(CPU), STRENGTHS)
    assert _refused(problem, mode) == {("fused_reg", "norms of tensors"), ("fused_reg", "norms of rows")}


def test_our_wrong_norm_gradient_is_refused(monkeypatch):
    right = fused_reg.fused_penalty

    def nudged(params, **rest):
        value = right(params, **rest)
        return value + 1e-5 * (value - value.detach())  # the value is right

    monkeypatch.setattr("fused_reg.fused_penalty", nudged)
    problem = Problem(SHAPES.make_params(CPU), STRENGTHS)
    assert _refused(problem, "norm_value") == set()
    assert _refused(problem, "norm_fresh") == {("fused_reg", "norms of tensors"), ("fused_reg", "norms of rows")}


def test_our_wrong_accumulation_is_refused():
    problem = Problem(SHAPES.make_params(CPU), STRENGTHS)

    def twice(params, l1, l2):
        fused_reg.accumulate_grad_(params, l1, l2)
        return fused_reg.accumulate_grad_(params, l1, l2)

    ours = Peer("fused_reg.accumulate_grad_", twice, "ours", ("present",), has_backward=False)
    candidate, *_ = penalty_candidates(problem, "present", [ours])
    with pytest.raises(WrongResultError, match="bits"):
        candidate.build().verify()


def test_rows_of_single_elements_are_left_out():
    problem = Problem([torch.randn(64, requires_grad=True) for _ in range(2)], STRENGTHS)
    for mode in ("norm_value", "norm_fresh", "prox"):
        assert {c.family for c in _candidates(problem, mode)} == {"", "norms of tensors"}


def _results(times):
    """The committed run with rows of ResNet-50 and the MLP in their place: (case, mode, name, family) -> ms, ratio."""
    run = Results.read(CPU_RESULTS)
    template = next(row for row in run.rows if row.capability == run.machine.capability)
    rows = [
        dataclasses.replace(
            template, case=c, mode=m, implementation=n, family=f, role="ours", median_ms=ms, ratio_to_limit=ratio
        )
        for (c, m, n, f), (ms, ratio) in times.items()
    ]
    return with_figures(dataclasses.replace(run, rows=rows, memory=[], absent=[]))


def test_targets_in_place():
    sgd = "SGD, fused=True"
    results = _results(
        {
            ("resnet50", "present", "fused_reg", ""): (90.0, 9.0),  # not what the target is of
            ("resnet50", "present", "fused_reg.accumulate_grad_", ""): (10.0, 1.25),
            ("resnet50", "present", "torch.compile", ""): (35.0, 4.0),
            ("resnet50", "present", "g.add_(x, alpha=a), one tensor", ""): (8.0, 1.0),
            ("resnet50", "prox", "fused_reg", ""): (6.0, 1.1),
            ("resnet50", "prox", "fused_reg", "norms of rows"): (12.0, 2.2),
            ("resnet50", "prox", "x.mul_(a), one tensor", ""): (5.5, 1.0),
            ("resnet50", "step", "fused_reg attached", sgd): (25.0, 1.0),
            ("resnet50", "step", "weight_decay", sgd): (10.0, 1.0),
            ("resnet50", "step", "loop in the loss", sgd): (100.0, 1.0),
            ("net", "step", "fused_reg attached", sgd): (0.1, 1.0),
            ("net", "step", "no penalty", sgd): (0.075, 1.0),
            ("mlp", "step", "fused_reg attached", sgd): (0.2, 1.0),  # without its peer
        }
    )
    figures = {f.claim: (f.measured, f.passed) for f in results.figures}
    assert figures["ResNet-50, accumulate_grad_: of the time of `g.add_(x, alpha=a), one tensor`"] == (1.25, False)
    assert figures["ResNet-50, accumulate_grad_: times as fast as torch.compile"] == (3.5, True)
    assert figures["ResNet-50, prox_: of the time of `x.mul_(a), one tensor`"] == (1.1, True)
    assert figures["GPT-2 small, prox_: of the time of `x.mul_(a), one tensor`"] == (None, None)
    step = f"step of {sgd}, regularizer attached"
    assert figures[f"ResNet-50, {step}: of the time with weight_decay"] == (2.5, False)
    assert figures[f"ResNet-50, {step}: times as fast as with the loop in the loss"] == (4.0, True)
    added, passed = figures[f"{CASES['net'].title}, {step}: microseconds added"]
    assert added == pytest.approx(25.0)
    assert passed
    assert figures[f"{CASES['mlp'].title}, {step}: microseconds added"] == (None, None)
    text = markdown.markdown(results)
    assert "| ResNet-50, accumulate_grad_, AVX512 | 10 |" in text
    assert "| ResNet-50, prox_, norms of rows, AVX512 | 12 |" in text
    assert "| ResNet-50, SGD, fused=True | - | 10 | 25 | 100 |" in text
