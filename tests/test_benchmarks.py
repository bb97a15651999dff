"""The benchmarks: a wrong result is refused before it is timed, times are made of interleaved samples, and what they
write can be read."""

import dataclasses
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import _global_optimizer_pre_hooks

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("rich")

import fused_reg
from benchmarks import __main__, checks, contenders, devices, growth, measure, optimizers, pages, pat, relative, report
from benchmarks.checks import CASES, COMPILED_MODES, MODES, STEP_MODES, Problem, WrongResultError
from benchmarks.contenders import PEERS, Peer
from benchmarks.results import Results, targets
from fused_reg import reference

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OPTIONS = ["--cases", "net", "--rounds", "5", "--seconds", "0", "--no-children"]
PLAIN_MODES = [mode for mode in MODES if mode not in COMPILED_MODES]

# A tensor of several pieces, rows longer than a piece, a convolution, a bias, a scalar row.
CASE = CASES["net"]._replace(shapes=((600, 7), (3, 500), (5, 4, 3, 3), (300,), (1, 1)))


def _refused(params, mode, wrong=()):
    """The contenders of a mode that are wrong, with some functions replaced: their names and families."""
    problem, wrong = Problem(params), dict(wrong)
    peers = [p for p in PEERS if mode in p.modes and p.options is None and "cpu" in p.devices]
    peers = [peer._replace(penalty=wrong.get(peer.penalty, peer.penalty)) for peer in peers]
    refused = set()
    for contender in measure.contenders_of(problem, mode, peers):
        try:
            contender.make().verify()
        except WrongResultError:
            refused.add(", ".join(filter(None, (contender.name, contender.family))))
    return refused


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        CASE._replace(dtype=torch.bfloat16),
        CASE._replace(shapes=((600, 7), (40, 3)), layout="transposed"),
        CASE._replace(shapes=((5, 4, 3, 3),), layout="channels_last"),
        CASE._replace(shapes=((600, 7), (300,), ()), layout="contiguous"),
        CASE._replace(shapes=((600, 7), (300,)), layout="with gaps"),
    ],
)
def test_all_are_right(case, monkeypatch):
    monkeypatch.setitem(checks.PIECES, "cpu", 256)
    params = case.make_params("cpu")
    for mode in PLAIN_MODES:
        assert (mode, _refused(params, mode)) == (mode, set())


def _nudged(params, **strengths):
    """Ours, with gradients one ulp off; of norms, which are not promised to the bit, by 1e-5."""
    copies = [p.clone() for p in params]
    for copy in copies if "l2_norm" not in strengths else ():
        copy.register_hook(lambda grad: torch.nextafter(grad, torch.full_like(grad, torch.inf)))
    value = fused_reg.fused_penalty(copies, **strengths)
    return value + 1e-5 * (value - value.detach()) if "l2_norm" in strengths else value


def _off(function, factor):
    return lambda params, **strengths: factor * function(params, **strengths)


PENALTY, LOOP, PROX = fused_reg.fused_penalty, reference.loop, fused_reg.prox_
ALONE, NORMS = ({f"fused_reg, {family}" for family in of} for of in (contenders.ALONE, contenders.NORMS))
L1, L2 = {"fused_reg, L1 alone"}, {"fused_reg, L2 alone"}
WRONG = [
    ("value", {PENALTY: _off(PENALTY, 1 + 1e-6)}, {"fused_reg", *ALONE}),
    ("value", {LOOP: _off(LOOP, 1.7)}, {"loop"}),
    ("value_and_grad", {fused_reg.value_and_grad: reference.value_and_grad}, {"fused_reg"}),  # rounds once: other bits
    ("fresh", {PENALTY: _nudged}, {"fused_reg", *ALONE}),
    ("fresh", {PENALTY: lambda p, **s: PENALTY([p[0].detach(), *p[1:]], **s)}, {"fused_reg", *ALONE}),
    ("fresh", {LOOP: lambda p, l1, l2: LOOP(p, l1, 0.9 * l2)}, {"loop"}),
    ("present", {PENALTY: _nudged}, {"fused_reg"}),
    ("norm_value", {PENALTY: _off(PENALTY, 1.00001)}, NORMS),
    ("norm_fresh", {PENALTY: _nudged}, NORMS),
    ("prox", {PROX: lambda p, l1=0.0, **rest: PROX(p, 1.01 * l1, **rest)}, {"fused_reg", *L1}),
    ("prox", {PROX: lambda p, l2=0.0, **rest: PROX(p, l2=1.01 * l2, **rest)}, {"fused_reg", *L2}),
    ("prox", {PROX: lambda p, l2_norm=0.0, **rest: PROX(p, l2_norm=3 * l2_norm, **rest)}, NORMS),
    (
        "prox",
        {PROX: lambda p, **s: [t.masked_fill_(t == 0, 1e-12) for t in PROX(p, **s) or p]},
        {"fused_reg", *L1, "fused_reg, norms of rows", "fused_reg, norms of columns"},
    ),
]


@pytest.mark.parametrize(("mode", "wrong", "names"), WRONG)
def test_what_is_wrong_is_refused(mode, wrong, names, monkeypatch):
    monkeypatch.setattr(fused_reg, "prox_", wrong.get(PROX, PROX))
    assert _refused(CASE.make_params("cpu"), mode, wrong) == names


RELATIVE = {"relative_grad": "value_and_grad", "relative_present": "accumulate_grad_", "relative_prox": "prox_"}


@pytest.mark.parametrize(("mode", "name"), RELATIVE.items())
@pytest.mark.parametrize("lost", ["toward", "importance", "l1", "l2"])
def test_a_pass_without_its_references_is_refused(mode, name, lost, monkeypatch):
    right = getattr(fused_reg, name)
    less = {"toward": 0.0, "importance": 1.0}

    def wrong(params, **given):
        if lost in given and lost in less:
            given[lost] = [torch.full_like(x, less[lost]) for x in given[lost]]
        elif lost in given:
            given[lost] *= 1.01
        return right(params, **given)

    monkeypatch.setattr(fused_reg, name, wrong)
    families = [family for family, use in relative.USES.items() if lost in (*use.given, *use.strengths)]
    assert _refused(CASE.make_params("cpu"), mode) == {f"{MODES[mode].ours}, {family}" for family in families}


@pytest.mark.parametrize("mode", RELATIVE)
def test_a_loop_or_operation_that_does_other_work_is_refused(mode, monkeypatch):
    params = CASE.make_params("cpu")
    more = [op._replace(op=lambda *own, op=op.op: op(*own).mul_(1.01)) for op in relative.OPERATIONS.values()]
    monkeypatch.setattr(relative, "OPERATIONS", dict(zip(relative.OPERATIONS, more, strict=True)))
    for family, use in relative.USES.items():
        penalty = lambda *own, use=use: 1.7 * use.penalty(*own)  # noqa: E731
        prox = lambda w, t, f, step, use=use: use.prox(w, t, f, 2 * step)  # noqa: E731
        monkeypatch.setitem(relative.USES, family, use._replace(penalty=penalty, prox=prox))
    loops = {f"loop, {family}" for family in relative.USES}
    assert _refused(params, mode) >= loops
    operations = {name for name in _refused(params, mode) if name not in loops}
    found = {op.name for (of, _), op in relative.OPERATIONS.items() if of == mode}
    assert {name.partition(", toward")[0].partition(", importance")[0] for name in operations} == found


@pytest.mark.parametrize("wrong", ["l1", "l2"])
def test_a_wrong_step_is_refused(wrong, monkeypatch):
    """With a strength that is ten times as large: attached, in the pass, in the loss."""
    params, right = CASES["net"].make_params("cpu"), fused_reg.Regularizer
    larger = lambda strengths: {k: 10 * x if k == wrong else x for k, x in strengths.items()}  # noqa: E731
    monkeypatch.setattr(fused_reg, "Regularizer", lambda p, **strengths: right(p, **larger(strengths)))
    for mode in STEP_MODES:
        names = {form.name for form in optimizers.FORMS if mode in form.modes and form.attach}
        assert _refused(params, mode) == {f"{name}, {family}" for name in names for family in optimizers.OPTIMIZERS}
    wrongs = [form for form in optimizers.FORMS if "l1" in form.options or form.penalty is PENALTY]
    off = [f._replace(options=larger(f.options), penalty=f.penalty and _off(f.penalty, 1.1)) for f in wrongs]
    monkeypatch.setattr(optimizers, "FORMS", off)
    assert _refused(params, "step") == {f"{form.name}, {family}" for form in off for family in optimizers.OPTIMIZERS}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
def test_a_compiled_step_is_compiled_once(tmp_path):
    """A compilation within the times is an error. The hooks of attachments are gone, which every step would call."""
    options = [*OPTIONS, "--modes", "attached", "step", "--peers", "torch.compile", "--optimizers", "SGD"]
    results = measure.Run(__main__.parse([*options, "--output", str(tmp_path / "run.json")])).measure()
    assert results.find("net", "step", "torch.compile, weight_decay", "SGD")["compile_s"] > 0
    assert not _global_optimizer_pre_hooks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smallest case in every mode that compiles nothing: the results, and the file."""
    output = tmp_path_factory.mktemp("bench") / "new" / "results.json"
    options = [*OPTIONS, "--modes", *PLAIN_MODES, "--peers", "loop", "--output", str(output)]
    return measure.Run(__main__.parse(options)).measure(), output


def test_a_run_is_complete(run):
    results, output = run
    assert Results.read(output) == results
    assert [p.name for p in output.parent.iterdir()] == ["results.json"]  # no temporary file is left
    assert list(dict.fromkeys(row["mode"] for row in results.rows)) == PLAIN_MODES
    committed = Results.read(RESULTS / "cpu.json")
    assert results.machine.keys() == committed.machine.keys()
    assert results.targets[0].keys() == committed.targets[0].keys()
    for row in results.rows:
        assert row.keys() == committed.rows[0].keys()
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6)
        assert (row["samples"], row["ratio_to_limit"] > 0) == (5, True)
        assert row["role"] == "limit" or row["ratio_to_ours"] > 0
    committed.rows += Results.read(RESULTS / "cpu-steps.json").rows
    limits = [
        {(r["mode"], r["implementation"]) for r in of.rows if r["role"] == "limit"} for of in (results, committed)
    ]
    assert limits[1] <= limits[0]  # the names that targets and the picture ask for
    per_element = {row["mode"]: row["bytes"] / row["elements"] for row in results.rows if row["family"] == ""}
    assert list(per_element.values()) == [4, 8, 8, 12, 4, 12, 8]
    per_step = {row["family"]: row["bytes"] / row["elements"] for row in results.rows if row["mode"] == "step"}
    assert list(per_step.values()) == [12, 20, 28, 28, 20, 20]


CUT = """
import os, signal, sys
from benchmarks import __main__, measure
add, die = measure.Run.add, lambda: os.kill(os.getpid(), signal.SIGKILL)
measure.Run.add = lambda run, case, mode, *rest: add(run, case, mode, *rest) if mode == "value" else die()
__main__.main()
"""


def test_a_run_that_is_killed_keeps_what_it_has(tmp_path):
    """In its second mode; the tables can be made of the first."""
    output = tmp_path / "cut.json"
    options = [*OPTIONS, "--modes", "value", "prox", "--peers", "--output", str(output)]
    cut = subprocess.run([sys.executable, "-c", CUT, *options], cwd=RESULTS.parents[1], capture_output=True)
    assert cut.returncode == -signal.SIGKILL
    results = Results.read(output)
    assert {row["mode"] for row in results.rows} == {"value"}
    assert [target["claim"] for target in results.targets if target["measured"] is not None] != []
    assert "| value | fused_reg |" in report.document(results, output.name)


def test_a_wrong_result_ends_the_run_before_it_is_timed(monkeypatch):
    monkeypatch.setattr(contenders, "PEERS", [Peer("loop", _off(LOOP, 1.7), ("value",))])
    monkeypatch.setattr(measure, "race", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(WrongResultError, match=r"10-20-1 net, value: loop: value error 0.7 is above 0.6"):
        measure.Run(__main__.parse([*OPTIONS, "--modes", "value", "--peers", "loop"])).measure()


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "cpu-slowest",
        "cpu-slowest-xeon",
        "cpu-short",
        "cpu-steps",
        "cpu-2026-11-20",
        "cpu-compiled",
        "cpu-compiled-small",
        "cpu-relative",
        "cpu-memory",
    ],
)
def test_the_committed_results(name, tmp_path):
    path, again = RESULTS / f"{name}.json", tmp_path / "again.json"
    results = Results.read(path)
    results.write(again)
    if name != "cpu-2026-11-20":  # of a version before
        assert again.read_bytes() == path.read_bytes()
        found = {target["claim"]: target for target in targets(results)}
        assert all(found[target["claim"]] == target for target in results.targets)
    with pytest.raises(TypeError, match="not JSON serializable"):
        dataclasses.replace(results, l1=object()).write(again)
    assert [p.name for p in tmp_path.iterdir()] == ["again.json"]
    assert Results.read(again) == results  # what was there is whole
    assert report.document(results, path.name) == path.with_suffix(".md").read_text(encoding="utf-8")
    if name == "cpu":
        report.draw(results, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_growth(tmp_path, monkeypatch):
    """A run measures what its file lacks; the committed one has everything."""
    output = tmp_path / "growth.json"
    monkeypatch.setattr("sys.argv", ["growth", str(output), "--most", "10", "--threads", "1"])
    growth.main()
    rows = Results.read(output).rows
    for axis in growth.AXES:
        assert [r["ms"] > 0 for r in rows if r["axis"] == axis and "ms" in r] == [True] * len(growth.points(axis, 10))
        peaks = growth.found(Results.read(output), axis, "value and gradient", "", "peak_bytes")
        assert list(peaks) == [1, 10]
        assert all(peak >= 0 for peak in peaks.values())
    monkeypatch.setattr(growth, "_milliseconds", lambda call: pytest.fail("it was measured"))
    growth.main()
    assert Results.read(output).rows == rows
    committed = Results.read(RESULTS / "growth.json")
    for axis, of in product(growth.AXES, ({"threads": 1}, {})):
        rows = [r for r in committed.rows if of.items() <= r.items() and r["axis"] == axis]
        found = [(r["work"], r["terms"], r["size"]) for r in rows if of or "peak_bytes" in r]
        assert sorted(found) == sorted(growth.points(axis))
    growth.draw(committed, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")  # torchao's
def test_pat(tmp_path, monkeypatch, capsys, threads):
    """All do the same before they are timed, and every contender has its row."""
    pytest.importorskip("torchao", reason="benchmarks.pat needs torchao (pip install fused_reg[pat])")
    pytest.importorskip("sklearn", reason="examples/prune.py needs scikit-learn (pip install fused_reg[examples])")
    output = tmp_path / "pat.json"
    run = ["pat", str(output), "--cases", "convolutions", "transformer", "--rounds", "5", "--seconds", "0"]
    monkeypatch.setattr("sys.argv", run)
    threads(2)
    pat.main()
    results = Results.read(output)
    assert results.machine["threads"] == 1
    for case in ("convolutions", "transformer"):
        rows = [row["implementation"] for row in results.rows if row["case"] == case and row["median_ms"] > 0]
        assert sorted(rows) == sorted(pat.contenders(pat.CASES[case]))
    assert pat.table(results) in capsys.readouterr().out
    models = {name: pat.prepared(pat.CASES["transformer"], name)[0] for name in pat.AIMS}
    pat.check(models)
    value = models[pat.AIMS[2]].blocks[1].value.weight
    with torch.no_grad():
        value[value[:, 0] != 0] *= 1.01
    with pytest.raises(
        checks.WrongResultError, match=r"PAT, MinSparsityConstraint: a weight is 0\.0\d+ of the largest off"
    ):
        pat.check(models)
    with torch.no_grad():
        for model in models.values():
            model.blocks[0].up.weight.fill_(1.0)
            model.blocks[1].value.weight.fill_(1.0)
    with pytest.raises(checks.WrongResultError, match=r"the shares of zero groups must be 0\.75, got \{.*0\.0"):
        pat.check(models)


def test_the_results_beside_pat():
    """The committed ones have every contender, and the memory of the large networks."""
    committed = Results.read(RESULTS / "pat.json")
    for name, case in pat.CASES.items():
        found = {row["implementation"] for row in committed.rows if row["case"] == name}
        assert found == set(pat.contenders(case))
        peaks = {row["implementation"] for row in committed.memory if row["case"] == name}
        assert peaks == (found - {pat.HEALING} if name != case.kind else set())


def test_the_pages_have_the_committed_results():
    """``python -m benchmarks.pages`` writes them."""
    for path, text in pages.written(pages.Committed()):
        assert path.read_text(encoding="utf-8") == text


def test_a_race_interleaves():
    """Every round runs each once, in orders that change; the figures are of a made-up clock."""
    times, ran = {"a": iter(range(1, 100)), "b": iter(range(100, 0, -1))}, []

    class Clock:
        def stopwatch(self, name):
            return 7, lambda: ran.append(name) or next(times[name]), None

    a, b = devices.race(["a", "b"], 11, 0.0, Clock())  # no seconds are left: the least
    assert (a["samples"], a["calls_per_sample"], a["host_us"], b["median_ms"]) == (5, 7, None, 98e3)
    assert (a["p20_ms"], a["median_ms"], a["p80_ms"]) == pytest.approx((1.8e3, 3e3, 4.2e3))
    assert {tuple(ran[i : i + 2]) for i in range(0, 10, 2)} == {("a", "b"), ("b", "a")}
    assert devices.race(["a"], 11, 60.0, Clock())[0]["samples"] == 11


def test_options(capsys):
    quick, full = __main__.parse(["--quick"]), __main__.parse([])
    assert [str(options.output) for options in (quick, full)] == ["build/bench/quick.json", "build/bench/full.json"]
    assert set(quick.modes) < set(full.modes) == set(MODES)
    assert (quick.rounds, __main__.parse(["--quick", "--rounds", "7"]).rounds) == (15, 7)
    assert __main__.parse(["--peers"]).peers == ["fused_reg", "fused_reg.accumulate_grad_"]
    for arguments in (["--rounds", "4"], ["--modes", "values"]):
        with pytest.raises(SystemExit, match="2"):
            __main__.parse(arguments)
    assert "--rounds must be at least 5, got 4" in capsys.readouterr().err


@pytest.mark.parametrize(("absent", "status"), [("loop", 0), ("fused_reg, CUDA graph", 1), ("", 1)])
def test_the_exit_status(absent, status, run, tmp_path, monkeypatch, capsys):
    results = dataclasses.replace(run[0], absent=[])
    results.add_absent("net", "value", absent, "failed")
    monkeypatch.setattr(measure.Run, "measure", lambda self: results)
    monkeypatch.setattr(report, "draw", lambda results, path: path.touch())
    monkeypatch.setattr("sys.argv", ["benchmarks", "--output", str(tmp_path / "run.json")])
    assert __main__.main() == status
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.md", "run.png"]
    assert "value and gradient without autograd" in capsys.readouterr().out
