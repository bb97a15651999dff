"""``examples/pat.py`` prunes to the shares of zeros that it says, with torchao and without it."""

import json

import pytest
import torch
from loaded_examples import loaded
from torch import nn

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings(
        "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
    ),  # torchao's
]


@pytest.fixture
def example():
    with loaded("pat") as module:
        yield module


@pytest.fixture
def setups(example):
    with loaded("pat"):
        import pat_setups

        yield pat_setups


def test_both_reach_the_share(example, tmp_path, capsys):
    """Where torchao is missing, ours."""
    threads = torch.get_num_threads()
    results = example.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    for name, of in example.NETWORKS.items():
        (run,) = results["networks"][name]["seeds"]
        assert set(run) == {"dense", *example.available(of.aims | of.searched)}
        assert run["dense"]["share"] == 0
        for way in example.available(of.aims):
            found = run[way]["0.5"]
            assert set(found["zeros"].values()) == {0.5}
            assert found["share"] == 0.5
            assert found["accuracy"] > 0.8
    searched = results["networks"]["convolutions"]["seeds"][0]["fused_reg, group lasso"]["0.5"]
    assert 0.3 < searched["share"] < 0.7
    assert json.loads((tmp_path / "pat.json").read_text()) == results
    assert (tmp_path / "pat-accuracy.png").stat().st_size > 10_000
    assert "fused_reg, zeros" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_without_torchao_it_says_so(example, tmp_path, monkeypatch, capsys):
    found = {"accuracy": 0.5, "share": 0.5, "zeros": {}, "trainings": 1}
    monkeypatch.setattr(example, "PruneOptimizer", None)
    monkeypatch.setattr(example, "train", lambda *arguments: dict(found))
    results = example.main(["--quick", "--seeds", "1", "--out", str(tmp_path)])
    for network in results["networks"].values():
        assert "fused_reg, zeros" in network["code"]
        assert not any(name.startswith("PAT") for name in (*network["code"], *network["seeds"][0]))
    assert (
        "pat.py: torchao is missing, and with it one half; run pip install 'fused_reg[pat]'\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["convolutions", "transformer"])
def test_a_share_is_that_of_every_tensor(name, example, setups):
    """At the end of the ramp, and from then on."""
    torch.manual_seed(0)
    of = example.NETWORKS[name]
    for way, setup in example.available(of.aims).items():
        model, shares = of.make(), []
        optimizer = setup(model, 0.75, 10)
        for _ in range(8):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            shares.append({mask.float().mean().item() for mask in setups.zero_groups(model).values()})
        assert shares[0] == {0.0}, way
        assert shares[6:] == [{0.75}] * 2, way


def test_groups_are_channels_heads_and_neurons(setups):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), setups.Block(6, 3))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].value.weight[2:4] = 0
        model[1].up.weight[5] = 0
        model[1].query.weight[:] = 0
    found = {name: mask.nonzero().flatten().tolist() for name, mask in setups.zero_groups(model).items()}
    assert found == {"0": [1], "1.value": [1], "1.up": [5]}
    assert {name: tuple(rows.shape) for name, rows in setups.groups(model).items()} == {
        "0": (4, 27),
        "1.value": (3, 12),
        "1.up": (24, 6),
    }


@pytest.mark.parametrize(("needed", "trainings"), [(0.0316, 1), (0.3, 4), (5.0, 8)])
def test_a_strength_is_searched(needed, trainings, example, monkeypatch):
    """Of one training after the other; 0.0316 is the middle, and what lies outside is not reached."""
    tried = []

    def aimed(of, seed, epochs, setup, strength):
        tried.append(strength)
        return {"share": min(1.0, 0.5 * strength / needed)}

    monkeypatch.setattr(example, "aimed", aimed)
    found = example.searched(None, 0, 1, None, 0.5)
    assert found["trainings"] == len(tried)
    if trainings == 8:
        assert len(tried) == 8
        assert found["share"] == max(min(1.0, 0.5 * strength / needed) for strength in tried) < 0.49
    else:
        assert abs(found["share"] - 0.5) <= 0.01
        assert found["strength"] == tried[-1]
        assert (len(tried) == 1) == (trainings == 1)


def test_code_is_counted(setups):
    def setup(model):
        first = model
        return (
            first,
        )  # fmt: skip

    assert setups.size(setup) == [4, len("first=modelreturn(first,)#fmt:skip")]
