"""`Regularizer`: which parameters, with which strengths. "Recurring bug": one that users of other code report."""

import copy

import pytest
import torch
from oracle import assert_same_bits, loop_gradients
from samples import draw
from torch import nn

from fused_reg import Regularizer, reference, regularized


def make_net(device="cpu") -> nn.Sequential:
    net = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Conv1d(1, 3, 3), nn.Linear(3, 2)).to(device)
    for i, p in enumerate(net.parameters()):
        p.data.copy_(draw(p.shape, device=device, seed=i))
    return net


def names_of(regularizer: Regularizer) -> list[str]:
    return [row["name"] for row in regularizer.report().rows if row["level"] == "parameter"]


def strengths_of(regularizer: Regularizer) -> dict[str, tuple[float, float, float]]:
    rows = [row for row in regularizer.report().rows if row["level"] == "parameter"]
    return {row["name"]: (row["l1"], row["l2"], row["l2_norm"]) for row in rows}


def assert_penalty(regularizer: Regularizer, params, **strengths) -> None:
    """Value and gradient are those of the reference over these parameters, and no other has a gradient."""
    expected = reference.fused_penalty(params, **strengths)
    value = regularizer()
    torch.testing.assert_close(value, expected, rtol=2e-7, atol=0)
    grads = torch.autograd.grad(value, params)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, params), rtol=1e-6, atol=1e-7)


def test_module(device):
    net = make_net(device)
    regularizer = Regularizer(net, l1=0.1, l2=1 / 3)
    assert_penalty(regularizer, list(net.parameters()), l1=0.1, l2=1 / 3)
    (0.37 * regularizer()).backward()
    expected = loop_gradients([p.detach() for p in net.parameters()], 0.37, l1=0.1, l2=1 / 3)
    assert_same_bits([p.grad for p in net.parameters()], expected)


@pytest.mark.parametrize("form", [nn.Module.parameters, nn.Module.named_parameters])
def test_a_generator_is_read_once_and_kept(form):
    """Recurring bug: a stored generator is empty after the first batch, and the penalty 0."""
    net = make_net()
    regularizer = Regularizer(form(net), l2=0.5)
    for _ in range(3):
        assert_penalty(regularizer, list(net.parameters()), l2=0.5)
    names = [name for name, _ in net.named_parameters()]
    assert names_of(regularizer) == (names if form is nn.Module.named_parameters else [str(i) for i in range(8)])


def test_an_empty_generator_is_an_error():
    params = make_net().parameters()
    list(params)
    with pytest.raises(ValueError, match=r"Regularizer: params must hold a parameter, got none; a generator"):
        Regularizer(params, l2=0.5)


def test_tied_parameters_count_once():
    """Recurring bug, and hard case 8."""
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    net["head"].weight = net["embed"].weight
    for params in (net, list(net.parameters()) * 2, [("a", net["embed"].weight), ("b", net["head"].weight)]):
        regularizer = Regularizer(params, l2=0.5, weights_only=True)
        assert_penalty(regularizer, [net["embed"].weight], l2=0.5)
    assert names_of(Regularizer(net, l2=0.5)) == ["embed.weight", "head.bias"]


def test_a_tied_parameter_has_the_names_of_all_its_places():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    net["head"].weight = net["embed"].weight
    assert names_of(Regularizer(net, l2=0.5, include="head.weight")) == ["embed.weight"]
    assert names_of(Regularizer(net, l2=0.5, exclude="head.weight")) == ["head.bias"]
    regularized(net["head"], l1=1.0)
    assert names_of(Regularizer(net)) == ["embed.weight"]


def test_weights_only():
    """Recurring bug: biases and normalization layers penalized by accident."""
    net = nn.ModuleList([make_net(), nn.LSTM(3, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)])
    names = names_of(Regularizer(net, l2=0.5, weights_only=True))
    assert names == [
        *("0.0.weight", "0.2.weight", "0.3.weight"),
        *("1.weight_ih_l0", "1.weight_hh_l0"),
        *("2.in_proj_weight", "2.out_proj.weight"),  # bias_k has three dimensions
    ]


def test_include_and_exclude():
    net = make_net()
    assert names_of(Regularizer(net, l1=1.0, include="*.weight", exclude=["1.*", "3.*"])) == ["0.weight", "2.weight"]
    assert names_of(Regularizer(net, l1=1.0, include=("0.*", "3.bias"))) == ["0.weight", "0.bias", "3.bias"]
    assert names_of(Regularizer(net.parameters(), l1=1.0, include="[0-2]")) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("include", {"include": ["0.*", "0.wieght"]}),
        ("exclude", {"exclude": "0.wieght"}),
        ("rules", {"rules": [("*", {"l1": 1.0}), ("0.wieght", {"l2": 1.0})]}),
    ],
)
def test_a_pattern_that_matches_nothing(argument, given):
    with pytest.raises(
        ValueError,
        match=rf"^Regularizer: {argument} must match the name .*, got '0.wieght'; did you mean '0.weight'\?$",
    ):
        Regularizer(make_net(), l2=0.5, **given)


def test_rules_marks_and_arguments():
    """The first rule that matches; what it does not name is of the innermost mark, else of the arguments."""
    net = make_net()
    regularized(net[3], l1=0.5)
    rules = [("0.weight", {"l2": 0.25}), ("0.*", {"l2_norm": 0.75}), ("3.bias", {"l1": 0, "l2": 1})]
    assert strengths_of(Regularizer(net, l1=0.125, rules=rules)) == {
        "0.weight": (0.125, 0.25, 0),
        "0.bias": (0.125, 0, 0.75),
        "1.weight": (0.125, 0, 0),
        "1.bias": (0.125, 0, 0),
        "2.weight": (0.125, 0, 0),
        "2.bias": (0.125, 0, 0),
        "3.weight": (0.5, 0, 0),
        "3.bias": (0, 1, 0),
    }
    assert list(strengths_of(Regularizer(net, rules=rules))) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_mixed_strengths_and_groups(device):
    net = make_net(device)
    params = list(net.parameters())
    rules = [
        ("0.weight", {"l1": 0.1, "l2": 0, "l2_norm": 0.3, "group": "row"}),
        ("1.*", {"l2": 0.2}),
        ("2.*", {"l2": 0, "l2_norm": 0.4}),
        ("3.*", {"l2": 0.0}),
    ]
    regularizer = Regularizer(net, l2=0.7, rules=rules)
    row, rest = params[:1], [params[i] for i in (1, 2, 3, 4, 5)]
    expected = reference.fused_penalty(row, l1=0.1, l2_norm=0.3, group="row") + reference.fused_penalty(
        rest, l2=[0.7, 0.2, 0.2, 0.0, 0.0], l2_norm=[0.0, 0.0, 0.0, 0.4, 0.4]
    )
    torch.testing.assert_close(regularizer(), expected, rtol=3e-7, atol=0)
    expected_grads = torch.autograd.grad(expected, row + rest)
    torch.testing.assert_close(torch.autograd.grad(regularizer(), row + rest), expected_grads, rtol=1e-6, atol=1e-7)

    value = regularizer.accumulate_grad_(scale=0.5)
    torch.testing.assert_close(value, expected.detach(), rtol=3e-7, atol=0)
    halves = [0.5 * g for g in expected_grads]
    torch.testing.assert_close([p.grad for p in row + rest], halves, rtol=1e-6, atol=1e-7)
    assert params[6].grad is None  # its strength is 0: not even read
    assert params[7].grad is None

    before = [p.detach().clone() for p in params]
    regularizer.prox_(0.25)
    reference.prox_(before[:1], l1=0.1, l2_norm=0.3, group="row", step=0.25)
    reference.prox_(before[1:6], l2=[0.7, 0.2, 0.2, 0, 0], l2_norm=[0, 0, 0, 0.4, 0.4], step=0.25)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=1e-6, atol=1e-7)


def test_frozen_parameters_are_left_out_as_long_as_they_are():
    net = make_net()
    params = list(net.parameters())
    params[0].requires_grad_(False)
    regularizer = Regularizer(net, l1=0.5)
    assert_penalty(regularizer, params[1:], l1=0.5)
    params[0].requires_grad_()
    params[3].requires_grad_(False)
    assert_penalty(regularizer, params[:3] + params[4:], l1=0.5)
    before = params[3].clone()
    regularizer.accumulate_grad_()
    regularizer.prox_(0.1)
    assert params[3].grad is None
    assert_same_bits([params[3]], [before])
    net.requires_grad_(False)
    assert regularizer().item() == 0


def test_frozen_integers_in_a_module_are_no_matter():
    """As the layers of a quantized model under an adapter."""
    net = make_net()
    net[0].weight = nn.Parameter(torch.ones(5, 7, dtype=torch.int8), requires_grad=False)
    assert names_of(Regularizer(net, l1=0.5))[0] == "0.bias"


def test_names_through_wrappers():
    net = make_net()
    expected = [name for name, _ in net.named_parameters()]
    wrapped = nn.DataParallel(torch.compile(net, backend="eager"))
    assert next(wrapped.named_parameters())[0] == "module._orig_mod.0.weight"
    assert names_of(Regularizer(wrapped, l1=1.0)) == expected
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(net, backend="eager"))
    assert names_of(Regularizer(averaged, l1=1.0)) == expected
    own = nn.ModuleDict({"module": net})
    assert names_of(Regularizer(own, l1=1.0)) == [f"module.{name}" for name in expected]


def test_deepcopy_and_pickle(tmp_path):
    net = make_net()
    regularizer = Regularizer(net, l1=HALVED, rules=[("3.*", {"l1": 0, "l2": torch.tensor(0.25)})])
    regularizer.advance()
    torch.save((net, regularizer), tmp_path / "both.pt")
    for other, copied in (copy.deepcopy((net, regularizer)), torch.load(tmp_path / "both.pt", weights_only=False)):
        assert repr(copied) == repr(regularizer)
        with torch.no_grad():
            other[0].weight.zero_()
        own = list(other.parameters())
        assert_penalty(copied, own, l1=[0.5] * 6 + [0, 0], l2=[0] * 6 + [0.25] * 2)
        copied.advance()
        copied.set_strength(l2=0.125, where="3.*")
        assert_penalty(copied, own, l1=[0.25] * 6 + [0, 0], l2=[0] * 6 + [0.125] * 2)
    assert_penalty(regularizer, list(net.parameters()), l1=[0.5] * 6 + [0, 0], l2=[0] * 6 + [0.25] * 2)


class Halved:
    """A schedule that can be pickled, as functions of a module can."""

    def __call__(self, step: int) -> float:
        return 0.5**step


HALVED = Halved()


def test_config():
    config = Regularizer(
        make_net(), l1=HALVED, weights_only=True, exclude="1.*", rules=iter([("0.*", {"l1": 0, "l2": 0.5})])
    ).get_config()
    net = make_net()
    again = Regularizer.from_config(config, net)
    assert repr(again) == repr(Regularizer.from_config(again.get_config(), net))
    assert strengths_of(again) == {"0.weight": (0, 0.5, 0), "2.weight": (1, 0, 0), "3.weight": (1, 0, 0)}
    assert config["l1"] is HALVED


RULE = {"l1": 0, "l2": 0, "l2_norm": 1e-3, "group": "row"}


def test_repr():
    regularizer = Regularizer(make_net(), l1=HALVED, l2=0.5, rules=[("0.*", RULE)])
    assert repr(regularizer) == (
        "Regularizer(\n"
        '  l2_norm=0.001, group="row": 2 parameters, 40 elements: 0.weight, 0.bias\n'
        "  l1=1 (schedule), l2=0.5: 6 parameters, 30 elements: 1.weight, 1.bias, 2.weight, ...\n"
        ")"
    )
