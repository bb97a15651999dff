"""`Regularizer.attach` and the arguments of a step: closures of every kind, and what is none. (Hard case 45.)"""

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import assert_same_bits
from test_attach import X, Y, loss_of, make
from torch import nn

from fused_reg import Regularizer, fused_penalty, reference

BOTH = {"l1": 1e-2, "l2": 1e-2}


class Loss:
    """A number for LBFGS, that nothing can be added to."""

    def __init__(self, loss):
        self.loss = loss

    def __float__(self):
        return self.loss.item()


NUMBERS = {
    "tensor": lambda x: x,
    "detached": lambda x: x.detach(),
    "float64": lambda x: x.detach().double(),
    "one element": lambda x: x.detach().reshape(1, 1),
    "float": lambda x: x.item(),
    "Fraction": lambda x: Fraction(x.item()),
    "NumPy scalar": lambda x: np.float32(x.item()),
    "NumPy double": lambda x: np.float64(x.item()),
    "NumPy array": lambda x: np.array(x.item()),
    "NumPy array of one": lambda x: np.array([x.item()]),
    "Decimal": lambda x: Decimal(x.item()),
    "__float__": Loss,
}


def number(x) -> float:
    return float(x.item() if hasattr(x, "item") else x)


@pytest.mark.parametrize("returned", NUMBERS)
@pytest.mark.parametrize("maximize", [False, True])
def test_a_number_gets_the_penalty(returned, maximize):
    """The objective that the gradient is of: where it is maximized the penalty is subtracted."""
    net, plain = make().double(), make().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, maximize=maximize)
    attachment = Regularizer(net, **BOTH).attach(optimizer)
    sign = -1 if maximize else 1
    results = []

    def closure():
        optimizer.zero_grad()
        loss = sign * nn.functional.mse_loss(net(X.double()), Y.double())
        loss.backward()
        results.append(NUMBERS[returned](loss))
        return results[-1]

    objective = optimizer.step(closure)
    penalty = fused_penalty(plain.parameters(), **BOTH)
    expected = sign * (nn.functional.mse_loss(plain(X.double()), Y.double()) + penalty)
    expected.backward()
    assert number(objective) == pytest.approx(expected.item(), rel=1e-6 if returned == "NumPy scalar" else 1e-14)
    assert_same_bits([attachment.value], [penalty.detach()])
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
    if returned in ("tensor", "detached", "float64", "one element", "NumPy array of one"):
        assert objective.shape == results[0].shape
    if returned in ("float", "NumPy scalar", "NumPy double"):
        assert type(objective) is type(results[0])


@pytest.mark.parametrize("group", ["tensor", "row"])
def test_the_objective_of_groups_that_are_maximized_beside_others(group):
    """The penalty of these has a minus, as their loss has; the value has none."""
    net = make().double()
    groups = [{"params": net.weight}, {"params": net.bias, "maximize": True}]
    rules = [("weight", {"l1": 0.1, "l2_norm": 0.2, "group": group}), ("bias", {"l2_norm": 0.3})]
    attachment = Regularizer(net, rules=rules).attach(optimizer := torch.optim.SGD(groups, lr=0.1))
    weight = fused_penalty(net.weight, l1=0.1, l2_norm=0.2, group=group).item()
    bias = fused_penalty(net.bias, l2_norm=0.3).item()

    def closure():
        optimizer.zero_grad()
        nn.functional.mse_loss(net(X.double()), Y.double()).backward()
        return 2.0

    assert optimizer.step(closure) == pytest.approx(2 + weight - bias, rel=1e-14)
    assert attachment.value.item() == pytest.approx(weight + bias, rel=1e-14)


@pytest.mark.parametrize(
    "returned",
    [None, (1.5, "logits"), {"loss": 1.5}, [1.5], "done", True, 1 + 2j, np.arange(3.0), torch.arange(3.0), object()],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_number_comes_back(returned):
    """With the penalty in the gradient."""
    net, plain = make(), make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, **BOTH).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss_of(net).backward()
        return returned

    assert optimizer.step(closure) is returned
    (loss_of(plain) + fused_penalty(plain.parameters(), **BOTH)).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("returned", ["tensor", "float", "one element", "NumPy double", "NumPy array", "__float__"])
def test_lbfgs_takes_what_it_takes_by_itself(returned):
    """A line search compares objectives: they must be those that the gradients are of."""

    def run(attached, kind):
        net = make().double()
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=10, line_search_fn="strong_wolfe")
        regularizer = Regularizer(net, l2=0.1)
        if attached:
            regularizer.attach(optimizer)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(X.double()), Y.double())
            loss = loss if attached else loss + regularizer()
            loss.backward()
            return kind(loss)

        for _ in range(3):
            optimizer.step(closure)
        return [p.detach() for p in net.parameters()]

    torch.testing.assert_close(run(True, NUMBERS[returned]), run(False, NUMBERS["tensor"]), rtol=1e-5, atol=1e-7)


class TakesArguments(torch.optim.Optimizer):
    """Its step takes anything, and keeps it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, *args, **kwargs):
        self.given = args, kwargs
        for x in (*args, *kwargs.values()):
            if callable(x) and not isinstance(x, nn.Module):
                torch.enable_grad()(x)()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad)
        return args, kwargs


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((0.05,), {}),
        (({"loss": 1.0},), {}),
        (([torch.ones(2)],), {}),
        ((torch.tensor(1.0),), {}),
        ((nn.Linear(2, 2),), {}),
        ((None, 0.05), {"grad_scale": 2.0}),
        ((), {"closure": None, "loss": 0.5}),
    ],
)
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_arguments_are_passed_on(mode, args, kwargs):
    w = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = TakesArguments([w])
    Regularizer([w], l1=0.5).attach(optimizer, mode)
    w.grad = torch.ones(2)
    result = optimizer.step(*args, **kwargs)
    assert all(a is b for a, b in zip(result[0], args, strict=True))
    assert result[1].keys() == kwargs.keys()
    assert all(result[1][k] is kwargs[k] for k in kwargs)
    assert w.tolist() == [2 - 1 - 0.5, -2 - 1 + 0.5]


@pytest.mark.parametrize("place", [lambda f: ((f,), {}), lambda f: ((0.05, f), {}), lambda f: ((0.05,), {"fn": f})])
def test_a_closure_may_stand_anywhere(place):
    w = nn.Parameter(torch.tensor([2.0, -2.0]))
    optimizer = TakesArguments([w])
    Regularizer([w], l1=0.5).attach(optimizer)

    def closure():
        w.grad = torch.ones(2)

    args, kwargs = place(closure)
    optimizer.step(*args, **kwargs)
    assert w.tolist() == [2 - 1 - 0.5, -2 - 1 + 0.5]


class Differentiates(torch.optim.SGD):
    """Takes the gradient of what the closure returns, as second-order optimizers do."""

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.sub_(self.param_groups[0]["lr"] * grad)
        return loss


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("maximize", [False, True])
def test_an_objective_that_the_optimizer_differentiates(mode, maximize):
    net, plain = make().double(), make().double()
    optimizer = Differentiates(net.parameters(), lr=0.1, maximize=maximize)
    regularizer = Regularizer(net, l1=lambda step: 0.01 * (1 + step), l2=0.01)
    attachment = attach(regularizer, optimizer, mode)
    sign = -1 if maximize else 1
    for k in range(3):
        loss = nn.functional.mse_loss(plain(X.double()), Y.double())
        strengths = {"l1": 0.01 * (1 + k), "l2": 0.01}
        penalty = reference.fused_penalty(plain.parameters(), **strengths)
        objective = loss + sign * penalty if mode == "grad" else loss
        with torch.no_grad():
            for p, grad in zip(plain.parameters(), torch.autograd.grad(objective, [*plain.parameters()]), strict=True):
                p.sub_(0.1 * grad)
            if mode == "prox":
                reference.prox_(plain.parameters(), **strengths, step=0.1)
        result = optimizer.step(lambda: nn.functional.mse_loss(net(X.double()), Y.double()))
        torch.testing.assert_close(result.detach(), objective.detach())
        torch.testing.assert_close([*net.parameters()], [*plain.parameters()], rtol=1e-12, atol=1e-12)
        if mode == "grad":
            torch.testing.assert_close(attachment.value, penalty.detach())
        assert regularizer.step == k + 1


def attach(regularizer, optimizer, mode):
    """It cannot be tried whether a step lasts that needs the graph of a loss."""
    if mode == "grad":
        return regularizer.attach(optimizer)
    with pytest.warns(UserWarning, match="could not try whether Differentiates keeps"):
        return regularizer.attach(optimizer, mode)


class LeavesTheClosure(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


class TakesGradients(torch.optim.SGD):
    @torch.no_grad()
    def step(self, grads):
        for p, grad in zip(self.param_groups[0]["params"], grads, strict=True):
            p.sub_(grad)


def test_a_step_that_the_penalty_does_not_enter_is_said_once():
    w = nn.Parameter(torch.ones(2))
    w.grad = torch.ones(2)
    optimizer = LeavesTheClosure([w], lr=0.1)
    Regularizer([w], l1=0.5).attach(optimizer)
    with pytest.warns(UserWarning, match="LeavesTheClosure did not call its closure, and had no penalty"):
        optimizer.step(lambda: None)
    optimizer.step(lambda: None)

    w.grad = None
    optimizer = TakesGradients([w], lr=0.1)
    regularizer = Regularizer([w], l1=0.5)
    regularizer.attach(optimizer)
    with pytest.warns(UserWarning, match=r"TakesGradients changed parameters that have no gradient in \.grad"):
        optimizer.step([torch.ones(2)])
    optimizer.step([torch.ones(2)])
    assert regularizer.step == 0


def test_a_proximal_step_that_does_not_call_its_closure():
    """It is of the gradients that there are then."""
    w, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LeavesTheClosure([w], lr=0.25)
    optimizer.add_param_group({"params": [other]})
    Regularizer([w, other], l1=0.5).attach(optimizer, mode="prox")
    for p, rest in ((w, other), (other, w)):
        p.grad, rest.grad, before = torch.ones(2), None, rest.tolist()
        optimizer.step(lambda: None)
        assert (p.tolist(), rest.tolist()) == ([0.625, 0.625], before)


class SearchesALine(torch.optim.SGD):
    """Calls backward itself, and halves its step until the objective is smaller, in place of Armijo's rule."""

    def step(self, closure):
        self.zero_grad()
        with torch.enable_grad():
            first = closure()
        first.backward()
        with torch.no_grad():
            params = [p for group in self.param_groups for p in group["params"]]
            before, grads = [p.clone() for p in params], [p.grad for p in params]
            rate = 16.0
            while rate == 16.0 or not closure() < first:
                rate /= 2
                for p, w, g in zip(params, before, grads, strict=True):
                    p.copy_(w - rate * g)
        return first


def test_a_line_search_of_objectives():
    """To the bit, as with the penalty in the closure: what is evaluated without a gradient adds none."""

    def run(attached):
        net = make().double()
        regularizer = Regularizer(net, l1=0.05, l2=0.1)
        optimizer = SearchesALine(net.parameters(), lr=1.0)
        attachment = regularizer.attach(optimizer) if attached else None

        def closure():
            loss = nn.functional.mse_loss(net(X.double()), Y.double())
            return loss if attached else loss + regularizer()

        for k in range(4):
            penalty = regularizer().detach()
            optimizer.step(closure)
            if attached:
                assert_same_bits([attachment.value], [penalty])
                assert regularizer.step == k + 1
        return [p.detach() for p in net.parameters()]

    assert_same_bits(run(True), run(False))


class Evaluates(torch.optim.SGD):
    """Needs no derivative: takes the better of two points."""

    @torch.no_grad()
    def step(self, closure):
        w = self.param_groups[0]["params"][0]
        before, first = w.clone(), closure()
        w.sub_(self.param_groups[0]["lr"])
        if closure() > first:
            w.copy_(before)
        return first


def test_an_optimizer_that_needs_no_gradient():
    """The penalty is in what it compares, and a step that goes nowhere is none."""
    w = nn.Parameter(torch.tensor([0.75, 0.5]))
    regularizer = Regularizer([w], l1=lambda step: 1.0 + step)
    regularizer.attach(optimizer := Evaluates([w], lr=0.5))
    for objective in (1.25, 2 * 0.25, 2 * 0.25):
        assert optimizer.step(lambda: torch.zeros(())) == objective
        assert (w.tolist(), regularizer.step) == ([0.25, 0.0], 1)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_closure_that_skips_its_batch_is_no_step(mode):
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.5)
    attachment = regularizer.attach(optimizer, mode)
    before, value = [p.detach().clone() for p in net.parameters()], attachment.value
    optimizer.step(lambda: loss_of(net))
    optimizer.step(lambda: None)
    assert optimizer.step(lambda: torch.tensor(1.5)) == 1.5
    assert_same_bits([p.detach() for p in net.parameters()], before)
    assert_same_bits([attachment.value], [value])
    assert regularizer.step == 0


def test_an_objective_without_a_gradient_in_a_float_is_said():
    w = nn.Parameter(torch.ones(2))
    Regularizer([w], l1=0.5).attach(optimizer := Evaluates([w], lr=0.25))
    with pytest.warns(UserWarning, match=r"Evaluates changed parameters that have no gradient in \.grad"):
        optimizer.step(lambda: w.sum().item())
