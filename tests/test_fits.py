"""A parameter that was resized by `.data`, and values that were written in place: every use looks again, before it, or
the optimizer's step, writes anything."""

import re

import pytest
import torch
from torch import nn

from fused_reg import Regularizer, optim

OPTIMIZERS = pytest.mark.parametrize("kind", [torch.optim.SGD, optim.SGD, optim.Adam], ids=["torch", "SGD", "Adam"])
MODES = pytest.mark.parametrize("mode", ["grad", "prox"])


def _net():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))


def _with_grads(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    return [p.detach().clone() for p in net.parameters()]


def _assert_unchanged(net, before):
    for p, old in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, old)


def _of_rows(weights):
    return {"l2_norm": 0.1, "group": "row", "weights_only": True, "group_weights": {"1.weight": weights}}


RESIZED = {
    "importance": (
        lambda: {"l1": 0.1, "importance": {"1.weight": torch.ones(4, 4)}},
        "Regularizer: importance['1.weight'] must have the shape of params['1.weight'] ((6, 4)), got (4, 4)",
    ),
    "toward": (
        lambda: {"l1": 0.1, "weights_only": True, "toward": "start"},
        "Regularizer: toward['1.weight'] must have the shape of params['1.weight'] ((6, 4)), got (4, 4)",
    ),
    "group_weights": (
        lambda: _of_rows(torch.ones(4)),
        "Regularizer: group_weights['1.weight'] must have a floating point number for each of 6 groups",
    ),
    "runs": (
        lambda: {"l2_norm": 0.1, "group": ("row", 4), "weights_only": True},
        "Regularizer: params['1.weight'] must have a multiple of 4 rows, to have group=(\"row\", 4), got 6",
    ),
}


@OPTIMIZERS
@MODES
@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_resized_before_a_step(kind, mode, name, is_first):
    """Also of an optimizer of ours that takes what has references in a launch of its own."""
    given, message = RESIZED[name]
    net = _net()
    optimizer = kind(net.parameters(), lr=0.1)
    Regularizer(net, **given()).attach(optimizer, mode)
    for _ in range(0 if is_first else 3):
        _with_grads(net)
        optimizer.step()
    net[1].weight.data = torch.randn(6, 4)
    optimizer.state.clear()
    before = _with_grads(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.step()
    _assert_unchanged(net, before)
    assert all((p.grad == 1).all() for p in net.parameters())
    net[1].weight.data = torch.randn(4, 4)
    _with_grads(net)
    optimizer.step()


@pytest.mark.parametrize("name", RESIZED)
def test_resized_before_a_call(name):
    given, message = RESIZED[name]
    net = _net()
    regularizer = Regularizer(net, **given())
    net[1].weight.data = torch.randn(6, 4)
    before = _with_grads(net)
    for use in (regularizer, regularizer.accumulate_grad_, lambda: regularizer.prox_(0.1), regularizer.report):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()
    _assert_unchanged(net, before)


WRITTEN = {
    "importance": (lambda x: {"l1": 0.1, "importance": {"1.weight": x}}, (4, 4), r"importance\['1.weight'\]"),
    "importance of rows": (lambda x: {"l2": 0.1, "importance": {"1.weight": x}}, (4, 1), r"importance\['1.weight'\]"),
    "group_weights": (_of_rows, (4,), r"group_weights\['1.weight'\]"),
    "l1": (lambda x: {"l1": x}, (), "l1"),
}


@OPTIMIZERS
@MODES
@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("bad", [-5.0, float("nan"), float("inf")])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_written_before_a_step(kind, mode, name, bad, is_first):
    given, shape, place = WRITTEN[name]
    net, x = _net(), torch.ones(shape)
    optimizer = kind(net.parameters(), lr=0.1)
    Regularizer(net, **given(x)).attach(optimizer, mode)
    for _ in range(0 if is_first else 3):
        _with_grads(net)
        optimizer.step()
    x.view(-1)[0] = bad
    before = _with_grads(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"{place}.* must be finite and >= 0, got {bad:g}"):
            optimizer.step()
    _assert_unchanged(net, before)
    x.view(-1)[0] = 2.0
    optimizer.step()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("bad", [-5.0, float("nan"), float("inf")])
def test_written_before_a_call(name, bad):
    given, shape, place = WRITTEN[name]
    net, x = _net(), torch.ones(shape)
    regularizer = Regularizer(net, **given(x))
    regularizer.accumulate_grad_()
    x.view(-1)[0] = bad
    before = _with_grads(net)
    for use in (regularizer, regularizer.accumulate_grad_, lambda: regularizer.prox_(0.1)):
        with pytest.raises(ValueError, match=rf"{place}.* must be finite and >= 0, got {bad:g}"):
            use()
    _assert_unchanged(net, before)
    assert all((p.grad == 1).all() for p in net.parameters())


def test_what_is_frozen_is_not_looked_at():
    """Until it trains again."""
    net, x = _net(), torch.ones(4, 4)
    regularizer = Regularizer(net, l1=0.1, importance={"1.weight": x})
    net[1].weight.requires_grad_(False)
    x[0, 0] = -1.0
    regularizer.accumulate_grad_()
    net[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"must be finite and >= 0, got -1\.0"):
        regularizer.accumulate_grad_()


@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("bad", [-5.0, float("nan")])
def test_options_of_an_optimizer_written(prox, bad):
    p, x = nn.Parameter(torch.ones(3)), torch.ones(3)
    optimizer = optim.SGD([p], lr=0.1, l1=0.1, importance=[x], prox=prox)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step()
    x[0] = bad
    before = p.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"SGD: importance\[0\] must be finite and >= 0, got {bad:g}"):
            optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("name", ["toward", "importance"])
def test_options_of_an_optimizer_resized(name):
    """Nothing is written of other groups, which are in launches of their own."""
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    groups = [{"params": [first], "l1": 0.1}, {"params": [second], "l1": 0.1, name: [torch.ones(3)]}]
    optimizer = optim.SGD(groups, lr=0.1)
    for _ in range(3):
        first.grad, second.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    second.data = torch.ones(5)
    second.grad = torch.ones(5)
    before = first.detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"SGD: {name}\[0\] must have the shape of params\[0\] \(\(5,\)\), got"):
            optimizer.step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("use", ["__call__", "accumulate_grad_", "prox_"])
def test_written_before_compiled_code_runs(use):
    """What it was compiled with has no values: they are looked at when it runs."""
    torch._dynamo.reset()
    net, x = nn.Linear(3, 3), torch.ones(3, 3)
    regularizer = Regularizer(net, l1=0.1, importance={"weight": x})
    args = (0.1,) if use == "prox_" else ()
    run = torch.compile(lambda: getattr(regularizer, use)(*args), backend="aot_eager")
    _with_grads(net)
    run()
    run()
    x[0, 0] = -5.0
    before = _with_grads(net)
    with pytest.raises(ValueError, match=r"importance.* must be finite and >= 0, got -5"):
        run()
    _assert_unchanged(net, before)
    assert all((p.grad == 1).all() for p in net.parameters())


@OPTIMIZERS
@pytest.mark.parametrize(
    ("given", "value", "message"),
    [
        ({"lower": -1.0, "upper": 1.0}, 2.0, "lower must be less than upper, got 2.0 and 1.0 for params['weight']"),
        ({"mcp": 0.0, "l2_norm": 0.1}, 1.0, "mcp and l2_norm of one parameter have no proximal operator"),
    ],
    ids=["bounds", "terms"],
)
def test_strengths_without_a_closed_form(kind, given, value, message):
    """Hard to see in what the optimizer's step and half a proximal step have left."""
    net = nn.Linear(3, 3)
    name, start = next(iter(given.items()))
    tensor = torch.tensor(start)
    optimizer = kind(net.parameters(), lr=0.1)
    Regularizer(net, **{**given, name: tensor}).attach(optimizer, mode="prox")
    _with_grads(net)
    optimizer.step()
    tensor.fill_(value)
    before = _with_grads(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.step()
    _assert_unchanged(net, before)
    tensor.fill_(start)
    optimizer.step()


@OPTIMIZERS
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lower": lambda step: -1.0 + step, "upper": 1.0}, "lower must be less than upper, got 1.0 and 1.0"),
        ({"lower": -1.0, "upper": lambda step: 1.0 - step}, "lower must be less than upper, got -1.0 and -1.0"),
        ({"lower": lambda step: step - 1.0, "upper": lambda step: 3.0 - step}, "got 1.0 and 1.0 for params['weight']"),
    ],
    ids=["lower", "upper", "both"],
)
def test_schedules_that_cross(kind, given, message):
    """Each gives a bound that may be."""
    net = nn.Linear(3, 3)
    optimizer = kind(net.parameters(), lr=0.1)
    Regularizer(net, **given).attach(optimizer, mode="prox")
    for _ in range(2):
        _with_grads(net)
        optimizer.step()
    before = _with_grads(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.step()
    _assert_unchanged(net, before)
