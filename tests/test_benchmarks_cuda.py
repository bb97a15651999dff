"""The benchmarks on a GPU, without one: the flow with a runtime that only counts, and the targets of made-up rows."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from test_benchmarks import MODES, OPTIONS, PLAIN_MODES, RESULTS, WrongResultError

from benchmarks import __main__, contenders, devices, limits, measure, report, steps
from benchmarks.checks import CASES, COMPILED_MODES, Problem
from benchmarks.contenders import CUDA_GRAPH, LOOP, OURS, PEERS, Compiler, Peer
from benchmarks.results import Results, targets
from fused_reg import fused_penalty, reference


class _Runtime(SimpleNamespace):
    """Stands in for `torch.cuda`: time passes by a fixed amount at each event."""

    now_ms = 0.0

    def __init__(self):
        super().__init__(**dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda: None))
        self.current_device, self._sleep = lambda: 0, lambda cycles: None
        self.memory_allocated, self.max_memory_allocated = lambda: 1000, lambda: 1234
        facts = {"name": "NVIDIA H200", "major": 9, "minor": 0, "multi_processor_count": 132}
        facts |= {"L2_cache_size": 1 << 20, "total_memory": 1 << 37}
        self.get_device_properties = lambda device: SimpleNamespace(**facts)

    def Event(self, enable_timing):
        def record():
            self.now_ms = event.at_ms = self.now_ms + 0.25

        event = SimpleNamespace(synchronize=lambda: None, record=record)
        event.elapsed_time = lambda end: end.at_ms - event.at_ms
        return event


def _replaying(call):
    """A capture whose replay writes into the memory of the captured result, as a CUDA graph's does."""
    result = call()

    def replay():
        value, grads = call()
        result[0].copy_(value)
        for target, grad in zip(result[1] or (), grads or (), strict=True):
            target.copy_(grad)

    return replay, result, 64


def _breaks(params, l1, l2):
    raise RuntimeError("no rule for this\nin /opt/some/where/file.py")


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_run(is_wrong, tmp_path, monkeypatch):
    """With a peer that fails, or ours wrong: that is absent, with its reason, and the rest is measured."""
    gpu, wrong = devices.DeviceType.CUDA, lambda p, l1, l2: reference.loop(p, l1, 0.9 * l2)
    events = [SimpleNamespace(name=name, device_type=gpu) for name in ("kernel", "triton", "Memcpy DtoD", "Memset")]
    events.append(SimpleNamespace(name="launch", device_type=devices.DeviceType.CPU))
    monkeypatch.setattr(devices, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(contenders, "capture", _replaying)
    monkeypatch.setattr(Problem, "device", "cuda")
    peers = [p._replace(penalty=wrong) if is_wrong and p.penalty is fused_penalty else p for p in PEERS]
    monkeypatch.setattr(contenders, "PEERS", [*peers, Peer("broken", _breaks)])
    monkeypatch.setattr(devices.CudaDevice, "name", "cpu")  # its memory
    monkeypatch.setattr(limits, "LEAST_BYTES", 1 << 20)
    modes = ["value"] if is_wrong else PLAIN_MODES
    options = __main__.parse(
        [*OPTIONS, "--output", str(tmp_path / "run.json"), "--peers", "loop", "--modes", *modes, "--optimizers", "SGD"]
    )
    options.device, options.peers = "cuda", [*options.peers, "broken"]
    results = measure.Run(options, devices.CudaDevice(_Runtime(), "cpu")).measure()
    assert Results.read(tmp_path / "run.json") == results
    assert results.lacks_ours == is_wrong
    failed = {f"{a['what']}, {a['implementation']}": a["reason"] for a in results.absent}
    if is_wrong:
        assert "10-20-1 net, value: fused_reg, CUDA graph: value error" in failed["value, fused_reg, CUDA graph"]
        return
    graphs = {f"{mode}, broken{family}" for mode in ("value", "fresh", "present") for family in ("", ", CUDA graph")}
    assert failed == dict.fromkeys(graphs, "failed: RuntimeError: no rule for this in ...")
    bounds = {mode: roofline["gb_per_s"] for roofline in results.rooflines for mode in roofline["modes"]}
    assert set(bounds) == {mode for mode in PLAIN_MODES if MODES[mode].roofline}
    counts = {"launches": 2, "copies": 1, "fills": 1}
    for row in results.rows:
        assert row["median_ms"] == 0.25
        assert row["costs"].items() >= (counts | {"peak_bytes": 64 if row["family"] == "CUDA graph" else 234}).items()
        share = 100 * row["gb_per_s"] / bounds[row["mode"]] if row["mode"] in bounds else None
        assert row["costs"].get("percent_of_roofline") == pytest.approx(share)
    assert "broken: failed: RuntimeError: no rule for this in ..." in report.document(results, "run.json")
    report.draw(results, tmp_path / "run.png")


def test_targets():
    """Of made-up rows: what differs from 100 us, 10 us of the host and one launch."""
    results = Results.read(RESULTS / "cpu.json")
    template, results.rows = results.rows[0], []
    results.machine["gpu"] = {"l2_bytes": 50 << 20}

    def add(case, mode, name, family="", us=100.0, limit=1.0, **costs):
        costs = {"host_us": 10.0, "launches": 1, "copies": 0, "fills": 0, "percent_of_roofline": 95.0} | costs
        row = {"case": case, "mode": mode, "implementation": name, "family": family, "median_ms": us / 1e3}
        results.rows.append(template | row | {"ratio_to_limit": limit, "costs": costs})

    add("resnet50", "value", OURS, host_us=61.0, percent_of_roofline=89.0, limit=1.25)
    add("small_tensors", "value_and_grad", OURS, launches=2, percent_of_roofline=1.0)
    add("resnet50", "fresh", OURS, us=50.0, host_us=200.0)
    add("resnet50", "fresh", LOOP, us=3000.0, host_us=8000.0)
    add("resnet50", "fresh", "torch.compile, combo kernels", us=800.0, host_us=400.0)
    found = {target["claim"]: (target["measured"], target["met"]) for target in targets(results)}
    expected = {
        "1,000 tensors of 64, value and gradient: launches, copies and fills": (2, False),
        "GPT-2 small, value and gradient: launches, copies and fills": (None, None),
        "ResNet-50, value: host microseconds": (61.0, False),
        "ResNet-50, value: percent of the speed of `x.sum(), one tensor`": (80.0, False),
        "ResNet-50, forward + backward: times as fast as loop": (40.0, True),
        "ResNet-50, forward + backward: times as fast as the best torch.compile": (4.0, False),
    }
    assert {claim: found[claim] for claim in expected} == expected
    assert not [claim for claim in found if claim.startswith("1,000 tensors") and "percent" in claim]  # in the L2 cache


@pytest.fixture
def quick(monkeypatch):
    """The options of the quick form on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(Problem, "device", "cuda")
    return __main__.parse(["--device", "cuda", "--quick"])


TARGETS = pd.read_csv(RESULTS.parent / "targets.csv", keep_default_na=False).query("device == 'cuda'")


def test_the_quick_form_measures_every_target(quick):
    """For each line of targets.csv a case, an optimizer where it names some, ours, and one of those beside it."""
    problem = Problem(CASES["net"].make_params("cpu"))
    for target in TARGETS.itertuples():
        families = set(target.family.split(";"))
        for part, case in product(quick.parts, target.cases.split()):
            if case not in part.get("cases", quick.cases) or target.mode not in part.get("modes", quick.modes):
                continue
            peers = [p for p in PEERS if target.mode in p.modes and p.name in quick.peers]
            peers = [p for p in peers if p.options is None or part.get("compiles", True)]
            peers = [p for p in peers if not measure.takes_minutes(quick, p, case, target.mode)]
            of_mode = measure.contenders_of(problem, target.mode, peers)
            measured = [x.name for x in of_mode if x.family in families & {"", CUDA_GRAPH, *quick.optimizers}]
            if target.of in measured and (not target.to or {*target.to.split(";")} & {*measured}):
                break
        else:
            pytest.fail(f"{target.claim}: nothing measures it")


def test_the_quick_form_compiles_when_the_rest_of_a_target_is_there(quick):
    """A compiler may take all the time that is left."""
    tasks = list(measure.Run(quick, devices.CudaDevice(_Runtime(), "cpu"))._tasks())
    first = tasks.index("ResNet-50: fresh")
    for target in TARGETS[~TARGETS.to.str.contains("compile")].itertuples():
        names = [f"{CASES[case].title}: {target.mode}, without a compiler" for case in target.cases.split()]
        assert {*names} & {*tasks[:first]}, target.claim


def test_what_compiles_measures_once_more(tmp_path, monkeypatch):
    """Beside the others again, whose first rows are no longer there."""
    monkeypatch.setattr(Compiler, "function", lambda self, name, function, options: function)
    options = __main__.parse([*OPTIONS, "--output", str(tmp_path / "run.json"), "--peers", "loop", "torch.compile"])
    run, names = measure.Run(options), []
    for compiles in (False, True):
        run.add("net", "fresh", compiles)
        run.add("net", "value", compiles=False)
        names.append({row["implementation"] for row in run.results.rows if row["mode"] == "fresh"})
    assert names[1] - names[0] == {"torch.compile"}
    rows = [(row["mode"], row["implementation"], row["family"]) for row in run.results.rows]
    assert len({*rows}) == len(rows)


def test_nothing_is_compiled_once_the_seconds_are_spent():
    compiler, calls = Compiler(1e-9), []
    compiler.seconds("first", lambda: calls.append(1), wants_grad=True)
    compiler.seconds("first", lambda: calls.append(2), wants_grad=True)
    with pytest.raises(TimeoutError, match="seconds for compiling are spent"):
        compiler.seconds("second", lambda: calls.append(3), wants_grad=True)
    assert calls == [1]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
@pytest.mark.parametrize("mode", COMPILED_MODES)
def test_compiled_steps(mode, monkeypatch):
    """A convolution, a matrix, a bias, a class token, and a vector so long that it is taken as a matrix."""
    monkeypatch.setattr(steps, "_LONG", 1000)
    monkeypatch.setattr(steps, "_ROW", 100)
    shapes = ((5, 4, 3, 3), (7, 6), (7,), (1, 1, 6), (2000,))
    params = CASES["net"]._replace(shapes=shapes).make_params("cpu")
    problem = Problem(params, Compiler())
    peers = [peer for peer in PEERS if peer.name == "torch.compile"]
    three = list(steps.compiled_steps(problem, mode, peers))
    assert [step.name for step in three] == ["no penalty", "fused_reg", "torch.compile"]
    for work in [step.make() for step in three]:
        for _ in range(2):  # the one, and the other that was compiled of it
            work.verify()
        assert all((p.grad is None) == (mode == "compiled_fresh") for p in params)
    wrong = [peer._replace(penalty=lambda p, l1, l2: fused_penalty(p, 1.5 * l1, l2)) for peer in PEERS[:1]]
    monkeypatch.setattr(contenders, "PEERS", wrong)
    _, ours = steps.compiled_steps(Problem(params, Compiler()), mode, [])
    with pytest.raises(WrongResultError):
        ours.make()
