"""The benchmarks: their cases are the real lists, a wrong result is refused, and what they write can be read."""

import dataclasses
from collections import Counter

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import draw, markdown, peers, table
from benchmarks.cases import CASES
from benchmarks.checks import WrongResultError
from benchmarks.figures import with_figures
from benchmarks.measure import measure, parse
from benchmarks.optimizers import step_contenders
from benchmarks.penalties import Problem, penalty_candidates
from benchmarks.race import Effort
from benchmarks.rows import MODES, Figure, MemoryRow
from benchmarks.run import Results
from benchmarks.timing import STRENGTHS, Measurement, Plan
from fused_reg import Regularizer, fused_penalty, reference

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself

EFFORT = Effort(rounds=5, seconds=0.0)


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("resnet50", 161, 25_557_032),
        ("gpt2", 148, 124_439_808),
        ("vit_b16", 152, 86_567_656),
        ("mlp", 4, 101_770),
        ("net", 4, 241),
        ("small_tensors", 1000, 64_000),
        ("one_tensor", 1, 100_000_000),
    ],
)
def test_cases_are_the_real_lists(name, tensors, elements):
    assert (CASES[name].tensors, CASES[name].elements) == (tensors, elements)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smallest case in every mode: the results, and the file."""
    output = tmp_path_factory.mktemp("bench") / "new" / "results.json"
    options = ["--cases", "net", "--peers", "loop", "torch._foreach_norm", "--rounds", "5", "--seconds", "0"]
    return measure(parse([*options, "--no-children", "--output", str(output)])), output


def test_a_run_is_complete(run):
    results, output = run
    assert Results.read(output) == dataclasses.replace(results, figures=list(results.figures))
    assert [p.name for p in output.parent.iterdir()] == ["results.json"]  # no temporary file is left
    assert {row.mode for row in results.rows} == set(MODES)
    for row in results.rows:
        assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.gb_per_s == pytest.approx(row.bytes / row.median_ms / 1e6)
        assert row.samples == 5
        assert row.ratio_to_limit > 0
        if row.role != "limit":
            assert row.ratio_to_ours > 0
    bytes_per_element = {row.mode: row.bytes / row.elements for row in results.rows if row.family == ""}
    composed = {"value": 4, "value_and_grad": 8, "fresh": 8, "present": 12}
    assert bytes_per_element == composed | {
        "norm_value": 4,
        "norm_fresh": 12,
        "prox": 8,
        "compiled_fresh": 8,
        "compiled_present": 12,
    }


def test_a_run_can_be_shown(run, tmp_path, capsys):
    results, _ = run
    table.show(results)
    printed = capsys.readouterr().out
    for text in (CASES["net"].title, "optimizer step, AdamW, fused=True", "more are not measured by this run"):
        assert text in printed
    text = markdown.markdown(results)
    for start in (
        "| forward + backward, .grad present, ms | fused_reg.accumulate_grad_ | fused_reg | loop |",
        "| proximal step, ms | fused_reg | loop | loop, softshrink |",
        "| 10-20-1 net, norms of rows |",
        "| 10-20-1 net, sum of norms, forward + backward, norms of tensors |",
        "| optimizer step, ms | no penalty | `weight_decay` | step + fused_reg | attached | attached, prox | loop in",
        "| 10-20-1 net (4 tensors, 241) |",
    ):
        assert start in text
    draw.draw(results, tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_old_file(run, tmp_path):
    results, _ = run
    path = tmp_path / "results.json"
    results.write(path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(results, l1=object()).write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class _Nudged(torch.autograd.Function):
    """The identity, with a gradient that is one ulp off."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.nextafter(grad, torch.tensor(torch.inf))


def _nudged_gradient(params, l1, l2):
    return fused_penalty([_Nudged.apply(p) for p in params], l1, l2)


WRONG = {
    "value": (lambda params, l1, l2: fused_penalty(params, l1, l2) * (1 + 1e-6), "value", "value error"),
    "NaN": (lambda params, l1, l2: fused_penalty(params, l1, l2) * torch.nan, "value", "value error nan"),
    "l2 halved": (lambda params, l1, l2: fused_penalty(params, l1, l2 / 2), "fresh", "value error"),
    "gradient": (_nudged_gradient, "fresh", "bits"),
    "added gradient": (_nudged_gradient, "present", "bits"),
    "no gradient": (lambda params, l1, l2: fused_penalty(params[1:], l1, l2), "fresh", "value error"),
}


def test_our_wrong_step_is_refused(monkeypatch):
    monkeypatch.setattr("fused_reg.fused_penalty", lambda params, l2: fused_penalty(params, l2=2 * l2))
    params = CASES["net"].make_params(torch.device("cpu"))
    assert _refused(step_contenders(params)) == {"fused_reg": 6}


def _refused(contenders):
    """How many of each name are wrong."""
    names = Counter()
    for contender in contenders:
        try:
            contender.verify()
        except WrongResultError:
            names[contender.name] += 1
    return names


@pytest.mark.parametrize("wrong", ["l1", "l2"])
def test_our_wrong_attachment_is_refused(wrong, monkeypatch):
    def regularizer(params, **strengths):
        return Regularizer(params, **strengths | {wrong: 1.5 * strengths[wrong]})

    monkeypatch.setattr("fused_reg.Regularizer", regularizer)
    params = CASES["net"].make_params(torch.device("cpu"))
    assert _refused(step_contenders(params)) == {"fused_reg attached": 2, "fused_reg attached, prox": 2}


def test_our_wrong_value_and_grad_is_refused(monkeypatch):
    monkeypatch.setattr("fused_reg.value_and_grad", reference.value_and_grad)  # rounds once: other bits
    params = CASES["mlp"].make_params(torch.device("cpu"))
    ours, *_ = penalty_candidates(Problem(params, STRENGTHS), "value_and_grad", [])
    with pytest.raises(WrongResultError, match="bits"):
        ours.build().verify()


def _measure(mode, monkeypatch, penalty, role):
    monkeypatch.setitem(peers.PEERS, "fused_reg", peers.Peer("fused_reg", penalty, role=role))
    plan = Plan(["net"], [mode], EFFORT, peers=["fused_reg"])
    (item,) = plan.items()
    return Measurement(plan).records(*item)


@pytest.mark.parametrize("name", WRONG)
def test_our_wrong_result_is_refused(name, monkeypatch):
    penalty, mode, message = WRONG[name]
    with pytest.raises(WrongResultError, match=f"10-20-1 net, {mode}: fused_reg: .*{message}"):
        _measure(mode, monkeypatch, penalty, role="ours")


def test_a_peers_error_is_shown(monkeypatch):
    row = _measure("value", monkeypatch, lambda p, l1, l2: 1.05 * reference.loop(p, l1, l2), role="peer")[0]
    assert row.value_error == pytest.approx(0.05, rel=1e-4)
    assert table.notable_errors(row) == "value 5 % off"


def test_a_peer_that_does_another_job_is_refused(monkeypatch):
    with pytest.raises(WrongResultError, match="gradient error"):
        _measure("fresh", monkeypatch, lambda p, l1, l2: reference.loop(p, l1, 0.9 * l2), role="peer")


def test_figures(run):
    results, _ = run
    measured = [figure for figure in results.figures if figure.measured is not None]
    assert [figure.claim for figure in measured] == [
        "10-20-1 net, forward + backward: times as fast as loop",
        "10-20-1 net, step of SGD, fused=True, regularizer attached: microseconds added",
    ]
    memory = [
        MemoryRow("gpt2", name, "ours", parameter_bytes=4, peak_bytes=peak, kept_bytes=0)
        for name, peak in (("fused_reg", 30), ("torch.compile", 20))
    ]
    figures = with_figures(dataclasses.replace(results, memory=memory)).figures
    assert Figure("GPT-2 small, forward + backward: of the peak memory of torch.compile", 1.5, 1.0, False) in figures
    assert [Figure("", x, 2.0, at_least=True).passed for x in (None, 1.9, 2.0)] == [None, False, True]
    assert [Figure("", x, 2.0, at_least=False).passed for x in (None, 2.1, 2.0)] == [None, False, True]
