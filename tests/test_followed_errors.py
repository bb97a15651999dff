"""What a followed module has become may be wrong: every use says so, and writes nothing."""

import pytest
import torch
from torch import nn

from fused_reg import Regularizer
from fused_reg.schedules import LinearRamp


def _grown(net, optimizer):
    net[1] = nn.Linear(6, 10)
    optimizer.add_param_group({"params": net[1].parameters()})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"l2": 1.0, "toward": lambda net: {k: v.clone() for k, v in net.state_dict().items()}}, "toward"),
        ({"l2_norm": 1.0, "group": "row", "group_weights": lambda net: {"1.weight": torch.ones(5)}}, "group_weights"),
    ],
)
def test_every_use_raises(given, match):
    """Not the first alone, after which the old parameters would have the penalty."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    given = {name: x(net) if callable(x) else x for name, x in given.items()}
    regularizer = Regularizer(net, weights_only=True, **given)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    _grown(net, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(3):
        for use in (regularizer, optimizer.step, lambda: regularizer.prox_(0.1), regularizer.report):
            with pytest.raises(ValueError, match=match):
                use()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("rows", [3, 9])
def test_weights_of_a_parameter_that_was_resized(rows):
    """They would be those of other groups."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    weights = {"0.weight": torch.arange(6.0), "1.weight": torch.arange(5.0)}
    regularizer = Regularizer(net, l2_norm=0.5, group="row", weights_only=True, group_weights=weights)
    net[0].weight.data = torch.ones(rows, 4)
    before = net[1].weight.detach().clone()
    for use in (regularizer, lambda: regularizer.prox_(0.1), regularizer.accumulate_grad_, regularizer.report):
        with pytest.raises(ValueError, match=rf"group_weights\['0\.weight'\] must have .* each of {rows} groups"):
            use()
    assert torch.equal(net[1].weight, before)
    assert net[1].weight.grad is None


@pytest.mark.parametrize("shape", [(4, 10), (6, 2, 3), (8,)])
def test_a_pattern_of_a_parameter_that_was_resized(shape):
    """Hard case 44: its runs would go over the ends of rows. A shape that has such runs is followed."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(8, 4, bias=False))
    regularizer = Regularizer(net, l1=0.1, zeros="2:4")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer.attach(optimizer, mode="prox")
    net[1].weight.data = torch.randn(shape)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for use in (optimizer.step, lambda: regularizer.prox_(0.1), optimizer.step):
        with pytest.raises(ValueError, match=r"zeros of '1.weight': the rows must have a multiple of 4 .* got shape"):
            use()
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
    net[1].weight.data = torch.randn(6, 12)
    net[1].weight.grad = torch.zeros(6, 12)
    optimizer.step()
    assert (net[1].weight.view(-1, 4) == 0).sum(1).min() == 2


@pytest.mark.parametrize(
    ("group", "said"),
    [(("row", 2), "2 rows"), (("column", 2), "2 columns"), (("block", 4), "4 elements")],
    ids=str,
)
def test_groups_of_zeros_of_a_parameter_that_was_resized(group, said):
    """Hard case 44: what its groups do not fill. A shape that they fill is followed."""
    net = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False))
    regularizer = Regularizer(net, l1=0.1, zeros=0.5, group=group)
    net[1].weight.data = torch.randn(5, 3)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"params\['1.weight'\] must have a multiple of {said}, to have group="):
            regularizer.prox_(0.1)
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)
    net[1].weight.data = torch.randn(6, 8)
    regularizer.prox_(0.1)
    assert regularizer.report()["group 0"]["zeros_reached"] == 0.5


def test_rates_of_a_set():
    """Groups that are one have one rate in a proximal step: `attach` and every step say so, and nothing is written."""
    layer = nn.Linear(4, 6)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.1}])
    regularizer = Regularizer(layer, l2_norm=0.1, group="row", together="bias")
    regularizer.attach(optimizer, mode="prox")
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before = layer.weight.detach().clone()
    optimizer.param_groups[1]["lr"] = 0.01
    match = "the learning rate of 'bias' must be that of 'weight' in a proximal step"
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            optimizer.step()
    assert torch.equal(layer.weight, before)
    other = torch.optim.SGD(optimizer.param_groups)
    with pytest.raises(ValueError, match=match):
        Regularizer(layer, l2_norm=0.1, group="row", together="bias").attach(other, mode="prox")


def test_weights_by_sizes_follow_a_parameter_that_was_resized():
    """The root of the size is that of now, as if the Regularizer were new; also of a list, and of a schedule."""
    for strength in (0.5, LinearRamp(0.5, 1.0, steps=2)):
        for of in (lambda net: net, lambda net: net.named_parameters()):
            net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
            given = {"l2_norm": strength, "group": "row", "weights_only": True, "group_weights": "sqrt_size"}
            regularizer = Regularizer(of(net), **given)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            attachment = regularizer.attach(optimizer)
            regularizer.step = 1
            for columns in (9, 4):
                net[0].weight.data = torch.ones(3, columns)
                net[0].bias.data = torch.ones(3)
                new = Regularizer(of(net), **given)
                new.step = 1
                with torch.no_grad():
                    assert attachment.value == new()
                    assert regularizer() == new()
                    assert regularizer.report().total["value"] == new.report().total["value"]
                    assert str(regularizer) == str(new)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net[0].weight.data = torch.ones(3, 25)
    net[0].weight.grad = torch.zeros(3, 25)
    optimizer.step()
    torch.testing.assert_close(net[0].weight.grad, torch.full((3, 25), 0.75 * 5 / 5))


@pytest.mark.parametrize("given", [{}, {"group_weights": "sqrt_size"}], ids=["", "by sizes"])
def test_sets_of_a_parameter_that_was_resized(given):
    """At every use, and nothing is written."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
    regularizer = Regularizer(net, l2_norm=0.5, group="row", together="bias", **given)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = regularizer.attach(optimizer)
    before = regularizer().item()
    net[0].weight.data = torch.ones(9, 4)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    match = "together must be of parameters with as many groups each, got 9 of '0.weight' and 6 of '0.bias'"
    for use in (
        regularizer,
        optimizer.step,
        lambda: regularizer.prox_(0.1),
        regularizer.accumulate_grad_,
        regularizer.report,
        lambda: attachment.value,
    ):
        with pytest.raises(ValueError, match=match):
            use()
    assert all((p.grad == 1).all() for p in net.parameters())
    net[0].weight.data = torch.ones(6, 4)
    assert regularizer().item() != before  # of other weights
