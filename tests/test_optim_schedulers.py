"""`fused_reg.optim` under every scheduler of torch, and the averages of `torch.optim.swa_utils`."""

import copy

import pytest
import torch
from optim_cases import ONE_EACH, PENALTY, assert_same, assert_same_states, named, net, pair, train
from torch.optim import lr_scheduler as schedulers
from torch.optim import swa_utils

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda i: 1 / (1 + i)] * len(o.param_groups)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda i: 0.5),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 3),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.01, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.01, 6, cycle_momentum=False),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 2), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.005, 2),
}
CHANGED = {"lr", "initial_lr", "momentum", "base_momentum", "max_momentum", "betas"}
#: These change the first decay, too: ``momentum``, or the first of ``betas``.
CYCLES = {
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.001, 0.01, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.01, 6),
}


def compare(name, options, make, lr=None):
    """Five steps of torch's and ours, in two groups, and what the schedulers leave in them."""
    found, options = [], {k: x for k, x in options.items() if k != "lr"}
    for kind in pair(name):
        model = net()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
        optimizer = kind(groups, lr=0.01 if lr is None else lr.clone(), **options)
        scheduler, rates = make(optimizer), []
        for i in range(5):
            train(model, optimizer, [i])
            scheduler.step(*[1.0] * isinstance(scheduler, schedulers.ReduceLROnPlateau))
            rates.append([{k: copy.copy(group[k]) for k in group.keys() & CHANGED} for group in optimizer.param_groups])
        found.append((model, optimizer, rates))
    (a, theirs, of_theirs), (b, ours, of_ours) = found
    rtol = 1e-8 if lr is None else 1e-5  # in float32
    assert_same(a, b, rtol=rtol, atol=rtol / 100)
    assert_same_states(theirs, ours, rtol=rtol, atol=rtol / 100)
    assert of_theirs == of_ours
    assert any(x != of_ours[0] for x in of_ours)


@EACH
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rates(name, options, scheduler):
    compare(name, options, SCHEDULERS[scheduler])


@EACH
@pytest.mark.parametrize("scheduler", ["LambdaLR", "OneCycleLR", "SequentialLR"])
def test_rates_in_tensors(name, options, scheduler):
    compare(name, options, SCHEDULERS[scheduler], torch.tensor(0.01))


@pytest.mark.parametrize(("name", "options"), named(case for case in ONE_EACH if case[0] != "Adagrad"))
@pytest.mark.parametrize("scheduler", CYCLES)
def test_cycles_of_momentum(name, options, scheduler):
    compare(name, options, CYCLES[scheduler])


@EACH
def test_resumed(name, options):
    """Optimizer and scheduler go on from their states."""
    found = []
    for resumes in (False, True):
        model = net()

        def made(model=model):
            optimizer = pair(name)[1](model.parameters(), **options, **PENALTY, prox=name != "Adagrad")
            return optimizer, schedulers.OneCycleLR(optimizer, 0.01, 8, cycle_momentum=False)

        own = made()
        for i in range(6):
            if resumes and i == 3:
                states = copy.deepcopy([x.state_dict() for x in own])
                own = made()
                for x, state in zip(own, states, strict=True):
                    x.load_state_dict(state)
            train(model, own[0], [i])
            own[1].step()
        found.append((model, own[0].penalty))
    assert_same(found[0][0], found[1][0], rtol=0, atol=0)
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("average", [{}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}])
def test_averages(average):
    """Of the weights after each step; batch normalization sees the data once more."""
    found = []
    for kind in pair("SGD"):
        model = torch.nn.Sequential(net(torch.float32), torch.nn.BatchNorm1d(3))
        averaged = swa_utils.AveragedModel(model, **average)
        optimizer = kind(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = swa_utils.SWALR(optimizer, 0.05, 2)
        for i in range(4):
            train(model, optimizer, [i])
            averaged.update_parameters(model)
            scheduler.step()
        swa_utils.update_bn([torch.ones(4, 10), torch.zeros(4, 10)], averaged)
        found.append(averaged)
    assert_same(*(x.state_dict().values() for x in found), rtol=1e-5, atol=1e-6)
