"""The optimizers, torch's and ours, and nets that they train."""

import hashlib

import torch
from torch import nn

from fused_reg import optim

#: Each formula once.
CASES = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "maximize": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.9)}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.9, "centered": True}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.05, "initial_accumulator_value": 0.5, "maximize": True}),
]
#: One of each.
ONE_EACH = [("SGD", {"lr": 0.05, "momentum": 0.9}), *(CASES[i] for i in (4, 7, 9, 10))]
PENALTY = {"l1": 0.02, "l2": 0.03}


def named(cases):
    import pytest  # which a subprocess does not need

    return [pytest.param(*case, id=f"{case[0]}-{'-'.join(list(case[1])[1:])}") for case in cases]


def pair(name):
    """torch's class, and ours."""
    return getattr(torch.optim, name), getattr(optim, name)


def net(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype)


def backward(model, i, penalty=None):
    """Gradients of step ``i``, also of a penalty in the loss."""
    model.zero_grad()
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(i)).to(next(model.parameters()).dtype)
    loss = model(x).square().mean()
    if penalty is not None:
        loss = loss + sum(penalty["l1"] * p.abs().sum() + penalty["l2"] * p.square().sum() for p in model.parameters())
    loss.backward()


def train(model, optimizer, steps=range(4), penalty=None):
    for i in steps:
        backward(model, i, penalty)
        optimizer.step()


def assert_same(a, b, rtol=1e-8, atol=1e-10):
    """Of two nets, or lists of tensors."""
    a, b = (list(x.parameters()) if isinstance(x, nn.Module) else list(x) for x in (a, b))
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def assert_same_states(a, b, rtol=1e-8, atol=1e-10):
    a, b = a.state_dict()["state"], b.state_dict()["state"]
    assert a.keys() == b.keys()
    for p in a:
        assert a[p].keys() == b[p].keys()
        for key, x in a[p].items():
            torch.testing.assert_close(x, b[p][key], rtol=rtol, atol=atol)  # dtype and device, too


def given(optimizer, seed=0):
    """Gradients for all that the optimizer holds."""
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
    return optimizer


def numbers(*shape, seed=0):
    """Exact in every dtype and on every machine."""
    return torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(seed)) / 1024.0


def results() -> str:
    """A hash of weights, states and penalties of every optimizer, of several dtypes and lengths."""
    digest = hashlib.sha256()
    for prox in (False, "preconditioned"):
        for name, options in CASES:
            sizes = ((7, torch.float32), (40000, torch.float32), (133, torch.bfloat16), (65, torch.float64))
            params = [torch.nn.Parameter(numbers(n).to(dtype)) for n, dtype in sizes]
            optimizer = getattr(optim, name)(params, **options, **PENALTY, prox=prox)
            for i in range(3):
                for p in params:
                    p.grad = numbers(p.numel(), seed=i).to(p.dtype)
                optimizer.step()
            held = [x for state in optimizer.state.values() for x in state.values()]
            for x in (*params, *held, optimizer.penalty):
                digest.update(x.detach().double().numpy().tobytes())
    return digest.hexdigest()
