"""The numbers of `fused_reg.optim`: bits, errors, and where training comes to rest."""

import functools

import pytest
import torch
from capabilities import capabilities, output_with
from optim_cases import CASES, ONE_EACH, PENALTY, named, numbers, pair, results

from fused_reg import optim


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("prox", [False, True])
def test_bits_of_sgd(momentum, nesterov, prox):
    """Those of single operations in float32, each rounded once."""
    lr, decay, l1, l2 = 0.1, 0.01, 0.05, 0.03
    w, b = torch.randn(1000), None
    p = w.clone().requires_grad_()
    nesterov = nesterov and momentum > 0
    optimizer = optim.SGD([p], lr, momentum, weight_decay=decay, nesterov=nesterov, l1=l1, l2=l2, prox=prox)
    for _ in range(3):
        g = p.grad = torch.randn(1000)
        optimizer.step()
        if not prox:
            g = g + (l1 * w.sign() + (2 * l2) * w)
        g = g + decay * w
        if momentum > 0:
            b = g if b is None else momentum * b + g
            g = g + momentum * b if nesterov else b
        w = w + -lr * g
        if prox:
            soft = w - torch.clamp(w, -torch.tensor(lr * l1), torch.tensor(lr * l1))
            w = soft * torch.tensor(1 / (1 + 2 * lr * l2))
        assert torch.equal(p.detach(), w)


def test_wider_gradients():
    """Of a parameter that takes any: the step is in their dtype, as torch's, and rounded once."""
    found = []
    for kind in pair("SGD"):
        p = torch.nn.Parameter(numbers(300).bfloat16())
        p.grad_dtype = None
        optimizer = kind([p], lr=0.125, momentum=0.5)
        for i in range(3):
            p.grad = numbers(300, seed=i) * 1.001
            optimizer.step()
        found.append((p.detach(), optimizer.state[p]["momentum_buffer"]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)
    assert found[1][1].dtype == torch.float32


@pytest.mark.parametrize(("name", "options"), named(CASES))
def test_errors(name, options):
    """Of a step in float32, against one in float64 from the same numbers: no larger than torch's fused step's, or
    where there is none its plain one's.

    The last rounding, of the weight, is in both. Before it, torch's compiler may have contracted a product and a sum,
    which saves one rounding of something that is a tenth of a weight here: of the mean square of the errors a
    hundredth, for each of the at most five. Hence a tenth for all.
    """
    theirs, ours = pair(name)
    fused = {"fused": True} if name != "RMSprop" else {}
    results = []
    for kind, dtype, more in ((theirs, torch.float64, {}), (theirs, torch.float32, fused), (ours, torch.float32, {})):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(1 << 14).to(dtype))
        optimizer = kind([p], **options, **more)
        for _ in range(2):
            p.grad = torch.randn(1 << 14).to(dtype)
            optimizer.step()
        results.append(p.detach().double())
    exact, of_theirs, of_ours = results
    assert (of_ours - exact).square().mean() <= 1.1 * (of_theirs - exact).square().mean()


@functools.cache
def _lasso(l1, l2):
    """A least squares problem whose columns differ in size, and its solution by coordinate descent."""
    torch.manual_seed(0)
    x = torch.randn(60, 12, dtype=torch.float64) * torch.linspace(0.8, 2, 12, dtype=torch.float64)
    w = torch.zeros(12, dtype=torch.float64)
    w[::3] = torch.tensor([2.0, -1.0, 1.5, -0.5])
    y = x @ w + 0.1 * torch.randn(60, dtype=torch.float64)
    gram, moments = x.T @ x / 60, x.T @ y / 60
    w = torch.zeros_like(moments)
    for _ in range(200):
        for j in range(len(w)):
            r = moments[j] - gram[j] @ w + gram[j, j] * w[j]
            w[j] = r.sign() * (r.abs() - l1).clamp(min=0) / (gram[j, j] + 2 * l2)
    return gram, moments, w


RESTS = [
    ("SGD", {"lr": 0.03}),
    ("SGD", {"lr": 0.01, "momentum": 0.9}),
    ("SGD", {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.02, "momentum": 0.9, "dampening": 0.5}),
    ("Adam", {"lr": 0.02}),
    ("Adam", {"lr": 0.02, "amsgrad": True}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.0}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.002, "momentum": 0.9}),
    ("RMSprop", {"lr": 0.01, "centered": True}),
    ("Adagrad", {"lr": 0.3}),
]


@pytest.mark.parametrize("l2", [0.0, 0.05], ids=["lasso", "elastic net"])
@pytest.mark.parametrize(("name", "options"), named(RESTS))
def test_rest(name, options, l2):
    """Training with prox="preconditioned" comes to rest at the minimum of loss and penalty, with its zeros."""
    l1 = 0.1
    gram, moments, best = _lasso(l1, l2)
    w = torch.nn.Parameter(torch.zeros_like(best))
    optimizer = getattr(optim, name)([w], l1=l1, l2=l2, prox="preconditioned", **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        w.grad = gram @ w.detach() - moments
        optimizer.step()
        schedule.step()
    assert 0 < int((best == 0).sum()) < len(best)
    assert torch.equal(w == 0, best == 0)
    gradient = gram @ w.detach() - moments + 2 * l2 * w.detach()
    on = best != 0
    assert (gradient + l1 * w.sign())[on].abs().max() < 1e-3 * l1
    assert gradient[~on].abs().max() < l1


def test_proximal_adagrad():
    """TensorFlow's ProximalAdagrad: the accumulator, the rate of an element, the proximal step, in its words. It has no
    epsilon, and its l2 is twice ours."""
    lr, l1, l2 = 0.3, 0.2, 0.1
    w = numbers(50).double()
    accumulator = torch.full_like(w, 0.1)
    p = torch.nn.Parameter(w.clone())
    optimizer = optim.Adagrad([p], lr, initial_accumulator_value=0.1, eps=0.0, l1=l1, l2=l2 / 2, prox="preconditioned")
    for i in range(4):
        g = numbers(50, seed=i).double()
        p.grad = g.clone()
        optimizer.step()
        accumulator += g * g
        rate = lr / accumulator.sqrt()
        ahead = w - rate * g
        w = ahead.sign() * (ahead.abs() - rate * l1).clamp(min=0) / (1 + rate * l2)
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)
    assert int((w == 0).sum()) > 0


def test_maximize():
    """A penalty shrinks weights whichever way the objective goes, with each ``prox``."""
    for prox in (False, True, "preconditioned"):
        w = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        optimizer = optim.SGD([w], 0.5, maximize=True, l1=0.5, prox=prox)
        w.grad = torch.zeros(2)
        optimizer.step()
        torch.testing.assert_close(w.detach(), torch.tensor([0.75, -0.75]))


@pytest.mark.parametrize("asked", ["default", *(pytest.param(s, marks=pytest.mark.long) for s in ("avx2", "avx512"))])
def test_instruction_sets(asked):
    """The same bits in each."""
    if asked not in capabilities():
        pytest.skip(f"this CPU has no {asked}")
    assert output_with(asked, "import optim_cases; print(optim_cases.results())") == results()


@pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
def test_threads(name, options, threads):
    found = []
    for count in (1, 2):
        threads(count)
        p = torch.nn.Parameter(numbers(100_000))
        optimizer = getattr(optim, name)([p], **options, **PENALTY)
        p.grad = numbers(100_000, seed=1)
        optimizer.step()
        found.append((p.detach(), optimizer.penalty))
    torch.testing.assert_close(*found, rtol=0, atol=0)
