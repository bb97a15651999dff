"""``examples/continual.py``: what a penalty toward the weights of a first task keeps of it."""

import json

import pytest
import torch
from loaded_examples import loaded
from torch import nn

pytestmark = pytest.mark.long


@pytest.fixture
def example():
    with loaded("continual") as module:
        yield module


def test_the_first_task_is_kept(example, tmp_path, capsys):
    threads = torch.get_num_threads()
    results = example.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    for which, least in (("permuted pixels", 0.1), ("other digits", 0.05)):
        (found,), chosen = results["tasks"][which]["seeds"], results["tasks"][which]["chosen"]
        first, second = zip(*(found[method][strength]["test"] for method, strength in chosen.items()), strict=True)
        assert first[0] + least < min(first[1:])
        assert min(second) > 0.6
        assert min(found["before"], *found["together"]) > 0.85
        for method, strength in chosen.items():
            assert found[method][strength]["epochs"][-1] == found[method][strength]["test"]
            assert sum("epochs" in tried for tried in found[method].values()) == 1
    assert json.loads((tmp_path / "continual.json").read_text()) == results
    for what in ("epochs", "tradeoff"):
        assert (tmp_path / f"continual-{what}.png").stat().st_size > 10_000
    assert "both together" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_fisher_is_the_mean_over_images_and_their_labels(example):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double(), torch.randn(5, 3).double()
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for image in x:
        log_probabilities = net(image).log_softmax(0)
        for log_probability in log_probabilities:
            grads = torch.autograd.grad(log_probability, list(net.parameters()), retain_graph=True)
            for total, g in zip(expected.values(), grads, strict=True):
                total += log_probability.detach().exp() * g**2 / len(x)
    found = example.fisher(net, x)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("is_ewc", [False, True])
def test_the_penalty_is_of_the_distance_from_the_first_task(example, is_ewc):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    importance = {name: torch.rand_like(p) for name, p in net.named_parameters()} if is_ewc else None
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    penalty = example.near(net, 0.7, importance)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    weights = importance or {name: torch.ones_like(p) for name, p in net.named_parameters()}
    expected = sum((weights[name] * (p - start[name]) ** 2).sum() for name, p in net.named_parameters())
    torch.testing.assert_close(penalty(), 0.7 * expected)


def test_the_tasks(example):
    (first, second), (low, high) = (example.two_tasks(which, 0) for which in example.TASKS)
    for (x, y), (permuted, same) in zip(first, second, strict=True):
        assert torch.equal(y, same)
        assert torch.equal(x.sort(dim=1).values, permuted.sort(dim=1).values)
        assert not torch.equal(x, permuted)
    for (x, y), (z, other), (_, all_labels) in zip(low, high, first, strict=True):
        assert set(y.tolist()) == {0, 1, 2, 3, 4}
        assert set(other.tolist()) == {5, 6, 7, 8, 9}
        assert len(x) + len(z) == len(all_labels)


def test_a_strength_is_chosen_on_validation_images(example):
    runs = [
        {"EWC": {"1": {"validation": [a, b], "test": [0, 0]}, "2": {"validation": [0.5, 0.8], "test": [1, 1]}}}
        for a, b in ((0.9, 0.9), (0.4, 0.5))
    ]
    assert example.choose(runs, "EWC") == "1"
    runs[1]["EWC"]["2"]["validation"] = [0.6, 0.9]
    assert example.choose(runs, "EWC") == "2"
