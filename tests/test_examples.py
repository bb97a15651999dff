"""The examples run, in a short form, and show what they say."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the examples need scikit-learn (pip install fused_reg[examples])")


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    return importlib.import_module


def test_digits_trains_alike_three_ways(load, capsys):
    digits = load("digits")
    loop, ours, weight_decay = digits.main(["--epochs", "3"])
    assert digits.largest_difference(ours, loop) == 0
    assert 0 < digits.largest_difference(weight_decay, loop) < 1e-5
    assert ours.losses[-1][0] < 0.5
    assert ours.accuracy == loop.accuracy > 0.8
    assert "largest difference" in capsys.readouterr().out
