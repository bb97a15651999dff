"""`regularized`: a layer says its own penalty, and keeps it (hard case: through everything that rebuilds modules)."""

import copy
import pickle

import pytest
import torch
from oracle import assert_same_bits
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


@pytest.mark.parametrize("before", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_biases_with_strengths_of_their_own(before):
    net = make_net()
    regularized(net[0], l1=0.5, bias={"l2": 0.25})
    regularized(net[3], bias={"l2_norm": 0.125})
    regularizer = Regularizer(before(net))
    assert strengths_of(regularizer) == {"0.weight": (0.5, 0, 0), "0.bias": (0, 0.25, 0), "3.bias": (0, 0, 0.125)}
    w, b, c = (p.detach().double() for _, p in regularizer.named_parameters())
    expected = 0.5 * w.abs().sum() + 0.25 * b.square().sum() + 0.125 * c.norm()
    torch.testing.assert_close(regularizer().double(), expected)
    outer = regularized(make_net(), l1=1.0, bias=True)
    regularized(outer[0], bias={"l1": 2.0})
    found = strengths_of(Regularizer(before(outer)))
    assert (found["0.weight"], found["0.bias"], found["3.bias"]) == ((1, 0, 0), (2, 0, 0), (1, 0, 0))


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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)


def exchanged(net):
    """Another layer around the same parameters, as ``from_float`` makes it."""
    layer = nn.Linear(3, 3)
    layer.weight, layer.bias = net[0].weight, net[0].bias
    return nn.Sequential(layer, net[1])


CONVERSIONS = {
    "syncbn": (lambda: nn.BatchNorm1d(3), nn.SyncBatchNorm.convert_sync_batchnorm, "0.weight"),
    "exchanged": (lambda: nn.Linear(3, 3), exchanged, "0.weight"),
    "fx": (Block, torch.fx.symbolic_trace, "0.layer.weight"),
    "slice": (lambda: nn.Linear(3, 3), lambda net: net[:2], "0.weight"),
}


@pytest.mark.parametrize("before", [lambda net: net, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_mark_that_a_conversion_loses_is_remembered(conversion, before):
    """Also where it is made of a copy, and where the new layer is in another one that is marked."""
    make, convert, name = CONVERSIONS[conversion]
    net = nn.Sequential(regularized(make(), l1=0.5), nn.Linear(3, 3))
    assert strengths_of(Regularizer(convert(before(net)))) == {name: (0.5, 0, 0)}
    outer = regularized(nn.Sequential(regularized(make(), l1=0.5), nn.Linear(3, 3)), l2=0.25)
    found = strengths_of(Regularizer(convert(before(outer))))
    assert (found[name], found["1.weight"]) == ((0.5, 0, 0), (0, 0.25, 0))


def test_a_mark_that_is_replaced_is_not_remembered():
    net = make_net()
    regularized(net[0], l1=0.5, bias=True)
    regularized(net[0], l2=0.25)
    compiled = torch.compile(net[1], backend="eager")
    regularized(compiled, l1=0.5, bias=True)
    regularized(compiled, l2=0.25)
    assert strengths_of(Regularizer(net)) == {"0.weight": (0, 0.25, 0), "1.weight": (0, 0.25, 0)}


def test_marked_parameters_are_as_others_to_torch(tmp_path):
    """They can be swapped, and a file of them has tensors only."""
    net = regularized(nn.Linear(3, 2), l1=0.5)
    torch.save(list(net.parameters()), tmp_path / "parameters.pt")
    assert_same_bits(torch.load(tmp_path / "parameters.pt", weights_only=True), list(net.parameters()))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert strengths_of(Regularizer(net)) == {"weight": (0.5, 0, 0)}


def test_print_shows_marks():
    net = nn.Sequential(regularized(nn.Linear(2, 2), l1=1e-4, l2_norm=0.5, group="row", bias=True), nn.ReLU())
    shown = '(0): Linear[l1=0.0001, l2_norm=0.5, group="row", bias](in_features=2, out_features=2, bias=True)'
    for each in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert shown in str(each)
    assert net[0]._get_name() == "Linear"
    regularized(net[0], l1=0.5, bias={"l2": 0.25})
    assert str(net[0]).startswith("Linear[l1=0.5, bias: l2=0.25](")
    regularized(net[0], bias={"l2": 0.25})
    assert str(net[0]).startswith("Linear[bias: l2=0.25](")
    regularized(net[0], l2=torch.tensor(0.5))
    regularized(net[0], l2=lambda step: 0.5)
    assert str(net[0]) == "Linear[l2: function](in_features=2, out_features=2, bias=True)"
    assert str(regularized(nn.Sequential(), l1=0.5)) == "Sequential[l1=0.5]()"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_marks_are_no_business_of_torchscript():
    net = nn.Sequential(regularized(nn.Linear(3, 2), l1=0.5))
    x = torch.ones(1, 3)
    for compiled in (torch.jit.script(net), torch.jit.trace(net, x)):
        torch.testing.assert_close(compiled(x), net(x))
    assert names_of(Regularizer(nn.Sequential(regularized(torch.jit.script(nn.Linear(3, 2)), l1=0.5)))) == ["0.weight"]


@pytest.mark.filterwarnings("ignore")  # of torch.distributed's own
def test_fully_shard(mesh):
    from torch.distributed.fsdp import fully_shard

    net = make_net()
    regularized(net[0], l1=0.5)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert repr(Regularizer(net)) == "Regularizer(\n  l1=0.5: 1 parameter, 35 elements: 0.weight\n)"


def test_a_mark_and_a_change_of_strengths():
    """The later one counts, of what it says; a copy of a mark is as old as that is."""
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    regularized(net[0], l1=1.0, bias=True)
    regularizer = Regularizer(net, l2=0.25)
    regularizer.set_strength(l1=0.5)
    regularizer.set_strength(l2=0.125, where="*")
    before = {"0.weight": (0.5, 0.125, 0), "0.bias": (0.5, 0.125, 0)} | dict.fromkeys(
        ["1.weight", "1.bias"], (0, 0.125, 0)
    )
    assert strengths_of(regularizer) == before
    net[0] = copy.deepcopy(net[0])
    with pytest.warns(UserWarning, match="it follows its module"):
        assert strengths_of(regularizer) == before
    for copied, own in (pickle.loads(pickle.dumps((net, regularizer))), (net, regularizer)):
        regularized(copied[0], l1=2.0, bias=True)
        regularized(copied[1], l2=4.0)
        now = before | {"0.weight": (2, 0.125, 0), "0.bias": (2, 0.125, 0), "1.weight": (0, 4, 0)}
        assert strengths_of(own) == now
        own.set_strength(l1=0.75)
        assert strengths_of(own) == now | {"0.weight": (0.75, 0.125, 0), "0.bias": (0.75, 0.125, 0)}
        regularized(copied[0], l2=8.0)
        assert strengths_of(own) == now | {"0.weight": (0, 8, 0), "0.bias": (0, 0.125, 0)}


def test_a_mark_of_another_process(monkeypatch):
    """What is set here is later than what was said there."""
    net = make_net()
    regularized(net[0], l1=1.0)
    regularizer = Regularizer(net)
    regularizer.set_strength(l1=0.5)
    file = pickle.dumps((net, regularizer))
    monkeypatch.setattr("fused_reg.regularizer.marks.count", 0)
    net, regularizer = pickle.loads(file)
    regularized(net[0], l1=2.0)
    assert strengths_of(regularizer) == {"0.weight": (2, 0, 0)}
