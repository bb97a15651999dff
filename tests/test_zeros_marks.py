"""``zeros`` of a mark by `regularized`: the weights in the module reach it together."""

import copy
import pickle

import pytest
import torch
from test_zeros_aim import zeros_in
from torch import nn

from fused_reg import Regularizer, regularized
from fused_reg.schedules import CubicRamp, PatternRamp


def layers(count=3):
    """The weights of each are larger than those before."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(count)))
    for i, p in enumerate(model.parameters()):
        nn.init.uniform_(p, i + 1, i + 2)
    return model


def reached(model, **given):
    Regularizer(model, **given).prox_(0.0)
    return [(zeros_in([layer.weight]), zeros_in([layer.bias])) for layer in model.modules() if hasattr(layer, "bias")]


@pytest.mark.parametrize("through", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_each_mark_has_a_pool_of_its_own(through):
    model = layers()
    regularized(model[0], zeros=0.5)
    regularized(model[1], zeros=0.5, bias=True)
    regularized(model[2], l1=0.1, bias={"zeros": 0.3})
    assert reached(through(model)) == [(50, 0), (55, 0), (0, 3)]


def test_copies_of_a_module_each_reach_it():
    layer = regularized(nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10)), zeros=0.5)
    model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(2)))
    for i, p in enumerate(model.parameters()):
        nn.init.uniform_(p, i + 1, i + 2)
    assert reached(model) == [(100, 0), (0, 0), (100, 0), (0, 0)]


def test_the_innermost_and_the_arguments_and_rules():
    model = regularized(layers(), zeros=0.3)
    regularized(model[1], zeros=0.0)
    assert reached(model, zeros=0.5) == [(60, 10), (0, 5), (0, 0)]  # of the biases the arguments speak
    model = regularized(layers(), zeros=0.3)
    assert reached(model, rules=[("1.*", {"l2": 0.0}), ("2.*", {"zeros": 0.5})]) == [(60, 0), (0, 0), (55, 0)]


def test_groups():
    model = layers(1)
    regularized(model[0], zeros=0.3, group="output")
    regularizer = Regularizer(model)
    regularizer.prox_(0.0)
    assert (model[0].weight == 0).all(1).sum() == 3
    assert regularizer.report()["group 0"]["zeros_reached"] == 0.3


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"zeros": 0.5}, "zeros=0.5"),
        ({"l1": 0.25, "zeros": "2:4"}, 'l1=0.25, zeros="2:4"'),
        ({"zeros": CubicRamp(0, 0.5, 9), "group": "row"}, 'zeros: CubicRamp, group="row"'),
        ({"l2": 0.5, "bias": {"zeros": PatternRamp("2:4", 9)}}, "l2=0.5, bias: zeros: PatternRamp"),
    ],
)
def test_print_shows_it(given, shown):
    assert repr(regularized(nn.Linear(4, 4), **given)).startswith(f"Linear[{shown}](")


def test_a_tied_weight():
    model = layers(2)
    model[1].weight = model[0].weight
    regularized(model[0], zeros=0.5)
    regularized(model[1], zeros=0.5)
    assert reached(model) == [(50, 0), (50, 0)]
    regularized(model[1], zeros=0.4)
    with pytest.raises(ValueError, match="a tied parameter must have one mark"):
        Regularizer(model)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zeros": 1.5}, "zeros must be a share from 0 to below 1, got 1.5"),
        ({"l1": 0.5, "bias": {"zeros": "0.5"}}, "bias: zeros must be \"n:m\" .* got '0.5'"),
        ({"l1": 0.5, "group": "row"}, 'group="row" must come with l2_norm'),
        ({"zeros": None}, "must give a strength, got none"),
    ],
)
def test_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=f"^regularized: .*{message}"):
        regularized(nn.Linear(2, 2), **given)


def test_what_a_parameter_cannot_have():
    model = layers(1)
    regularized(model[0], zeros="2:4")
    with pytest.raises(ValueError, match=r"^Regularizer: zeros of '0.weight': the rows must have a multiple of 4"):
        Regularizer(model)
    regularized(model[0], zeros=0.5)
    with pytest.raises(ValueError, match="zeros must be reached by proximal steps"):
        Regularizer(model)()
