"""`regularized`: a layer says its own penalty, and keeps it (hard case: through everything that rebuilds modules)."""

import copy
import pickle

import pytest
import torch
from test_regularizer import assert_penalty, make_net, names_of, strengths_of
from torch import nn

from fused_reg import Regularizer, regularized


def test_weights_or_all():
    for bias, expected in ((False, ["0.weight"]), (True, ["0.weight", "0.bias"])):
        net = make_net()
        assert regularized(net[0], l1=0.5, bias=bias) is net[0]
        regularizer = Regularizer(net)
        assert names_of(regularizer) == expected
        assert_penalty(regularizer, [p for n, p in net.named_parameters() if n in expected], l1=0.5)


def test_every_kind_of_bias():
    net = nn.ModuleList([nn.LSTM(3, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.LayerNorm(3)])
    assert names_of(Regularizer(regularized(net, l1=0.5))) == [
        *("0.weight_ih_l0", "0.weight_hh_l0", "1.in_proj_weight", "1.out_proj.weight"),
    ]


def test_weights_of_a_normalization_layer():
    """They are meant where that very layer is marked, wrapped or parametrized or not."""
    for mark in (lambda layer: regularized(layer, l1=0.5), lambda layer: regularized(nn.DataParallel(layer), l1=0.5)):
        net = nn.ModuleList([nn.Linear(3, 4), mark(nn.LayerNorm(4))])
        assert names_of(Regularizer(net)) == ["1.weight"]
    net = nn.Sequential(regularized(nn.LayerNorm(4), l1=0.5))
    nn.utils.parametrize.register_parametrization(net[0], "weight", nn.Softplus())
    assert names_of(Regularizer(net)) == ["0.parametrizations.weight.original"]


def test_parametrized_layers_are_still_in_their_layer():
    net = make_net()
    regularized(net[0], l1=0.5)
    nn.utils.parametrizations.weight_norm(net[0], "weight")
    nn.utils.parametrize.register_parametrization(net[0], "bias", nn.Softplus())
    assert names_of(Regularizer(net)) == [f"0.parametrizations.weight.original{i}" for i in (0, 1)]


def test_the_innermost_wins():
    net = make_net()
    regularized(net, l1=0.5, bias=True)
    regularized(net[0], l2=0.25)
    regularized(net[3], l2_norm=0.125, group="row", bias=True)
    assert strengths_of(Regularizer(net)) == {
        "0.weight": (0, 0.25, 0),
        "0.bias": (0.5, 0, 0),  # of which the inner mark does not speak
        "1.bias": (0.5, 0, 0),  # and not the weight, as for weights_only
        "2.weight": (0.5, 0, 0),
        "2.bias": (0.5, 0, 0),
        "3.weight": (0, 0, 0.125),
        "3.bias": (0, 0, 0.125),
    }


def test_marking_again_replaces_the_mark():
    net = make_net()
    regularized(net, l1=0.5, bias=True)
    regularized(net, l2=0.25)
    assert strengths_of(Regularizer(net, include="0.*")) == {"0.weight": (0, 0.25, 0)}


def test_marks_and_the_other_choices():
    net = make_net()
    regularized(net[0], l1=0.5, bias=True)
    regularized(net[1], l1=0.5, bias=True)
    assert names_of(Regularizer(net, exclude="1.bias")) == ["0.weight", "0.bias", "1.weight"]
    regularized(net[0], l1=0.5)
    assert names_of(Regularizer(net, weights_only=True, exclude="1.*")) == ["0.weight"]
    regularized(net[0], l1=0.5, bias=True)
    net[0].weight.requires_grad_(False)
    assert names_of(Regularizer(net, include="0.*")) == ["0.bias"]


def test_a_slice_is_another_module():
    """`net[:2]` is a new Sequential: a mark on it is not on `net`. The layers are the same."""
    net = make_net()
    for layer in net[:2]:
        regularized(layer, l1=0.5)
    assert names_of(Regularizer(net)) == ["0.weight", "1.weight"]
    assert names_of(Regularizer(net[:2])) == ["0.weight", "1.weight"]


def test_marks_survive(tmp_path):
    net = make_net()
    keys = list(net.state_dict())
    regularized(net[0], l1=0.5)
    assert list(net.state_dict()) == keys
    net.load_state_dict(make_net().state_dict())
    torch.save(net, tmp_path / "net.pt")
    for other in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(tmp_path / "net.pt", weights_only=False),
        torch.compile(net, backend="eager"),
        nn.DataParallel(net),
        torch.optim.swa_utils.AveragedModel(net),
        net.double(),
    ):
        assert strengths_of(Regularizer(other)) == {"0.weight": (0.5, 0, 0)}


def test_a_mark_on_a_compiled_module():
    net = make_net()
    regularized(torch.compile(net, backend="eager"), l1=0.5)
    assert names_of(Regularizer(net))[0] == "0.weight"


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
def test_marks_are_no_business_of_compiled_code():
    net = regularized(make_net()[0], l1=0.5)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x = torch.ones(2, 7)
    torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
def test_fully_shard(tmp_path):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        net = make_net()
        regularized(net[0], l1=0.5)
        dist.fsdp.fully_shard(net[0], mesh=mesh)
        dist.fsdp.fully_shard(net, mesh=mesh)
        assert repr(Regularizer(net)) == "Regularizer(\n  l1=0.5: 1 parameter, 35 elements: 0.weight\n)"
    finally:
        dist.destroy_process_group()
