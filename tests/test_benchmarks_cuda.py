"""The benchmarks on a GPU, without one: the flow with a runtime that only counts, and what is made of its rows."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import cuda, draw, markdown, measure, optimizers, penalties, table
from benchmarks.agreement import measure_agreement
from benchmarks.cases import CASES, DEVICE_CASES
from benchmarks.checks import WrongResultError
from benchmarks.compiling import CompileBudget, Compiled
from benchmarks.graphs import Captured
from benchmarks.peers import COMPILED, FOREACH_NORM, LOOP, OURS, PEERS, Peer, peers_of
from benchmarks.penalties import Problem, penalty_candidates
from benchmarks.race import Effort
from benchmarks.rooflines import COPY, READ, roofline_bytes, with_percents
from benchmarks.rows import COMPILED_MODES, MODES, Agreement, Costs, Roofline, UnavailableError
from benchmarks.run import Results
from benchmarks.timing import STRENGTHS, reason_of
from fused_reg import reference

CPU = torch.device("cpu")
L2_BYTES = 1 << 20


class _Runtime:
    """Stands in for `torch.cuda`: time passes by a fixed amount at each reading, and memory is what a test says."""

    def __init__(self):
        self.now_ms = 0.0
        self.held = []
        self.allocated = 1000
        self.peak = 1000

    def get_device_properties(self, device):
        return SimpleNamespace(
            name="NVIDIA H200",
            major=9,
            minor=0,
            multi_processor_count=132,
            L2_cache_size=L2_BYTES,
            total_memory=1 << 37,
        )

    def current_device(self):
        return 0

    def synchronize(self):
        pass

    def empty_cache(self):
        pass

    def memory_allocated(self):
        return self.allocated

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = self.allocated

    def _sleep(self, cycles):
        self.held.append(cycles)

    def Event(self, enable_timing):
        return _Event(self)


class _Event:
    def __init__(self, runtime):
        self._runtime = runtime
        self._at_ms = None

    def record(self):
        self._runtime.now_ms += 0.25
        self._at_ms = self._runtime.now_ms

    def synchronize(self):
        assert self._at_ms is not None

    def elapsed_time(self, end):
        return end._at_ms - self._at_ms


class _Gpu(cuda.CudaDevice):
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

    return Captured(replay, result, bytes=64)


def _with_graphs(monkeypatch):
    monkeypatch.setattr(penalties.Problem, "is_on_cuda", True)
    monkeypatch.setattr(penalties, "capture", _replaying)


@pytest.fixture
def graphs(monkeypatch):
    """CUDA graphs on the CPU."""
    _with_graphs(monkeypatch)


def _breaks(params, l1, l2):
    raise RuntimeError("no rule for this\nin /opt/some/where/file.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the smallest case as on a GPU, with a peer that fails; the results, and the file."""
    output = tmp_path_factory.mktemp("bench") / "nvidia-h200.json"
    options = ["--cases", "net", "--rounds", "5", "--seconds", "0", "--output", str(output)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        _with_graphs(monkeypatch)
        monkeypatch.setitem(PEERS, "broken", Peer("broken", _breaks, devices=("cuda",)))
        monkeypatch.setattr(measure, "roofline_bytes", lambda l2_bytes: 4 * l2_bytes)
        monkeypatch.setattr(measure, "LISTS", 20)
        parsed = measure.parse([*options, "--peers", "loop", "broken"])
        parsed.device = "cuda"
        return measure.measure(parsed, _Gpu()), output


def test_tinyllama_is_the_real_list():
    for name, size in (("tinyllama", 4), ("tinyllama_bf16", 2)):
        case = CASES[name]
        assert (case.tensors, case.elements, case.bytes) == (201, 1_100_048_384, 1_100_048_384 * size)
    assert CASES["tinyllama_bf16"].dtype == torch.bfloat16


def test_the_lists_of_a_gpu():
    assert not [name for name in DEVICE_CASES["cpu"] if "tinyllama" in name]
    assert set(DEVICE_CASES["cuda"]) < set(CASES)
    assert not [name for name in peers_of("cpu") if "combo" in name or "apex" in name]
    assert set(peers_of("cpu")) < set(peers_of("cuda"))
    assert roofline_bytes(50 << 20) == 1 << 30
    assert roofline_bytes(256 << 20) == 4 << 30


def test_a_run_is_complete(run):
    results, output = run
    assert Results.read(output) == dataclasses.replace(results, figures=list(results.figures))
    names = ("fused_reg", "fused_reg.accumulate_grad_", "loop")
    expected = {(name, family) for name in names for family in ("", "CUDA graph")}
    present = {(row.implementation, row.family) for row in results.rows if row.mode == "present"}
    assert present == expected | {("g.add_(x, alpha=a), one tensor", "")}
    bandwidths = {mode: roofline.gb_per_s for roofline in results.rooflines for mode in roofline.modes}
    assert set(bandwidths) == set(MODES) - {"step", *COMPILED_MODES}
    for row in results.rows:
        assert row.median_ms == 0.25
        assert row.costs.host_us > 0
        assert (row.costs.launches, row.costs.operations) == (1, 1)
        assert row.costs.peak_bytes == (64 if row.family == "CUDA graph" else 0)
        if row.mode != "step":
            assert row.costs.percent_of_roofline == pytest.approx(100 * row.gb_per_s / bandwidths[row.mode])
            assert row.ratio_to_limit == 1.0
    assert results.agreement == Agreement(lists=20, equal=20, max_ulp=0)
    assert results.machine.gpu.timer_us == 250


def test_what_fails_is_absent(run):
    results, _ = run
    left_out = [a for a in results.absent if a.what in COMPILED_MODES]
    failed = [a for a in results.absent if a.what not in COMPILED_MODES]
    assert {(a.what, a.implementation) for a in failed} == {
        (mode, name) for mode in ("value", "fresh", "present") for name in ("broken", "broken, CUDA graph")
    }
    assert {a.reason for a in failed} == {"failed: RuntimeError: no rule for this in ..."}
    assert {(a.what, a.implementation) for a in left_out} == {(mode, "torch.compile") for mode in COMPILED_MODES}
    assert {a.reason for a in left_out} == {"has its compiled training step measured on a CPU only: --compile-all"}
    assert not results.lacks_ours


def test_our_wrong_result_is_absent_and_seen(graphs, monkeypatch):
    monkeypatch.setitem(
        PEERS, "fused_reg", Peer("fused_reg", lambda p, l1, l2: reference.loop(p, l1, 0.9 * l2), "ours")
    )
    options = measure.parse(["--cases", "net", "--modes", "value", "--peers", "--rounds", "5", "--seconds", "0"])
    options.device = "cuda"
    plan = measure._plan(options, _Gpu())
    (case, mode), *_ = plan.items()
    records = measure.Measurement(plan).records(case, mode)
    reasons = [record.reason for record in records if hasattr(record, "reason")]
    assert len(reasons) == 2
    assert all("10-20-1 net, value: fused_reg" in reason and "value error" in reason for reason in reasons)


def test_a_task_that_fails_does_not_end_the_run():
    def fails():
        raise RuntimeError("out of memory")

    (absent,) = measure._outcome(measure._Task("rooflines", fails), keeps_going=True)
    assert table.absent_line(absent) == "rooflines, all of it: failed: RuntimeError: out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        measure._outcome(measure._Task("rooflines", fails), keeps_going=False)


def test_a_run_can_be_shown(run, tmp_path, capsys):
    results, output = run
    table.show(results)
    printed = capsys.readouterr().out
    for text in ("NVIDIA H200, sm_90", "CUDA graph", "launches", "read: x.sum()", "random lists", "broken"):
        assert text in printed
    text = markdown.document(results, output.name)
    assert text.startswith("# Measured on the NVIDIA H200\n")
    for line in (
        "Smaller than the L2 cache, which is flushed before every call: 10-20-1 net.",
        "### 10-20-1 net: optimizer step",
        "| ResNet-50, value: host microseconds | - | at most 60 | not measured |",
        "- 10-20-1 net, value, broken: failed: RuntimeError: no rule for this in ...",
    ):
        assert line in text.splitlines()
    draw.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", ["value", "value_and_grad", "fresh", "present"])
def test_a_graph_is_verified(mode, graphs):
    params = CASES["mlp"].make_params(CPU)
    candidates = penalty_candidates(Problem(params, STRENGTHS), mode, [OURS, LOOP, FOREACH_NORM])
    for candidate in candidates:
        candidate.build().verify()
    stale = [c.build() for c in candidates if c.family and c.role == "ours"]
    with torch.no_grad():
        params[0].mul_(2)
    for contender in stale:  # its oracle is of the parameters as they were
        with pytest.raises(WrongResultError):
            contender.verify()


def test_bfloat16_is_verified(graphs):
    case = dataclasses.replace(CASES["mlp"], dtype=torch.bfloat16)
    problem = Problem(case.make_params(CPU), STRENGTHS)
    for mode in ("value", "value_and_grad", "fresh", "present"):
        errors = {c.name: c.build().verify() for c in penalty_candidates(problem, mode, [OURS, LOOP])}
        assert errors["fused_reg"].value < 6e-8


def test_a_nan_gradient_is_refused():
    def loses(params, l1, l2):
        return reference.loop([params[0] * 1.0, *params[1:]], l1, l2)

    params = CASES["net"].make_params(CPU)
    params[0].register_hook(lambda grad: grad * torch.nan)
    (candidate, *_) = penalty_candidates(Problem(params, STRENGTHS), "fresh", [Peer("loses", loses)])
    with pytest.raises(WrongResultError, match="gradient error nan"):
        candidate.build().verify()


def test_fused_steps_are_verified(monkeypatch):
    monkeypatch.setitem(optimizers._KINDS, "cpu", optimizers._KINDS["cuda"])
    monkeypatch.setitem(optimizers._TIERS, "cpu", optimizers._TIERS["cuda"])
    contenders = optimizers.step_contenders(CASES["mlp"].make_params(CPU))
    assert {c.family for c in contenders} == {f"{kind}, fused=True" for kind in ("SGD", "Adam", "AdamW")}
    for contender in contenders:
        contender.verify()


def test_the_device_is_held_while_the_host_submits():
    device = _Gpu()
    device._host_seconds = lambda call: 1e-3
    watch = device.stopwatch(lambda: None)
    assert (watch.calls, watch.sample(), watch.host()) == (1, 0.25e-3, 1e-3)
    assert device._runtime.held == [int(1.52e-3 * 2e9)]
    device._host_seconds = lambda call: 1.0
    device.stopwatch(lambda: None).sample()
    assert device._runtime.held[-1] == int(5e-3 * 2e9)


def test_the_peak_is_above_the_inputs():
    device = _Gpu()

    def call():
        device._runtime.peak = 1234

    assert device.costs(call, 1e-6, None) == Costs(1.0, 1, 0, 0, peak_bytes=234)
    assert device.costs(call, 1e-6, 77).peak_bytes == 77


def test_what_the_device_did_is_counted():
    names = ["void kernel<float>()", "Memcpy DtoD (Device -> Device)", "Memset (Device)", "triton_red_fused_0"]
    assert cuda.counted(names) == (2, 1, 1)
    assert cuda.counted([]) == (None, None, None)


def test_percent_of_the_matching_roofline(run):
    results, _ = run
    rooflines = [Roofline(READ, ["value"], 1, 1.0, 4000.0), Roofline(COPY, ["fresh"], 1, 1.0, 2000.0)]
    rows = [dataclasses.replace(row, gb_per_s=1000.0) for row in results.rows if row.role == "ours"]
    percents = {row.mode: row.costs.percent_of_roofline for row in with_percents(rows, rooflines)}
    assert (percents["value"], percents["fresh"]) == (25.0, 50.0)
    assert with_percents(rows, [])[0] == rows[0]


def test_values_agree_with_themselves():
    assert measure_agreement("cpu", lists=50) == Agreement(lists=50, equal=50, max_ulp=0)


def test_the_budget_bounds_compiling():
    budget = CompileBudget(0.05)
    calls = []

    def slow():
        while True:
            calls.append(torch.ones(1))

    compiled = Compiled(reference.loop, budget=budget)
    for _ in range(2):  # the reason is kept
        with pytest.raises(UnavailableError, match=r"did not compile in the 0 s that were left"):
            compiled.compile(slow, wants_grad=True)
    with pytest.raises(UnavailableError, match="is not compiled: the run's 0 s for compiling are spent"):
        compiled.compile(slow, wants_grad=False)


def test_a_missing_peer_says_why(monkeypatch):
    monkeypatch.delattr(torch, "_foreach_powsum", raising=False)
    params = [torch.ones(1)]
    for name, reason in (("torch._foreach_powsum", "is not in torch"), ("apex multi_tensor_l2norm, L2 only", "is not")):
        with pytest.raises(UnavailableError, match=reason) as caught:
            PEERS[name].penalty(params, 1.0, 1.0)
        assert reason_of(caught.value) == str(caught.value)


@pytest.mark.skipif(not hasattr(torch, "_foreach_powsum"), reason="torch has no _foreach_powsum")
def test_powsum_is_the_penalty(graphs):
    problem = Problem(CASES["mlp"].make_params(CPU), STRENGTHS)
    contender, *_ = penalty_candidates(problem, "value", [PEERS["torch._foreach_powsum"]])
    assert contender.build().verify().value < 1e-5


def test_a_peer_without_l1_is_compared_without_it(graphs):
    problem = Problem(CASES["mlp"].make_params(CPU), STRENGTHS)
    only_l2 = Peer("l2", lambda p, l1, l2: reference.loop(p, 0.0, l2), modes=("value",), has_l1=False)
    for candidate in penalty_candidates(problem, "value", [only_l2]):
        candidate.build().verify()


def test_the_slug_is_a_file_name():
    assert measure.slug("NVIDIA H200") == "nvidia-h200"
    assert measure.slug("NVIDIA A100-SXM4-80GB (MIG)") == "nvidia-a100-sxm4-80gb-mig"


def test_the_commit_without_git(monkeypatch):
    monkeypatch.setattr("benchmarks.machine._git", lambda *arguments: "")
    monkeypatch.setenv("FUSED_REG_COMMIT", "abc")
    assert measure.machine.describe().commit == "abc"


def test_a_quick_run_says_what_it_leaves_out():
    options = {"cases": None, "modes": ["fresh"], "peers": None, "rounds": 7, "seconds": 0.5}
    options |= {"device": "cuda", "quick": True, "compile_all": False, "compile_seconds": None}
    plan = measure._plan(SimpleNamespace(**options), _Gpu())
    assert plan.effort == Effort(rounds=7, seconds=0.5)
    assert plan.compile_seconds == 70
    skipped = {(peer, mode) for peer in plan.peers for mode in ("value", "fresh") if _skipped(plan, peer, mode)}
    compiled = {peer.name for peer in COMPILED}
    assert skipped == {(name, mode) for name in compiled for mode in ("value", "fresh")} - {("torch.compile", "fresh")}


def _skipped(plan, peer, mode):
    return plan.reason_to_skip(PEERS[peer], CASES["resnet50"], mode)


def test_the_profilers_events_are_told_apart(monkeypatch):
    def event(name, device, annotation=False):
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [
        event("cudaLaunchKernel", cuda.DeviceType.CPU),
        event("Optimizer.step#SGD.step", cuda.DeviceType.CUDA, annotation=True),
        event("kernel", cuda.DeviceType.CUDA),
        event("Memset (Device)", cuda.DeviceType.CUDA),
    ]
    profiler = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(cuda, "profile", lambda **options: nullcontext(profiler))
    assert cuda.CudaDevice(_Runtime(), "cpu").costs(lambda: None, 0.0, 0) == Costs(0.0, 1, 0, 1, peak_bytes=0)
