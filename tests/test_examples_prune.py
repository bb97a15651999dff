"""``examples/prune.py`` makes channels exactly zero, and cuts them out of the network without changing its outputs."""

import json

import pytest
import torch
from loaded_examples import loaded

pytestmark = pytest.mark.long


@pytest.fixture
def example():
    with loaded("prune") as module:
        yield module


def test_a_pruned_network_gives_the_same_outputs(example, tmp_path, capsys):
    threads = torch.get_num_threads()
    results = example.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    (run,) = results["seeds"]
    found = run["strengths"][results["chosen"]]
    assert sum(found["channels"][-1]) < sum(results["dense"]["channels"])
    assert found["largest_difference"] < 1e-5
    assert found["penalized"] == found["pruned"]
    assert found["parameters"] < results["dense"]["parameters"]
    assert found["flops"] < results["dense"]["flops"]
    assert min(run["dense"]["test"], found["pruned, fine-tuned"]["test"]) > 0.9
    assert json.loads((tmp_path / "prune.json").read_text()) == results
    for what in ("channels", "norms", "tradeoff"):
        assert (tmp_path / f"prune-{what}.png").stat().st_size > 10_000
    assert "small from the start" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_cut_keeps_the_function(example):
    torch.manual_seed(0)
    model, x = example.network([5, 6, 7]), torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        for layer, dead in (("conv1", [0, 3]), ("conv2", [5]), ("conv3", [1, 2, 4])):
            model.get_submodule(layer).weight[dead] = 0
    small = example.cut(model, example.alive(model))
    assert [layer.weight.shape[:2] for layer in (small.conv1, small.conv2, small.conv3)] == [(3, 1), (5, 3), (4, 5)]
    torch.testing.assert_close(small(x), model(x))
    assert example.largest_difference(small, model, x) < 1e-5
    assert example.flops(small) < example.flops(model)


def test_a_zero_channel_gets_no_gradient(example):
    torch.manual_seed(0)
    model = example.network([3, 4, 5])
    with torch.no_grad():
        model.conv2.weight[2] = 0
    model(torch.rand(8, 1, 8, 8)).square().sum().backward()
    assert not model.conv2.weight.grad[2].any()
    assert not model.conv3.weight.grad[:, 2].any()
    assert model.conv2.weight.grad[1].any()


def test_cut_refuses_an_empty_layer(example):
    model = example.network([2, 2, 2])
    torch.nn.init.zeros_(model.conv2.weight)
    with pytest.raises(ValueError, match=r"no channels left, \[2, 0, 2\]; take a smaller strength"):
        example.cut(model, example.alive(model))


def test_strongest_are_those_with_the_largest_norms(example):
    model = example.network([3, 3, 3])
    with torch.no_grad():
        for layer in (model.conv1, model.conv2, model.conv3):
            layer.weight.copy_(torch.tensor([2.0, 1.0, 3.0])[:, None, None, None].expand_as(layer.weight))
    kept = example.strongest(model, [1, 2, 3])
    assert [mask.tolist() for mask in kept] == [[False, False, True], [True, False, True], [True, True, True]]
