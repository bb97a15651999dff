"""``group_weights="sqrt_size"``: the strength of the norms of each parameter, multiplied by the root of the size of its
groups."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

from fused_reg import Regularizer, optim, reference
from fused_reg.schedules import LinearRamp

SIZES = {"0.weight": 4 * 9, "1.weight": 3, "2.weight": 2 * 5}  # of the groups of `make_net`


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, bias=False), nn.Linear(3, 5, bias=False), nn.Linear(5, 4, bias=False)
    ).double()


def regularizer_of(net, l2_norm, **given):
    rules = [("2.*", {"group": ("row", 2)})]
    return Regularizer(net, l2_norm=l2_norm, group="output", group_weights="sqrt_size", rules=rules, **given)


def strengths_of(regularizer):
    return {row["name"]: row["l2_norm"] for row in regularizer.report().rows if row["level"] == "parameter"}


def expected_strengths(l2_norm):
    return pytest.approx({name: l2_norm * math.sqrt(size) for name, size in SIZES.items()}, rel=1e-12)


def penalty_of(net, l2_norm):
    norms = [net[0].weight.flatten(1).norm(dim=1), net[1].weight.norm(dim=1), net[2].weight.reshape(2, -1).norm(dim=1)]
    return l2_norm * sum(math.sqrt(size) * own.sum() for size, own in zip(SIZES.values(), norms, strict=True))


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_values_gradients_and_reports():
    net = make_net()
    regularizer = regularizer_of(net, 0.3)
    value, expected = regularizer(), penalty_of(net, 0.3)
    assert_near(value.detach(), expected.detach())
    assert_near(torch.autograd.grad(value, [*net.parameters()]), torch.autograd.grad(expected, [*net.parameters()]))
    assert regularizer.report().total["value"] == pytest.approx(expected.item(), rel=1e-12)
    assert strengths_of(regularizer) == expected_strengths(0.3)


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
def test_attached(make):
    net, other = make_net(), make_net()
    optimizer = make(net.parameters(), lr=0.1)
    regularizer_of(net, 0.3).attach(optimizer, mode="prox")
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    groups = ("row", "row", ("row", 2))
    for p, size, group in zip(other.parameters(), SIZES.values(), groups, strict=True):
        reference.prox_([p], l2_norm=0.3 * math.sqrt(size), group=group, step=0.1)
    assert_near([p.detach() for p in net.parameters()], [p.detach() for p in other.parameters()])


@pytest.mark.parametrize("schedule", [lambda step: 0.1 * step, LinearRamp(0.0, 1.0, 10)])
def test_schedules(schedule):
    net = make_net()
    regularizer = regularizer_of(net, schedule)
    regularizer.advance()
    regularizer.advance()
    assert strengths_of(regularizer) == expected_strengths(0.2)
    again = regularizer_of(net, schedule)
    again.load_state_dict(regularizer.state_dict())
    assert strengths_of(again) == expected_strengths(0.2)
    again.advance()
    assert strengths_of(again) == expected_strengths(schedule(3))
    if isinstance(schedule, LinearRamp):
        net, again = pickle.loads(pickle.dumps((net, again)))
        again.advance()
        assert strengths_of(again) == expected_strengths(0.4)


def test_strengths_that_change():
    net = make_net()
    regularizer = regularizer_of(net, 0.3, l1=0.1)
    regularizer.set_strength(l2_norm=0.5)
    assert strengths_of(regularizer) == expected_strengths(0.5)
    regularizer.set_strength(l2_norm=LinearRamp(1.0, 2.0, 10))
    regularizer.advance()
    assert strengths_of(regularizer) == expected_strengths(1.1)
    net, regularizer = copy.deepcopy((net, regularizer))
    regularizer.set_strength(l2_norm=0.7)
    assert strengths_of(regularizer) == expected_strengths(0.7)
    assert {row["l1"] for row in regularizer.report().rows if row["level"] == "parameter"} == {0.1}


def test_a_layer_of_another_size():
    net = make_net()
    regularizer = regularizer_of(net, 0.3)
    net[1] = nn.Linear(7, 5, bias=False)
    with pytest.warns(UserWarning, match="it follows its module"):
        assert strengths_of(regularizer)["1.weight"] == pytest.approx(0.3 * math.sqrt(7))


def test_configuration():
    net = make_net()
    regularizer = regularizer_of(net, 0.3)
    again = Regularizer.from_config(regularizer.get_config(), net)
    assert again.state_dict() == regularizer.state_dict()
    assert strengths_of(Regularizer(net, l2_norm=0.3, group="output"))["0.weight"] == 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"l2_norm": 0.1, "group_weights": "sqrt"}, "group_weights must be None, \"sqrt_size\" or tensors, got 'sqrt'"),
        (
            {"l1": 0.1, "group_weights": "sqrt_size"},
            "group_weights must come with l2_norm, whose groups it weighs, got none",
        ),
        (
            {"l2_norm": torch.tensor(0.1), "group_weights": "sqrt_size"},
            "l2_norm of '0.weight' must be a number or a schedule with group_weights, got a tensor",
        ),
    ],
)
def test_bad_input(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(f'Regularizer: {message}')}$"):
        Regularizer(make_net(), **given)
