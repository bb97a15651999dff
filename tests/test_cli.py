"""``python -m fused_reg``."""

import runpy
import subprocess
import sys

import pytest
import torch

import fused_reg
from fused_reg import __main__ as cli
from fused_reg import _ops, reference

DTYPES = ("float32", "float64", "bfloat16", "float16")


def lines_of(text: str) -> dict[str, str]:
    """name -> value, of the version lines and of the self-checks."""
    out = {}
    for line in text.splitlines():
        name, value = line.split(": ", 1) if line.startswith("self-check") else (line[:20], line[21:])
        out[name.strip()] = value
    return out


def test_prints_every_item_and_exits_0():
    done = subprocess.run([sys.executable, "-m", "fused_reg"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    info = _ops.library.build_info()
    lines = lines_of(done.stdout)
    assert lines.pop("threads").isdigit()
    versions = {
        "fused_reg": fused_reg.__version__,
        "torch, built with": info["torch"],
        "torch, running": torch.__version__,
        "compiler": info["compiler"],
        "CUDA architectures": info.get("cuda_architectures", "CPU only"),
        "CPU capability": info["cpu_capability"],
    }
    assert {name: lines.pop(name) for name in versions} == versions
    assert all(versions.values())
    assert set(lines) >= {f"self-check cpu torch.{dtype}" for dtype in DTYPES}
    assert set(lines.values()) == {"ok"}


def test_exits_0_in_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fused_reg"])
    monkeypatch.delitem(sys.modules, "fused_reg.__main__")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("fused_reg", run_name="__main__")
    assert exit_.value.code == 0
    assert "self-check cpu torch.float16: ok" in capsys.readouterr().out


def test_wrong_value_exits_1(monkeypatch, capsys):
    right = reference.value_and_grad

    def wrong(params, *args, **kwargs):
        value, grads = right(params, *args, **kwargs)
        return value * (1 + 1e-6), grads

    monkeypatch.setattr(reference, "value_and_grad", wrong)
    assert cli.main() == 1
    lines = lines_of(capsys.readouterr().out)
    for dtype in DTYPES:
        assert lines[f"self-check cpu torch.{dtype}"].startswith("value ")


@pytest.mark.parametrize("at", [1, 17, -1])
def test_one_wrong_gradient_exits_1(at, monkeypatch, capsys):
    """In one dtype, one tensor, one element."""
    right = reference.value_and_grad

    def wrong(params, *args, **kwargs):
        value, grads = right(params, *args, **kwargs)
        if params[0].dtype == torch.bfloat16:
            grads[3][at] += 1
        return value, grads

    monkeypatch.setattr(reference, "value_and_grad", wrong)
    assert cli.main() == 1
    lines = lines_of(capsys.readouterr().out)
    expected = "gradient of params[3] is wrong in 1 of 16385 elements"
    for dtype in DTYPES:
        assert lines[f"self-check cpu torch.{dtype}"] == (expected if dtype == "bfloat16" else "ok")


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_not_a_number_exits_1(wrong, monkeypatch, capsys):
    right = fused_reg.value_and_grad
    monkeypatch.setattr(fused_reg, "value_and_grad", lambda *a, **k: (torch.tensor(wrong), right(*a, **k)[1]))
    assert cli.main() == 1
    assert "ok" not in capsys.readouterr().out
