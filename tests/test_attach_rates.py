"""The learning rates that `attach` with mode "prox" takes, and those that it refuses before the step."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer


class AnyRate(torch.optim.Optimizer):
    """torch's optimizers check the rates that they are made with, some not those that come later."""

    def __init__(self, groups, **defaults):
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(float(group.get("lr", 1.0)) * p.grad)


def make(rate, mode="prox"):
    w = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = AnyRate([w], lr=rate)
    Regularizer([w], l1=0.5).attach(optimizer, mode)
    w.grad = torch.ones(2)
    return w, optimizer


@pytest.mark.parametrize(
    "rate",
    [
        0.5,
        1,
        0,
        Fraction(1, 2),
        np.float32(0.5),
        np.float64(0.5),
        np.int64(1),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor([0.5]),
        torch.tensor([[0.5]], dtype=torch.float64),
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.tensor(1),
    ],
    ids=lambda x: f"{type(x).__name__} {x}",
)
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_rates_of_every_kind(rate, mode):
    w, optimizer = make(rate, mode)
    optimizer.step()
    x = float(rate)
    assert w.tolist() == [2 - x - 0.5 * x, -2 - x + 0.5 * x]


def test_a_rate_that_is_learned():
    rate = torch.tensor(0.5, requires_grad=True)
    w = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = torch.optim.SGD([w])
    optimizer.param_groups[0]["lr"] = rate
    Regularizer([w], l1=0.5).attach(optimizer, "prox")
    w.grad = torch.ones(2)
    optimizer.step()
    assert w.tolist() == [2 - 0.5 - 0.25, -2 - 0.5 + 0.25]
    assert rate.grad is None


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (None, "a learning rate in each group of a regularized parameter, got lr=None in group 0"),
        ("0.1", "a learning rate in each group of a regularized parameter, got lr='0.1' in group 0"),
        (True, "a learning rate in each group of a regularized parameter, got lr=True in group 0"),
        (torch.tensor([0.1, 0.2]), "a learning rate in each group of a regularized parameter, got lr=tensor("),
        (np.array([0.1, 0.2]), "a learning rate in each group of a regularized parameter, got lr=array("),
        (-0.5, "learning rates that are finite and >= 0, got lr=-0.5 in group 0"),
        (float("nan"), "learning rates that are finite and >= 0, got lr=nan in group 0"),
        (float("inf"), "learning rates that are finite and >= 0, got lr=inf in group 0"),
        (np.float32("inf"), "learning rates that are finite and >= 0, got lr=inf in group 0"),
        (torch.tensor(-0.5), "learning rates that are finite and >= 0, got lr=-0.5 in group 0"),
        (torch.tensor([float("nan")]), "learning rates that are finite and >= 0, got lr=nan in group 0"),
    ],
    ids=lambda x: repr(x)[:20],
)
def test_refused_before_the_step(rate, message):
    """When it is attached, and when it comes later."""
    match = "^" + re.escape(f'attach: mode "prox" must find {message}')
    with pytest.raises(ValueError, match=match):
        make(rate)
    w, optimizer = make(0.5)
    before = w.detach().clone()
    optimizer.param_groups[0]["lr"] = rate
    for step in (optimizer.step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(ValueError, match=match):
            step()
        assert_same_bits([w.detach(), w.grad], [before, torch.ones(2)])
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert w.tolist() == [1.25, -2.25]


@pytest.mark.parametrize("other", [{}, {"lr": None}, {"lr": "auto"}, {"lr": -1.0}])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_groups_without_a_regularized_parameter_are_not_looked_at(mode, other):
    w, free = nn.Parameter(torch.tensor([2.0, -2.0])), nn.Parameter(torch.ones(3))
    optimizer = AnyRate([{"params": [free]}, {"params": [w], "lr": 0.5}])
    regularizer = Regularizer([w], l1=0.5)
    regularizer.attach(optimizer, mode)
    optimizer.param_groups[0].update(other)
    w.grad = torch.ones(2)
    for count in (1, 2):
        optimizer.step()
        assert regularizer.step == count
        if mode == "grad":
            w.grad = torch.ones(2)
    assert w.tolist() == [0.5, -2.5]


@pytest.mark.parametrize("rate", [0, 1, np.float32(0), np.float32(1), torch.tensor(0.0), torch.tensor(1)], ids=repr)
def test_steps_without_a_gradient_are_none_at_a_rate_of_zero(rate):
    w = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = AnyRate([w], lr=rate)
    regularizer = Regularizer([w], l1=0.5)
    regularizer.attach(optimizer)
    w.grad = torch.zeros(2)
    optimizer.step()
    assert regularizer.step == float(rate)
    assert w.grad.tolist() == [0.5 * float(rate), -0.5 * float(rate)]
