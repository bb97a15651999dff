"""The benchmarks on a GPU, without one: the flow with a runtime that only counts, and the targets of made-up rows."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_benchmarks import OPTIONS, RESULTS, WrongResultError

pytest.importorskip("matplotlib")
pytest.importorskip("pandas")
pytest.importorskip("rich")

from benchmarks import (
    bandwidths,
    compiled_steps,
    contenders,
    devices,
    draw,
    markdown,
    measure,
    optimizers,
    table,
    timing,
)
from benchmarks.cases import CASES, COMPILED_MODES, MODES
from benchmarks.compiling import Compiler, UnavailableError
from benchmarks.contenders import LOOP, OURS, PEERS, Peer, Problem
from benchmarks.results import Results
from benchmarks.targets import targets
from fused_reg import fused_penalty, reference


class _Runtime:
    """Stands in for `torch.cuda`: time passes by a fixed amount at each reading, and memory is what a test says."""

    def __init__(self):
        self.now_ms, self.allocated, self.peak = 0.0, 1000, 1000
        self.synchronize = self.empty_cache = lambda: None
        self.current_device = lambda: 0
        self.memory_allocated, self.max_memory_allocated = lambda: self.allocated, lambda: self.peak

    def get_device_properties(self, device):
        numbers = {"major": 9, "minor": 0, "multi_processor_count": 132, "L2_cache_size": 1 << 20}
        return SimpleNamespace(name="NVIDIA H200", total_memory=1 << 37, **numbers)

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def _sleep(self, cycles):
        self.held = cycles

    def Event(self, enable_timing):
        event = SimpleNamespace(synchronize=lambda: None, elapsed_time=lambda end: end.at_ms - event.at_ms)

        def record():
            self.now_ms += 0.25
            event.at_ms = self.now_ms

        event.record = record
        return event


class _Gpu(devices.CudaDevice):
    """A GPU whose memory is the CPU's."""

    name = "cpu"

    def __init__(self):
        super().__init__(_Runtime(), "cpu")

    def _operations(self, call):
        call()
        return 1, 0, 0


def _replaying(call):
    """A capture whose replay writes into the memory of the captured result, as a CUDA graph's does."""
    result = call()

    def replay():
        value, grads = call()
        result[0].copy_(value)
        for target, grad in zip(result[1] or (), grads or (), strict=True):
            if target is not grad:
                target.copy_(grad)

    return replay, result, 64


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on the CPU."""
    monkeypatch.setattr(contenders, "capture", _replaying)
    monkeypatch.setattr(Problem, "device", "cuda")


def _breaks(params, l1, l2):
    raise RuntimeError("no rule for this\nin /opt/some/where/file.py")


def _run(output, monkeypatch, *modes, ours=fused_penalty):
    """As on a GPU, with a peer that fails."""
    peers = [peer._replace(penalty=ours) if peer.penalty is fused_penalty else peer for peer in PEERS]
    monkeypatch.setattr(timing, "PEERS", [*peers, Peer("broken", _breaks)])
    monkeypatch.setattr(bandwidths, "LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(bandwidths, "LISTS", 20)
    options = measure.parse([*OPTIONS, "--output", str(output), "--peers", "loop", "--modes", *(modes or MODES)])
    options.device, options.peers = "cuda", [*options.peers, "broken"]
    return measure.measure(options, _Gpu())


def test_a_run(graphs, tmp_path, monkeypatch, capsys):
    results = _run(tmp_path / "run.json", monkeypatch)
    assert Results.read(tmp_path / "run.json") == results
    names = ("fused_reg", "fused_reg.accumulate_grad_", "loop")
    expected = {(name, family) for name in names for family in ("", "CUDA graph")}
    present = {(row["implementation"], row["family"]) for row in results.rows if row["mode"] == "present"}
    assert present == expected | {("g.add_(x, alpha=a), one tensor", "")}
    bounds = {mode: roofline["gb_per_s"] for roofline in results.rooflines for mode in roofline["modes"]}
    assert set(bounds) == set(MODES) - {"step", *COMPILED_MODES}
    for row in results.rows:
        costs = row["costs"]
        assert (row["median_ms"], costs["launches"]) == (0.25, 1)
        assert costs["host_us"] > 0
        assert costs["peak_bytes"] == (64 if row["family"] == "CUDA graph" else 0)
        if row["mode"] != "step":
            assert costs["percent_of_roofline"] == pytest.approx(100 * row["gb_per_s"] / bounds[row["mode"]])
    assert results.agreement == {"lists": 20, "equal": 20, "max_ulp": 0}
    assert results.gpu["timer_us"] == 250
    left_out = [a for a in results.absent if a["what"] in COMPILED_MODES]
    assert {a["reason"] for a in left_out} == {"has its compiled training step measured on a CPU only: --compile-all"}
    results.absent = [a for a in results.absent if a not in left_out]
    failed = {(a["what"], a["implementation"]) for a in results.absent}
    graphs = {(mode, f"broken{family}") for mode in ("value", "fresh", "present") for family in ("", ", CUDA graph")}
    assert failed == graphs
    assert {a["reason"] for a in results.absent} == {"failed: RuntimeError: no rule for this in ..."}
    assert not results.lacks_ours
    table.show(results)
    assert "CUDA graph" in capsys.readouterr().out
    lines = markdown.document(results, "run.json").splitlines()
    assert "# Measured on the NVIDIA H200" in lines
    assert "- 10-20-1 net, value, broken: failed: RuntimeError: no rule for this in ..." in lines
    draw.draw(results, tmp_path / "run.png")


def test_our_wrong_result_is_absent_and_seen(graphs, tmp_path, monkeypatch):
    results = _run(tmp_path / "run.json", monkeypatch, "value", ours=lambda p, l1, l2: reference.loop(p, l1, 0.9 * l2))
    assert results.lacks_ours
    reasons = [a["reason"] for a in results.absent if a["what"] == "value" and a["implementation"].startswith(OURS)]
    assert len(reasons) == 2
    assert all("10-20-1 net, value: fused_reg" in reason and "value error" in reason for reason in reasons)


def test_a_task_that_fails_does_not_end_a_gpus_run(monkeypatch):
    results, fails = Results({"gpu": None}, 0.0, 0.0), lambda: [][0]
    with pytest.raises(IndexError):
        measure.run_task(results, "rooflines", fails)
    results.machine["gpu"] = {"name": "NVIDIA H200"}
    measure.run_task(results, "rooflines", fails)
    assert results.absent[0]["reason"] == "failed: IndexError: list index out of range"
    assert results.lacks_ours
    monkeypatch.setitem(optimizers.KINDS, "cpu", optimizers.KINDS["cuda"])
    steps = list(optimizers.optimizer_steps(Problem(CASES["net"].make_params("cpu"))))
    assert {step.family for step in steps} == {f"{kind}, fused=True" for kind in ("SGD", "Adam", "AdamW")}
    for step in steps:
        step.make().verify()


def test_the_device_is_held_while_the_host_submits():
    device = _Gpu()
    for host, hold in ((1e-3, 1.52e-3), (1.0, 5e-3)):
        device._host_seconds = lambda call, host=host: host
        watch = device.stopwatch(lambda: None)
        assert (watch.calls, watch.sample(), watch.host()) == (1, 0.25e-3, host)
        assert device._runtime.held == int(hold * 2e9)


def test_the_costs(monkeypatch):
    def event(name, device, annotation=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    gpu = devices.DeviceType.CUDA
    events = [event("cudaLaunchKernel", devices.DeviceType.CPU), event("SGD.step", gpu, annotation=True)]
    events += [event(name, gpu) for name in ("kernel", "triton_red", "Memcpy DtoD", "Memset (Device)")]
    monkeypatch.setattr(devices, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    device = devices.CudaDevice(_Runtime(), "cpu")
    counts = {"host_us": 1.0, "launches": 2, "copies": 1, "fills": 1}
    assert device.costs(lambda: setattr(device._runtime, "peak", 1234), 1.0, None) == counts | {"peak_bytes": 234}
    assert device.costs(lambda: None, 1.0, 77) == counts | {"peak_bytes": 77}
    events.clear()
    assert device.costs(lambda: None, 1.0, 77)["launches"] is None


def test_targets():
    """Of made-up rows: the claim, and what was measured; what differs from 100 us, 10 us of the host and one launch."""
    results = Results.read(RESULTS / "cpu.json")
    template, results.rows = results.rows[0], []
    results.machine["gpu"] = {"l2_bytes": 50 << 20}

    def add(case, mode, name, family="", us=100.0, limit=1.0, **costs):
        costs = {"host_us": 10.0, "launches": 1, "copies": 0, "fills": 0, "percent_of_roofline": 95.0} | costs
        row = {"case": case, "mode": mode, "implementation": name, "family": family, "median_ms": us / 1e3}
        results.rows.append(template | row | {"ratio_to_limit": limit, "costs": costs})

    add("resnet50", "value", OURS, host_us=61.0, percent_of_roofline=89.0, limit=1.25)
    add("small_tensors", "value_and_grad", OURS, launches=2, percent_of_roofline=1.0)
    add("resnet50", "present", OURS, launches=3, percent_of_roofline=10.0)
    add("resnet50", "present", "fused_reg.accumulate_grad_", percent_of_roofline=91.0)
    add("resnet50", "step", "fused_reg attached", "SGD, fused=True", launches=3)
    add("resnet50", "step", "no penalty", "SGD, fused=True", launches=2)
    add("resnet50", "fresh", OURS, us=50.0, host_us=200.0)
    add("resnet50", "fresh", LOOP, us=3000.0, host_us=8000.0)
    add("resnet50", "fresh", "torch.compile, combo kernels", us=800.0, host_us=400.0)
    add("resnet50", "fresh", OURS, "CUDA graph", us=50.0)
    add("resnet50", "fresh", "torch.compile", "CUDA graph", us=40.0)
    found = {target["claim"]: (target["measured"], target["met"]) for target in targets(results)}
    composed, count = "ResNet-50, forward + backward", "launches, copies and fills"
    expected = {
        f"1,000 tensors of 64, value and gradient: {count}": (2, False),
        f"GPT-2 small, value and gradient: {count}": (None, None),
        "ResNet-50, accumulate_grad_: percent of the read-modify-write bandwidth": (91.0, True),
        f"ResNet-50, step of SGD, fused=True, regularizer attached: {count} added": (1, True),
        "ResNet-50, value: host microseconds": (61.0, False),
        "ResNet-50, value: percent of the read bandwidth": (89.0, False),
        "ResNet-50, value: percent of the speed of `x.sum(), one tensor`": (80.0, False),
        f"{composed}: times as fast as loop": (40.0, True),
        f"{composed}: times as fast as the best torch.compile": (4.0, False),
        f"{composed}: times as fast as the best torch.compile, both in a CUDA graph": (0.8, False),
    }
    assert {claim: found[claim] for claim in expected} == expected
    assert not [claim for claim in found if claim.startswith("1,000 tensors") and "percent" in claim]  # in the L2 cache


def test_the_budget_bounds_compiling():
    compiler = Compiler(0.05)

    def slow():
        while True:
            torch.ones(1)

    for _ in range(2):  # the reason is kept
        with pytest.raises(UnavailableError, match=r"did not compile in the 0 s that were left"):
            compiler.seconds("loop", slow, wants_grad=True)
    with pytest.raises(UnavailableError, match="is not compiled: the run's 0 s for compiling are spent"):
        compiler.seconds("loop", slow, wants_grad=False)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
@pytest.mark.parametrize("mode", COMPILED_MODES)
def test_compiled_steps(mode, monkeypatch):
    """A convolution, a matrix, a bias, a class token, and a vector so long that it is taken as a matrix."""
    monkeypatch.setattr(compiled_steps, "_LONG", 1000)
    monkeypatch.setattr(compiled_steps, "_ROW", 100)
    shapes = ((5, 4, 3, 3), (7, 6), (7,), (1, 1, 6), (2000,))
    params = dataclasses.replace(CASES["net"], shapes=shapes).make_params("cpu")
    peers = [peer for peer in PEERS if peer.name == "torch.compile"]
    steps = list(compiled_steps.compiled_steps(Problem(params), mode, peers))
    assert [step.name for step in steps] == ["no penalty", "fused_reg", "torch.compile"]
    for work in [step.make() for step in steps]:
        work.verify()
        work.call()
        assert all((p.grad is None) == (mode == "compiled_fresh") for p in params)
    wrong = [peer._replace(penalty=lambda p, l1, l2: fused_penalty(p, 1.5 * l1, l2)) for peer in PEERS[:1]]
    monkeypatch.setattr(compiled_steps, "PEERS", wrong)
    _, ours = compiled_steps.compiled_steps(Problem(params), mode, [])
    with pytest.raises(WrongResultError):
        ours.make().verify()
