"""Random training runs: whatever happens between the steps, ours and torch's with the penalty in the loss agree."""

import copy
import random

import pytest
import torch
from optim_cases import assert_same, assert_same_states, pair

SHAPES = [(3,), (4, 5), (), (0,), (2, 3, 4), (17,), (33, 2)]
OWN = {
    "SGD": {"momentum": [0.0, 0.5, 0.9], "dampening": [0.0, 0.3]},
    "Adam": {"betas": [(0.9, 0.99), (0.5, 0.8)], "amsgrad": [False, True], "eps": [1e-8, 1e-3]},
    "AdamW": {"betas": [(0.9, 0.99), (0.5, 0.8)], "amsgrad": [False, True]},
    "RMSprop": {"alpha": [0.5, 0.9], "momentum": [0.0, 0.5], "centered": [False, True]},
    "Adagrad": {"lr_decay": [0.0, 0.1]},
}
RATES = [0.1, 0.01, torch.tensor(0.05, dtype=torch.float64)]


def drawn(draw, shape):
    """Standard normal, some of it transposed, or with gaps."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(1 << 30)), dtype=torch.float64)
    if len(shape) == 2 and draw.random() < 0.4:
        return x.t().contiguous().t()
    return torch.stack([x, x], dim=-1)[..., 0] if draw.random() < 0.3 else x


def parameters(draw, count):
    return [torch.nn.Parameter(drawn(draw, draw.choice(SHAPES))) for _ in range(count)]


def begun(name, draw, place):
    chosen = {key: draw.choice(values) for key, values in OWN[name].items()}
    groups = []
    for _ in range(draw.randrange(1, 4)):
        own = {"lr": copy.copy(draw.choice(RATES)), "weight_decay": draw.choice([0.0, 0.05])}
        groups.append({"params": parameters(draw, draw.randrange(4)), "maximize": draw.random() < 0.3, **own})
    return pair(name)[place](groups, **chosen)


def changed(optimizer, draw):
    """One of the things that happen between steps; most often nothing."""
    what, group = draw.randrange(13), draw.choice(optimizer.param_groups)
    if what == 0:
        group["lr"] = copy.copy(draw.choice(RATES))
    elif what == 1:
        group.update(weight_decay=draw.choice([0.0, 0.07]), maximize=not group["maximize"])
    elif what == 2 and "dampening" in group:
        group["momentum"] = draw.choice([0.0, 0.6])
    elif what == 3:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif what == 4:
        return copy.deepcopy(optimizer)
    elif what == 5:
        for p in group["params"]:
            p.data = p.data.clone() * 0.5
    elif what == 6:
        optimizer.param_groups.reverse()
    elif what == 7:
        group["params"].reverse()
    elif what == 8 and "lr_decay" not in group:  # Adagrad's constructor makes the states
        optimizer.add_param_group({"params": parameters(draw, 2)})
    return optimizer


def backward(optimizer, draw):
    share = draw.choice([0.0, 0.0, 0.0, 0.5])
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = drawn(draw, p.shape) * draw.choice([0.0, 1.0, 1.0, 1.0])
            p.grad = None if draw.random() < share else p.grad


def weights(optimizer):
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def penalty_of(params, l1, l2):
    return sum(l1 * p.abs().sum() + l2 * p.square().sum() for p in params)


@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(i, marks=pytest.mark.long) for i in range(40, 400))])
def test_runs(seed):
    name = list(OWN)[seed % len(OWN)]
    l1, l2 = random.Random(seed).choice([(0.0, 0.0), (0.01, 0.0), (0.01, 0.02)])
    theirs, ours = (begun(name, random.Random(seed), place) for place in (0, 1))
    for i in range(12):
        theirs, ours = (changed(optimizer, random.Random(seed * 100 + i)) for optimizer in (theirs, ours))
        for optimizer in (theirs, ours):
            backward(optimizer, random.Random(seed * 100 + i))
        for group in theirs.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    gradient = l1 * p.detach().sign() + 2 * l2 * p.detach()
                    p.grad = p.grad - gradient if group["maximize"] else p.grad + gradient
        for group in ours.param_groups:
            group.update(l1=l1, l2=l2)
        is_step = any(p.grad is not None for group in ours.param_groups for p in group["params"])
        before = penalty_of(weights(ours), l1, l2)
        theirs.step()
        ours.step()
        assert_same(weights(theirs), weights(ours))
        if is_step:
            torch.testing.assert_close(ours.penalty, torch.as_tensor(before), check_dtype=False)
    assert_same_states(theirs, ours)
