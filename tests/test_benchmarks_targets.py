"""The targets on a GPU, from rows made up for the purpose, and the committed results."""

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from benchmarks import draw, markdown, table
from benchmarks.figures import with_figures
from benchmarks.rows import Agreement, Costs
from benchmarks.run import Gpu, Results

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
GPU = Gpu("NVIDIA H200", "sm_90", 132, l2_bytes=50 << 20, memory_bytes=1 << 37, driver="1", cuda="13.0", timer_us=2.0)


@pytest.fixture(scope="module")
def cpu():
    """The committed run on a CPU."""
    return Results.read(RESULTS / "cpu.json")


def test_the_committed_results_can_be_shown(cpu, tmp_path, capsys):
    assert markdown.document(cpu, "cpu.json") == (RESULTS / "cpu.md").read_text(encoding="utf-8")
    table.show(cpu)
    assert "GPT-2 small" in capsys.readouterr().out
    draw.draw(cpu, tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def _row(template, case, mode, name, family="", device_us=100.0, host_us=10.0, percent=95.0, launches=1, limit=1.0):
    costs = Costs(host_us, launches, 0, 0, peak_bytes=0, percent_of_roofline=percent)
    return dataclasses.replace(
        template,
        case=case,
        mode=mode,
        implementation=name,
        family=family,
        median_ms=device_us / 1e3,
        ratio_to_limit=limit,
        costs=costs,
    )


@pytest.fixture
def results(cpu):
    template = cpu.rows[0]
    rows = [
        _row(template, "resnet50", "value", "fused_reg", host_us=61.0, percent=89.0, limit=1.25),
        _row(template, "resnet50", "value_and_grad", "fused_reg", launches=2),
        _row(template, "small_tensors", "value_and_grad", "fused_reg", percent=1.0),
        _row(template, "resnet50", "present", "fused_reg", launches=3, percent=10.0),
        _row(template, "resnet50", "present", "fused_reg.accumulate_grad_", percent=91.0),
        _row(template, "resnet50", "prox", "fused_reg", launches=2, percent=85.0),
        _row(template, "resnet50", "step", "fused_reg attached", "SGD, fused=True", launches=3),
        _row(template, "resnet50", "step", "no penalty", "SGD, fused=True", launches=2),
        _row(template, "resnet50", "fresh", "fused_reg", device_us=50.0, host_us=200.0),
        _row(template, "resnet50", "fresh", "loop", device_us=3000.0, host_us=8000.0),
        _row(template, "resnet50", "fresh", "torch.compile", device_us=1000.0, host_us=400.0),
        _row(template, "resnet50", "fresh", "torch.compile, combo kernels", device_us=800.0, host_us=400.0),
        _row(template, "resnet50", "fresh", "fused_reg", "CUDA graph", device_us=50.0, host_us=5.0),
        _row(template, "resnet50", "fresh", "torch.compile", "CUDA graph", device_us=40.0, host_us=5.0),
    ]
    machine = dataclasses.replace(cpu.machine, gpu=GPU)
    agreement = Agreement(lists=1000, equal=998, max_ulp=1)
    run = dataclasses.replace(cpu, rows=rows, memory=[], absent=[], machine=machine, agreement=agreement)
    return with_figures(run)


def test_targets(results):
    figures = {figure.claim: (figure.measured, figure.passed) for figure in results.figures}
    value, both, composed = "ResNet-50, value", "ResNet-50, value and gradient", "ResNet-50, forward + backward"
    without = "without autograd"
    assert figures[f"{both}: launches, copies and fills"] == (2, False)
    assert figures["1,000 tensors of 64, value and gradient: launches, copies and fills"] == (1, True)
    assert figures["GPT-2 small, value and gradient: launches, copies and fills"] == (None, None)
    assert figures["ResNet-50, accumulate_grad_: launches, copies and fills"] == (1, True)
    assert figures["ResNet-50, accumulate_grad_: percent of the read-modify-write bandwidth"] == (91.0, True)
    assert figures["ResNet-50, prox_: launches, copies and fills"] == (2, False)
    assert figures["ResNet-50, prox_: percent of the scale bandwidth"] == (85.0, False)
    step = "ResNet-50, step of SGD, fused=True, regularizer attached"
    assert figures[f"{step}: launches, copies and fills added"] == (1, True)
    assert figures[f"{value}: host microseconds"] == (61.0, False)
    assert figures[f"{composed}, .grad None: host microseconds"] == (200.0, True)
    assert figures[f"{value}: percent of the read bandwidth"] == (89.0, False)
    assert figures[f"{value}: percent of the speed of `x.sum(), one tensor`"] == (80.0, False)
    assert figures[f"{both} {without}: percent of the copy bandwidth"] == (95.0, True)
    assert not [claim for claim in figures if claim.startswith("1,000 tensors") and "percent" in claim]  # in the L2
    assert figures[f"{composed}: times as fast as loop"] == (40.0, True)
    assert figures[f"{composed}: times as fast as the best torch.compile"] == (4.0, False)
    assert figures[f"{composed}: times as fast as the best torch.compile, both in a CUDA graph"] == (0.8, False)
    assert figures["random lists: ulps between the CPU's value and the GPU's, at most"] == (1, True)
    assert results._as_json()["targets"][0].keys() >= {"claim", "measured", "target", "met"}


def test_targets_are_shown(results, tmp_path):
    text = markdown.document(results, "nvidia-h200.json").splitlines()
    for line in (
        "| ResNet-50, value: host microseconds | 61.00 | at most 60 | missed |",
        "| ResNet-50, forward + backward: times as fast as loop | 40.00 | at least 30 | met |",
        "Values of 1,000 random lists: 998 have the CPU's bits, the others are at most 1 ulp apart.",
        "Smaller than the L2 cache, which is flushed before every call: 1,000 tensors of 64.",
    ):
        assert line in text
    results.write(tmp_path / "run.json")
    assert Results.read(tmp_path / "run.json") == results
    draw.draw(results, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
