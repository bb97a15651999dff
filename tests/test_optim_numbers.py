"""The numbers of `fused_reg.optim`: bits, errors, and where training comes to rest."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optim_cases import CASES, ONE_EACH, PENALTY, named, pair
from test_golden import _capabilities

from fused_reg import optim


def _numbers(*shape, seed=0):
    """Exact in every dtype and on every machine."""
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(seed)) / 1024.0


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


@pytest.mark.parametrize(("name", "options"), named(CASES))
def test_errors(name, options):
    """Of a step in float32, against one in float64 from the same numbers: no larger than torch's fused step's, or
    where there is none its plain one's.

    Both round the same result at last, an error of half a unit in both, and differ in what comes before: some roundings
    of a step that is 1/30 of a weight here. That changes the mean square of errors by some thousandths at most.
    """
    theirs, ours = pair(name)
    fused = {"fused": True} if name != "RMSprop" else {}
    results = []
    for kind, dtype, more in ((theirs, torch.float64, {}), (theirs, torch.float32, fused), (ours, torch.float32, {})):
        p = torch.nn.Parameter(_numbers(1 << 14).to(dtype))
        optimizer = kind([p], **options, **more)
        p.grad = _numbers(1 << 14, seed=1).to(dtype)
        optimizer.step()
        p.grad = _numbers(1 << 14, seed=2).to(dtype)
        optimizer.step()
        results.append(p.detach().double())
    exact, of_theirs, of_ours = results
    assert (of_ours - exact).square().mean() <= 1.02 * (of_theirs - exact).square().mean()


def _lasso():
    """A least squares problem whose columns differ 10-fold in size, and its strengths."""
    torch.manual_seed(0)
    x = torch.randn(60, 12, dtype=torch.float64) * torch.linspace(0.3, 3, 12, dtype=torch.float64)
    w = torch.zeros(12, dtype=torch.float64)
    w[::3] = torch.tensor([2.0, -1.0, 1.5, -0.5])
    y = x @ w + 0.1 * torch.randn(60, dtype=torch.float64)
    return x.T @ x / 60, x.T @ y / 60


def _solved(gram, moments, l1, l2):
    """By coordinate descent."""
    w = torch.zeros_like(moments)
    for _ in range(2000):
        for j in range(len(w)):
            r = moments[j] - gram[j] @ w + gram[j, j] * w[j]
            w[j] = r.sign() * (r.abs() - l1).clamp(min=0) / (gram[j, j] + 2 * l2)
    return w


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
    gram, moments = _lasso()
    best = _solved(gram, moments, l1, l2)
    w = torch.nn.Parameter(torch.zeros_like(best))
    optimizer = getattr(optim, name)([w], l1=l1, l2=l2, prox="preconditioned", **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        w.grad = gram @ w.detach() - moments
        optimizer.step()
        schedule.step()
    assert torch.equal(w == 0, best == 0) and 0 < int((best == 0).sum()) < len(best)
    gradient = gram @ w.detach() - moments + 2 * l2 * w.detach()
    on = best != 0
    assert (gradient + l1 * w.sign())[on].abs().max() < 1e-3 * l1
    assert gradient[~on].abs().max() < l1


def test_proximal_adagrad():
    """TensorFlow's ProximalAdagrad: the accumulator, the rate of an element, and the proximal step, in its words. It has
    no epsilon, and its l2 is twice ours."""
    lr, l1, l2 = 0.3, 0.2, 0.1
    w = _numbers(50).double()
    accumulator = torch.full_like(w, 0.1)
    p = torch.nn.Parameter(w.clone())
    optimizer = optim.Adagrad(
        [p], lr, initial_accumulator_value=0.1, eps=0.0, l1=l1, l2=l2 / 2, prox="preconditioned"
    )
    for i in range(4):
        g = _numbers(50, seed=i).double()
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


def results() -> str:
    """A hash of weights, states and penalties of every optimizer; of lengths that fill no vector, and several chunks."""
    digest = hashlib.sha256()
    for prox in (False, "preconditioned"):
        for name, options in CASES:
            sizes = ((7, torch.float32), (40000, torch.float32), (133, torch.bfloat16), (65, torch.float64))
            params = [torch.nn.Parameter(_numbers(n).to(dtype)) for n, dtype in sizes]
            optimizer = getattr(optim, name)(params, **options, **PENALTY, prox=prox)
            for i in range(3):
                for p in params:
                    p.grad = _numbers(p.numel(), seed=i).to(p.dtype)
                optimizer.step()
            held = [x for state in optimizer.state.values() for x in state.values()]
            for x in (*params, *held, optimizer.penalty):
                digest.update(x.detach().double().numpy().tobytes())
    return digest.hexdigest()


def test_instruction_sets():
    """The same bits in each, and with any number of threads."""
    folder = Path(__file__).parent
    found = {results()}
    for asked in _capabilities():
        done = subprocess.run(
            [sys.executable, "-c", "import test_optim_numbers as t; print(t.results())"],
            env={**os.environ, "ATEN_CPU_CAPABILITY": asked, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
            cwd=folder.parent,
            stdout=subprocess.PIPE,
            text=True,
            timeout=300,
            check=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1


@pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
def test_threads(name, options, threads):
    found = []
    for count in (1, 2):
        threads(count)
        p = torch.nn.Parameter(_numbers(100_000))
        optimizer = getattr(optim, name)([p], **options, **PENALTY)
        p.grad = _numbers(100_000, seed=1)
        optimizer.step()
        found.append((p.detach(), optimizer.penalty))
    torch.testing.assert_close(*found, rtol=0, atol=0)
