"""What does not go with ``together`` and ``group_weights`` of tensors: one sentence, before anything is written."""

import math
import re

import pytest
import torch
from oracle import assert_same_bits
from test_together import NEURONS, RULES, make_net
from torch import nn

from fused_reg import NORMS, Regularizer, optim, regularized

ALL = {"l2_norm": 0.3, "group": "output"}
TWO = [NEURONS]


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"together": "rows"}, "together must be \"bias\", a type of layers or lists of names, as *, got 'rows'"),
        ({"together": [*NEURONS]}, "together must be \"bias\", a type of layers or lists *, got '4.weight'"),
        ({"together": nn.Linear(2, 2)}, 'together must be "bias", a type of layers *, got Linear(*'),
        ({"together": 3}, 'together must be "bias", a type of layers or lists of names, as *, got 3'),
        ({"together": [(1, 2)]}, 'together must be "bias", a type of layers or lists of names, as *, got (1, 2)'),
        ({"together": []}, "together must have a set, got an empty list; leave it out for none"),
        ({"together": {}}, "together must have a set, got an empty dict; leave it out for none"),
        ({"together": [("4.weight", "5.bias")]}, "together must match the name of a parameter, got '5.bias'*"),
        ({"together": [("4.weight",)]}, "together must name two parameters or more, got ['4.weight']"),
        (
            {"together": TWO, "weights_only": True},
            "together must name what is regularized, got '4.bias', which is left out",
        ),
        (
            {"together": "bias", "weights_only": True},
            "together must find weights with biases, where both have l2_norm, got none",
        ),
        (
            {"together": nn.LayerNorm},
            "together must find weights with layers of LayerNorm that follow in a Sequential, where *, got none",
        ),
        ({"together": [NEURONS, ("0.bias", "4.bias")]}, "together must have each parameter once, got '4.bias' twice"),
        ({"together": [("4.*", "4.bias")]}, "together must have each parameter once, got '4.bias' twice"),
        ({"together": ["bias", NEURONS]}, "together must have each parameter once, got '4.weight' twice"),
        (
            {"together": [("0.weight", "4.bias")]},
            "together must be of parameters with as many groups each, got 4 of '0.weight' and 5 of '4.bias'",
        ),
        (
            {"together": TWO, "rules": [("4.bias", {"group": "tensor"})]},
            "together must be of parameters with groups of one kind, got group=\"row\" of '4.weight' and "
            "group=\"tensor\" of '4.bias'",
        ),
        (
            {"together": TWO, "rules": [("4.bias", {"l2_norm": 0.2})]},
            "together must be of parameters with one l2_norm, got 0.3 of '4.weight' and 0.2 of '4.bias'",
        ),
        (
            {"together": TWO, "rules": [("4.bias", {"l2_norm": torch.tensor(0.3)})]},
            "together must be of parameters with one l2_norm, got 0.3 of '4.weight' and a Tensor of '4.bias'",
        ),
        (
            {"together": TWO, "rules": [("4.bias", {"l2_norm": 0.0, "l1": 0.1})]},
            "together must name parameters with l2_norm, got '4.bias' without",
        ),
        ({"together": TWO, "max_norm": 1.0}, "together must come without max_norm, got both for '4.weight'"),
        ({"together": TWO, "toward": "start"}, "together must come without toward, got both for '4.weight'"),
        (
            {"together": TWO, "importance": {"4.bias": torch.ones(5).double()}},
            "together must come without importance, got both for '4.bias'",
        ),
        ({"together": TWO, "zeros": 0.5}, "together must come without zeros of groups, got both for '4.weight'"),
        ({"group_weights": {"4.bia": torch.ones(5)}}, "group_weights must name parameters with l2_norm, got '4.bia'"),
        (
            {"group_weights": {"4.bias": torch.ones(5)}, "exclude": "4.bias"},
            "group_weights must name parameters with l2_norm, got '4.bias'",
        ),
        ({"group_weights": [torch.ones(4)]}, "group_weights must have one tensor per parameter (6), got 1"),
        ({"group_weights": torch.ones(4)}, "group_weights must be a state dict or a list of tensors, got Tensor"),
        ({"group_weights": {"4.bias": 2.0}}, "group_weights['4.bias'] must be a tensor, got float"),
        (
            {"group_weights": {"4.bias": torch.ones(4)}},
            "group_weights['4.bias'] must have a floating point number for each of 5 groups, got torch.float32 of "
            "shape (4,)",
        ),
        (
            {"group_weights": {"4.bias": torch.ones(5).long()}},
            "group_weights['4.bias'] must have a floating point number for each of 5 groups, got torch.int64 of "
            "shape (5,)",
        ),
        ({"group_weights": {"4.bias": -torch.ones(5)}}, "group_weights['4.bias'] must be finite and >= 0, got -1.0"),
        (
            {"group_weights": {"4.bias": torch.full((5,), math.nan)}},
            "group_weights['4.bias'] must be finite and >= 0, got nan",
        ),
        (
            {"group_weights": {"4.bias": torch.full((5,), math.inf)}},
            "group_weights['4.bias'] must be finite and >= 0, got inf",
        ),
        (
            {"group_weights": {"4.bias": torch.ones(5, requires_grad=True)}},
            "group_weights['4.bias'] must be a constant, got a tensor that requires grad; use `.detach()`",
        ),
        (
            {"group_weights": {"4.bias": torch.ones(5, device="meta")}},
            "group_weights['4.bias'] must be on the device of its parameter (cpu), got meta",
        ),
        (
            {"together": TWO, "group_weights": dict.fromkeys(NEURONS, torch.ones(5))},
            "group_weights['4.bias'] must be of one name for all with which it has groups, got several",
        ),
        (
            {"group_weights": {"4.bias": torch.ones(5)}, "max_norm": 1.0},
            "group_weights['4.bias'] must come without max_norm, got both for '4.bias'",
        ),
        (
            {"group_weights": {"4.bias": torch.ones(5)}, "toward": "start"},
            "group_weights['4.bias'] must come without toward, got both for '4.bias'",
        ),
        (
            {"group_weights": {"4.bias": torch.ones(5)}, "zeros": 0.5},
            "group_weights['4.bias'] must come without zeros of groups, got both for '4.bias'",
        ),
    ],
)
def test_arguments(given, message):
    pattern = re.escape(f"Regularizer: {message}").replace(r"\*", ".*")
    assert re.fullmatch(pattern, error_of(Regularizer, make_net(), **{**ALL, **given}), re.DOTALL)


def test_a_list_has_no_layers():
    named = [*make_net().named_parameters()]
    assert error_of(Regularizer, named, l2_norm=0.3, group="row", together=NORMS) == (
        "Regularizer: together=NORMS needs the layers, got a list of tensors; pass the model"
    )
    assert Regularizer(named, l2_norm=0.3, group="row", together="bias")() > 0  # names do


def test_channels_of_a_convolution_with_groups():
    layer = nn.Conv2d(4, 4, 3, groups=2)
    assert error_of(Regularizer, layer, l2_norm=0.3, group="input", together="bias") == (
        "Regularizer: together must come without channels of a convolution with groups=2, got 'weight'"
    )


def test_other_devices():
    named = [("w", nn.Parameter(torch.ones(3, 2))), ("b", nn.Parameter(torch.ones(3, device="meta")))]
    assert error_of(Regularizer, named, l2_norm=0.3, group="row", together=[("w", "b")]) == (
        "Regularizer: params['b'] must be on the device of params['w'], because their groups are one, got meta"
    )


def test_two_weights_of_one_bias():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].bias = net[0].bias
    assert error_of(Regularizer, net, l2_norm=0.3, group="row", together="bias") == (
        "Regularizer: together must have each parameter once, got '0.bias' twice"
    )


def state_of(net, regularizer):
    return [p.detach().clone() for p in net.parameters()], regularizer.state_dict()


def test_strengths_that_do_not_fit():
    net = make_net()
    regularizer = Regularizer(net, **ALL, together=TWO, group_weights={"0.bias": torch.ones(4)})
    before = state_of(net, regularizer)
    assert error_of(regularizer.set_strength, l2_norm=0.5, where="4.weight") == (
        "set_strength: where must mean all whose groups are one, got '4.weight' without '4.bias'"
    )
    assert error_of(regularizer.set_strength, max_norm=0.5, where="4.*") == (
        "set_strength: max_norm must come without together, got '4.weight'"
    )
    assert error_of(regularizer.set_strength, max_norm=0.5, where="0.*") == (
        "set_strength: max_norm must come without group_weights of tensors, got '0.bias'"
    )
    state = regularizer.state_dict()
    state["groups"] = [{**group, "max_norm": 1.0} for group in state["groups"]]
    assert error_of(regularizer.load_state_dict, state) == (
        "load_state_dict: max_norm of '0.bias' must come without group_weights of tensors"
    )
    assert state_of(net, regularizer)[1] == before[1]
    regularizer.set_strength(l2_norm=0.0)
    assert "max_norm must come without together" in error_of(regularizer.set_strength, max_norm=0.5, where="4.*")
    regularizer.set_strength(l2_norm=0.5, where="4.*")
    regularizer.set_strength(max_norm=0.5, where="1.*")
    some = Regularizer(net, together=TWO, group="row", rules=[("4.*", {"l2_norm": 0.3}), ("0.bias", {"l1": 0.1})])
    assert error_of(some.set_strength, l2_norm=0.5, where="*") == (
        "set_strength: l2_norm must be of parameters that have one, where together says whose groups are one, got "
        "'0.bias' without"
    )


def test_steps_that_do_not_fit():
    """Another learning rate, or another l2, has no closed form; gradients have one."""
    net = make_net()
    regularizer = Regularizer(net, **ALL, together=TWO, rules=[("4.bias", {"l2": 0.1})])
    before = state_of(net, regularizer)
    message = "l2 of '4.bias' must be that of '4.weight' in a proximal step, because their groups are one"
    assert error_of(regularizer.prox_, 0.1) == f"prox_: {message}"
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    assert error_of(regularizer.attach, sgd, mode="prox") == f"attach: {message}"
    assert regularizer.accumulate_grad_() > 0
    assert_same_bits([p.detach() for p in net.parameters()], before[0])

    regularizer = Regularizer(net, **ALL, together=TWO)
    rest = [p for p in net.parameters() if p is not net[4].bias]
    for make in (torch.optim.SGD, optim.SGD):
        optimizer = make([{"params": rest}, {"params": [net[4].bias], "lr": 0.2}], lr=0.1)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        assert error_of(regularizer.attach, optimizer, mode="prox") == (
            "attach: the learning rate of '4.bias' must be that of '4.weight' in a proximal step, because their groups "
            "are one"
        )
        assert_same_bits([p.detach() for p in net.parameters()], before[0])


def test_optimizers_that_do_not_fit():
    net = make_net()
    regularizer = Regularizer(net, **ALL, together=RULES)
    rest = [p for p in net.parameters() if p is not net[4].bias]
    assert error_of(regularizer.attach, torch.optim.SGD(rest, lr=0.1)) == (
        "attach: optimizer must hold all parameters whose groups are one, got '4.weight' without '4.bias'"
    )
    net[4].bias.requires_grad_(False)
    regularizer.attach(torch.optim.SGD(rest, lr=0.1)).remove()
    net[4].bias.requires_grad_(True)
    groups = [{"params": rest}, {"params": [net[4].bias], "maximize": True}]
    assert error_of(regularizer.attach, torch.optim.SGD(groups, lr=0.1)) == (
        "attach: '4.weight' and '4.bias', whose groups are one, must both be maximized, or none of them"
    )
    message = 'attach: mode "preconditioned" must have no term but l1 and l2, got l2_norm of '
    assert error_of(regularizer.attach, optim.SGD(net.parameters(), lr=0.1), mode="preconditioned").startswith(message)


def test_sparse_gradients():
    for given, what in (
        ({"together": [("weight", "scale")]}, "together"),
        ({"group_weights": {"weight": torch.ones(6)}}, "group_weights of tensors"),
    ):
        net = nn.Embedding(6, 3, sparse=True)
        net.scale = nn.Parameter(torch.ones(6))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        Regularizer(net, l2_norm=0.3, group="row", **given).attach(optimizer, lazy_rows=True)
        net(torch.tensor([1, 2])).sum().backward()
        assert error_of(optimizer.step) == (
            f"attach: lazy_rows must come without {what}, got both for the sparse gradient of 'weight'"
        )


def test_errors_write_nothing():
    """Also of the call of what has no sets, which comes first."""
    net = make_net()
    regularizer = Regularizer(net, **ALL, together=TWO)
    net[4].bias.data = net[4].weight.data[:, 0].contiguous()
    net[4].weight.data = net[4].bias.data[:, None].expand(5, 16)
    before = [p.detach().clone() for p in net.parameters()]
    message = "must have memory for each of its elements"
    assert message in error_of(regularizer.prox_, 0.1)
    assert_same_bits([p.detach() for p in net.parameters()], before)
    net[4].weight.data = torch.ones(5, 16).double()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net[4].weight.grad = torch.ones(5, 16).double().to_sparse()
    assert error_of(regularizer.accumulate_grad_).startswith("accumulate_grad_: params['4.weight'].grad must be dense")
    assert all((p.grad == 1).all() for p in net.parameters() if p is not net[4].weight)


def test_weights_that_turn_wrong():
    """They are kept, not copied, and looked at again when they were written to."""
    net = make_net()
    weights = torch.ones(5)
    regularizer = Regularizer(net, **ALL, group_weights={"4.weight": weights})
    before = state_of(net, regularizer)
    weights[3] = -1
    for call in (regularizer, regularizer.accumulate_grad_, lambda: regularizer.prox_(0.1)):
        assert error_of(call) == "Regularizer: group_weights['4.weight'] must be finite and >= 0, got -1.0"
    assert_same_bits([p.detach() for p in net.parameters()], before[0])
    assert all(p.grad is None for p in net.parameters())


def test_a_mark_and_a_rule_differ():
    net = nn.Sequential(regularized(nn.Linear(4, 3), l2_norm=0.3, group="row", bias={"l1": 0.1})).double()
    assert "together must find weights with biases" in error_of(Regularizer, net, together="bias")
