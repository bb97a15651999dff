"""The benchmarks of compiled training steps: a wrong penalty in one is refused, and they are left out with a reason."""

import dataclasses

import pytest
import torch
from test_benchmarks_in_place import CPU_RESULTS

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import fused_reg
from benchmarks import compiled_steps, markdown, peers
from benchmarks.cases import CASES, Case
from benchmarks.checks import WrongResultError
from benchmarks.compiled_steps import compiled_step_candidates
from benchmarks.figures import with_figures
from benchmarks.penalties import Problem
from benchmarks.race import Effort
from benchmarks.rows import COMPILED_MODES, Absent
from benchmarks.run import Results
from benchmarks.timing import STRENGTHS, Measurement, Plan

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def _ours(params, mode):
    _, candidate, *_ = compiled_step_candidates(Problem(params, STRENGTHS), mode, [])
    assert candidate.name == "fused_reg"
    return candidate.build()


WRONG = {
    "value": lambda params, l1, l2: (1 + 1e-5) * fused_reg.fused_penalty(params, l1, l2),
    "l1": lambda params, l1, l2: fused_reg.fused_penalty(params, 1.5 * l1, l2),
    "gradient": lambda params, l1, l2: fused_reg.fused_penalty([p.detach() for p in params], l1, l2),
}


@pytest.mark.parametrize("name", WRONG)
def test_our_wrong_penalty_is_refused(name, monkeypatch):
    monkeypatch.setattr(compiled_steps, "OURS", dataclasses.replace(peers.OURS, penalty=WRONG[name]))
    with pytest.raises(WrongResultError):
        _ours(CASES["net"].make_params(CPU), "compiled_fresh").verify()


@pytest.mark.parametrize("mode", COMPILED_MODES)
def test_every_kind_of_parameter(mode, monkeypatch):
    """A convolution, a matrix, a bias, a class token, and a vector so long that it is taken as a matrix."""
    monkeypatch.setattr(compiled_steps, "_LONG", 1000)
    monkeypatch.setattr(compiled_steps, "_ROW", 100)
    params = Case("shapes", "shapes", ((5, 4, 3, 3), (7, 6), (7,), (1, 1, 6), (2000,))).make_params(CPU)
    contender = _ours(params, mode)
    contender.verify()
    assert all((p.grad is None) == (mode == "compiled_fresh") for p in params)
    contender.call()
    contender.verify()


def test_figures_and_table():
    """Ours, the loop and no penalty; of another list than these, why not."""
    reason = "takes minutes"
    not_compiled = {("small_tensors", mode): reason for mode in COMPILED_MODES}
    plan = Plan(["net", "small_tensors"], COMPILED_MODES, Effort(5, 0.0), ["torch.compile"], not_compiled=not_compiled)
    measurement = Measurement(plan)
    records = [record for item in plan.items() for record in measurement.records(*item)]
    absent = [record for record in records if isinstance(record, Absent)]
    assert absent == [Absent("small_tensors", mode, "torch.compile", reason) for mode in COMPILED_MODES]
    rows = [record for record in records if not isinstance(record, Absent)]
    assert [row.implementation for row in rows] == 2 * ["no penalty", "fused_reg", "torch.compile"]
    results = _run_of(rows, absent)
    figures = {figure.claim: figure for figure in results.figures}
    for row in rows[2::3]:
        title = {"compiled_fresh": "None", "compiled_present": "present"}[row.mode]
        figure = figures[f"10-20-1 net, compiled training step, .grad {title}: times as fast as with the loop"]
        assert (figure.measured, figure.target, figure.at_least) == (row.ratio_to_ours, 1.0, True)
    text = markdown.markdown(results)
    assert "| compiled training step, .grad None, ms | fused_reg | torch.compile | no penalty |" in text
    assert "1,000 tensors of 64: torch.compile takes minutes." in text


def _run_of(rows, absent):
    run = Results.read(CPU_RESULTS)
    machine = dataclasses.replace(run.machine, capability=rows[0].capability)
    return with_figures(dataclasses.replace(run, machine=machine, rows=rows, memory=[], absent=absent))
