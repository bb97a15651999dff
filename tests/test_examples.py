"""The examples run, in a short form, and show what they say."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def test_digits_trains_alike_three_ways(load, capsys):
    pytest.importorskip("sklearn", reason="examples/digits.py needs scikit-learn (pip install fused_reg[examples])")
    digits = load("digits")
    loop, ours, weight_decay = digits.main(["--epochs", "3"])
    assert digits.largest_difference(ours, loop) == 0
    assert 0 < digits.largest_difference(weight_decay, loop) < 1e-5
    assert ours.losses[-1][0] < 0.5
    assert ours.accuracy == loop.accuracy > 0.8
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize("processes", [2, 3])
def test_fsdp2_trains_alike_sharded_and_whole(processes):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, str(ROOT / "examples" / "fsdp2.py"), "--steps", "5"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))},
    )
    assert done.returncode == 0, done.stderr
    assert "the same sharded and whole in 5 of 5 steps" in done.stdout


def test_fsdp2_alone():
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "fsdp2.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("needs several processes; run torchrun --nproc-per-node 2 examples/fsdp2.py")
