"""``examples/path.py`` finds scikit-learn's coefficients, and its zeros."""

import json

import pytest
import torch
from loaded_examples import loaded

pytestmark = pytest.mark.long


@pytest.fixture
def example():
    with loaded("path") as module:
        yield module


def test_path_is_that_of_scikit_learn(example, tmp_path, capsys):
    results = example.main(["--quick", "--strengths", "8", "--seeds", "1", "--out", str(tmp_path)])
    for title in ("Lasso", "elastic net"):
        whole, (sample,) = results["all patients"][title], results["bootstrap"][title]
        for run in (whole, sample):
            assert run["largest_difference"] < 1e-6  # of coefficients up to 30
            assert run["same_zeros"] == 8
            assert max(run["violation"], run["sklearn_violation"]) < 1e-8
        assert whole["steps"] < whole["steps_cold"]
    assert (tmp_path / "path-coefficients.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "path.json").read_text()) == results
    assert "microseconds of a proximal step" in capsys.readouterr().out


def test_path_begins_where_every_coefficient_is_zero(example):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    problem = example.Problem(x, x @ torch.tensor([3.0, 0.0, -1.0, 0.5], dtype=torch.float64))
    alphas = problem.alphas(0.5, 5)
    w, _ = example.path(problem, alphas, 0.5)
    assert not w[:, 0].any()
    assert w[:, 1].any()
    assert example.violation(problem, w, alphas, 0.5) < 1e-10
    assert example.violation(problem, w + 1e-3, alphas, 0.5) > 1e-4
