"""Attached steps of which only numbers change look at little, and see all that changes."""

import copy
import pickle

import pytest
import torch
from oracle import assert_same_bits
from torch import nn
from torch.optim import SGD, AdamW

from fused_reg import Regularizer
from fused_reg.regularizer.repeats import Repeat


def make(kind=SGD, fused=True, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    optimizer = kind(net.parameters(), lr=0.125, fused=fused, **options)
    regularizer = Regularizer(net, l1=0.5, l2=lambda step: 0.25 * (1 + step))
    return net, optimizer, regularizer, regularizer.attach(optimizer)


def run(change, kind=SGD, steps=6, at=3, monkeypatch=None, **options):
    """All that steps leave, with a change before one of them; and how many of them were repeated."""
    repeated, own = [], Repeat.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Repeat,
            "run",
            lambda *args: (repeated.append(own(*args)), repeated[-1])[1] if options.get("repeats", True) else None,
        )
        net, optimizer, regularizer, attachment = make(kind)
        values = []
        for step in range(steps):
            optimizer.zero_grad()
            net(torch.ones(2, 5)).square().mean().backward()
            if step == at:
                change(net, optimizer, regularizer)
            optimizer.step()
            values.append(attachment.value.clone())
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    everything = [*net.parameters(), *grads, *values, *states, torch.tensor(float(regularizer.step))]
    return [x.detach().clone() for x in everything], sum(x is not None for x in repeated)


def _freeze(net, optimizer, regularizer):
    net[0].weight.requires_grad_(False)


def _lose_gradient(net, optimizer, regularizer):
    net[0].bias.grad = None


def _slow_down(net, optimizer, regularizer):
    optimizer.param_groups[0]["lr"] = 0.0625


def _stop(net, optimizer, regularizer):
    optimizer.param_groups[0]["lr"] = 0.0
    net.zero_grad(set_to_none=False)


def _strengthen(net, optimizer, regularizer):
    regularizer.set_strength(l1=0.75)


def _weaken_one(net, optimizer, regularizer):
    regularizer.set_strength(l1=0.0, where="0.weight")


def _mark(net, optimizer, regularizer):
    net[0].weight.note = "mine"


def _turn_around(net, optimizer, regularizer):
    optimizer.param_groups[0]["maximize"] = True


def _make_rate_a_tensor(net, optimizer, regularizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def _skip(net, optimizer, regularizer):
    optimizer.found_inf = torch.ones(())


def _scale(net, optimizer, regularizer):
    optimizer.grad_scale, optimizer.found_inf = torch.full((), 2.0), torch.zeros(())


def _hold_more(net, optimizer, regularizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


# Of the steps behind the first two, how many are repeated at least: what changes for good is known after a step.
CHANGES = [
    (lambda *_: None, 5),
    (_freeze, 3),
    (_lose_gradient, 2),
    (_slow_down, 5),
    (_stop, 3),
    (_strengthen, 4),
    (_weaken_one, 3),
    (_mark, 2),
    (_turn_around, 3),
    (_make_rate_a_tensor, 5),
    (_skip, 2),
    (_scale, 2),
    (_hold_more, 3),
]


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize(("change", "least"), CHANGES, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.filterwarnings("ignore:attach. L2 counts twice")
def test_same_bits_as_steps_that_look_at_everything(change, least, kind):
    found, repeated = run(change, kind)
    expected, never = run(change, kind, repeats=False)
    assert_same_bits(found, expected)
    assert repeated >= least
    assert never == 0


def test_an_error_is_worded_as_ever():
    net, optimizer, _, _ = make()
    for _ in range(3):
        net(torch.ones(2, 5)).square().mean().backward()
        optimizer.step()
    before = [p.detach().clone() for p in net.parameters()]
    net[0].weight.grad = net[0].weight.detach()
    with pytest.raises(ValueError, match=r"accumulate_grad_: params\['0\.weight'\]\.grad must not share memory"):
        optimizer.step()
    assert_same_bits(list(net.parameters()), before)


def test_a_parameter_that_is_replaced_is_seen():
    net, optimizer, _, _ = make()
    for _ in range(3):
        net(torch.ones(2, 5)).square().mean().backward()
        optimizer.step()
    net[1] = nn.Linear(4, 1)
    net(torch.ones(2, 5)).square().mean().backward()
    missing = pytest.warns(UserWarning, match="must be in an attached optimizer")
    with pytest.warns(UserWarning, match="it follows its module"), missing:
        optimizer.step()


def test_a_copy_has_nothing_of_it():
    net, optimizer, _, attachment = make()
    net(torch.ones(2, 5)).square().mean().backward()
    optimizer.step()
    assert attachment._last is not None
    attachment._table = attachment._share = None  # a schedule that is a lambda is not pickled
    assert pickle.loads(pickle.dumps(attachment))._last is None
    assert copy.copy(attachment)._last is None
