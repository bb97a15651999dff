"""Schedules that can be pickled: their numbers by formulas, and a training that goes on as if it had not stopped."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from test_regularizer import strengths_of
from torch import nn

from fused_reg import Regularizer, regularized
from fused_reg.schedules import CosineRamp, CubicRamp, LinearRamp, PatternRamp

STEPS = (0, 1, 2, 3, 5, 6, 9, 10, 11, 1000)


def share(step):
    return min(max(step - 2, 0) / 7, 1)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.3), (0.3, 0.0), (0.1, 0.7), (0.7, 0.7), (0, 1)])
def test_formulas(start, end):
    for step in STEPS:
        x = share(step)
        linear = LinearRamp(start, end, steps=7, delay=2)(step)
        assert linear == pytest.approx(start + (end - start) * x, rel=1e-14, abs=1e-16)
        cosine = CosineRamp(start, end, steps=7, delay=2)(step)
        assert cosine == pytest.approx(end + (start - end) * (1 + math.cos(math.pi * x)) / 2, rel=1e-14, abs=1e-16)
        cubic = CubicRamp(start, end, steps=7, delay=2)(step)
        assert cubic == pytest.approx(end + (start - end) * (1 - x) ** 3, rel=1e-14, abs=1e-16)
        assert PatternRamp("2:4", steps=7, delay=2)(step) == pytest.approx(1 - (1 - x) ** 3, rel=1e-14)


@pytest.mark.parametrize("kind", [LinearRamp, CosineRamp, CubicRamp])
def test_both_ends_are_exact(kind):
    ramp = kind(0.7, 0.1, steps=10, delay=3)  # 0.7 + (0.1 - 0.7) is not 0.1
    assert [ramp(step) for step in (0, 3, 13, 100)] == [0.7, 0.7, 0.1, 0.1]


def test_cosine_is_that_of_learning_rates():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.125)
    for step in range(7):
        assert CosineRamp(0.5, 0.125, steps=6)(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", [LinearRamp, CosineRamp, CubicRamp])
def test_as_a_value(kind):
    ramp = kind(0.0, 0.5, steps=4)
    assert repr(ramp) == f"{kind.__name__}(start=0.0, end=0.5, steps=4, delay=0)"
    assert ramp == kind(0.0, 0.5, 4) != kind(0.0, 0.5, 5)
    assert LinearRamp(0.0, 0.5, 4) != CosineRamp(0.0, 0.5, 4)
    for again in (copy.deepcopy(ramp), pickle.loads(pickle.dumps(ramp))):
        assert again == ramp
    with pytest.raises(AttributeError):
        ramp.start = 1.0


def make_training():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    regularized(net[1], l2=CosineRamp(0.5, 0.125, steps=5))
    regularizer = Regularizer(net, l1=LinearRamp(0.0, 0.25, steps=4, delay=1))
    return net, regularizer


def steps(net, regularizer, count):
    """Some attached steps of SGD."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with regularizer.attach(optimizer):
        for _ in range(count):
            optimizer.zero_grad()
            net(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()


def saved_and_loaded(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_state_dicts(pair):
    net, regularizer = make_training()
    net.load_state_dict(pair[0].state_dict())
    regularizer.load_state_dict(pair[1].state_dict())
    return net, regularizer


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), saved_and_loaded, of_state_dicts]
)
def test_a_training_goes_on(again):
    net, regularizer = make_training()
    steps(net, regularizer, 3)
    other, others = again((net, regularizer))
    for pair in ((net, regularizer), (other, others)):
        steps(*pair, 2)
    assert others.step == regularizer.step == 5
    assert strengths_of(others) == strengths_of(regularizer)
    assert strengths_of(others)["0.weight"] == (0.25, 0, 0)
    assert strengths_of(others)["1.weight"] == (0, 0.125, 0)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    config = regularizer.get_config()
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("kind", [LinearRamp, CosineRamp, CubicRamp])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"start": -1.0}, ValueError, "start must be finite and >= 0, got -1.0"),
        ({"end": math.inf}, ValueError, "end must be finite and >= 0, got inf"),
        ({"end": "0.5"}, TypeError, "end must be a number, got str"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"steps": 2.5}, ValueError, "steps must be an integer >= 1, got 2.5"),
        ({"steps": True}, ValueError, "steps must be an integer >= 1, got True"),
        ({"delay": -1}, ValueError, "delay must be an integer >= 0, got -1"),
    ],
)
def test_errors(kind, given, error, message):
    with pytest.raises(error, match=f"^{kind.__name__}: {re.escape(message)}$"):
        kind(**({"start": 0.0, "end": 0.5, "steps": 4} | given))


def test_a_pattern_as_a_value():
    ramp = PatternRamp("2:4", steps=4)
    assert repr(ramp) == "PatternRamp(pattern='2:4', steps=4, delay=0)"
    for again in (copy.deepcopy(ramp), pickle.loads(pickle.dumps(ramp))):
        assert again == ramp != PatternRamp("1:4", steps=4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pattern": "4:4"}, ValueError, 'pattern must be "n:m" with 1 <= n < m <= 64, as "2:4", got \'4:4\''),
        ({"pattern": "0:4"}, ValueError, 'pattern must be "n:m" with 1 <= n < m <= 64, as "2:4", got \'0:4\''),
        ({"pattern": "2:4 "}, ValueError, 'pattern must be "n:m" with 1 <= n < m <= 64, as "2:4", got \'2:4 \''),
        ({"pattern": 0.5}, TypeError, 'pattern must be a string as "2:4", got float'),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
    ],
)
def test_errors_of_patterns(given, error, message):
    with pytest.raises(error, match=f"^PatternRamp: {re.escape(message)}$"):
        PatternRamp(**({"pattern": "2:4", "steps": 4} | given))
