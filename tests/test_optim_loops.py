"""Loops around `fused_reg.optim` as users write them: one optimizer a parameter, hooks, modes, classes of their own."""

import copy
import gc
import weakref

import pytest
import torch
from optim_cases import ONE_EACH, PENALTY, assert_same, assert_same_states, backward, given, named, net, pair, train
from torch.optim.lr_scheduler import ExponentialLR

from fused_reg import optim

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))


@EACH
def test_a_step_in_backward(name, options):
    """One optimizer a parameter, which steps as soon as the gradient is there, and drops it."""
    found = []
    for overlaps in (False, True):
        model = net()
        kind, of_ours = pair(name)[1], {**options, **PENALTY}
        if overlaps:
            own = {p: kind([p], **of_ours) for p in model.parameters()}

            def step(p, own=own):
                own[p].step()
                own[p].zero_grad()

            for p in model.parameters():
                p.register_post_accumulate_grad_hook(step)
            for i in range(3):
                backward(model, i)
            assert all(p.grad is None for p in model.parameters())
            found.append((model, sum(o.penalty for o in own.values())))
        else:
            optimizer = kind(model.parameters(), **of_ours)
            train(model, optimizer, range(3))
            found.append((model, optimizer.penalty))
    assert_same(found[0][0], found[1][0], rtol=0, atol=0)
    torch.testing.assert_close(found[0][1], found[1][1])


@EACH
def test_penalty_in_hooks(name, options):
    """Before a step that of the last one, after it that of this one, as a number of its own."""
    model = net()
    optimizer = pair(name)[1](model.parameters(), **options, **PENALTY)
    before, after = [], []
    optimizer.register_step_pre_hook(lambda o, *_: before.append(o.penalty))
    optimizer.register_step_post_hook(lambda o, *_: after.append(o.penalty))
    train(model, optimizer, range(3))
    assert before[0] == after[0]  # none was made
    assert before[1:] == after[:-1]
    assert len({float(x) for x in after}) == 3


@EACH
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes(name, options, mode):
    """A step is the same in each; what it makes there is of that mode, as torch's."""
    found = []
    for entered in (torch.no_grad, mode):
        model = net()
        optimizer = pair(name)[1](model.parameters(), **options, **PENALTY)
        for i in range(3):
            backward(model, i)
            with entered():
                optimizer.step()
                penalty = optimizer.penalty
        assert not penalty.requires_grad
        found.append((model, optimizer, penalty))
    assert_same(found[0][0], found[1][0], rtol=0, atol=0)
    assert_same_states(found[0][1], found[1][1], rtol=0, atol=0)
    assert torch.equal(found[0][2], found[1][2])


@EACH
def test_parameters_of_inference(name, options):
    found = []
    for kind in pair(name):
        with torch.inference_mode():
            model = net()
            optimizer = given(kind(model.parameters(), **options))
            for _ in range(2):
                optimizer.step()
        found.append(model)
    assert_same(*found)


@EACH
@pytest.mark.filterwarnings("ignore:Using backward")
def test_second_derivatives(name, options):
    """Gradients that have a graph of their own, which a step does not join."""
    found = []
    for kind in pair(name):
        model = net()
        optimizer = kind(model.parameters(), **options)
        for i in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 10, generator=torch.Generator().manual_seed(i)).double().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            slope.square().sum().backward(create_graph=True)
            optimizer.step()
        found.append((model, optimizer))
        assert all(p.is_leaf and p.requires_grad for p in model.parameters())
        states = [x for held in optimizer.state.values() for x in held.values() if x is not None]
        assert not any(x.requires_grad for x in states)
        optimizer.zero_grad()  # or they keep one another
    assert_same(found[0][0], found[1][0])
    assert_same_states(found[0][1], found[1][1])


class Logged(optim.AdamW):
    """A subclass with a name of its own, an option more, and a part of the step."""

    def __init__(self, params, lr=0.01, warm=2, **options):
        super().__init__(params, lr, **options)
        self.warm, self.rates = warm, []
        for group in self.param_groups:
            group.setdefault("asked", group["lr"])

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        for group in self.param_groups:
            group["lr"] = group["asked"] * min(1, len(self.rates) / self.warm)
        return super().step(closure)


class Halved(optim.SGD):
    """As many do: the update is changed where the base class has none of its own."""

    def __init__(self, params, *args, **options):
        super().__init__(params, *args, **options)
        self.defaults["factor"] = 0.5

    def add_param_group(self, group):
        group.setdefault("weight_decay", 0.1)
        super().add_param_group(group)

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none)


def test_subclasses():
    a, b = net(), net()
    own = Logged(a.parameters(), weight_decay=0.1, l1=0.01)
    plain = optim.AdamW(b.parameters(), 0.005, weight_decay=0.1, l1=0.01)
    train(a, own, [0])
    train(b, plain, [0])
    plain.param_groups[0]["lr"] = 0.01
    train(a, own, range(1, 4))
    train(b, plain, range(1, 4))
    assert_same(a, b, rtol=0, atol=0)
    assert repr(own).startswith("Logged (")
    assert "asked: 0.01" in repr(own)
    copied = copy.deepcopy(own)
    copied.load_state_dict(own.state_dict())
    assert type(copied) is Logged
    assert copied.penalty > 0
    halved = Halved(net().parameters(), lr=0.1, l2=0.5)
    assert (halved.param_groups[0]["weight_decay"], halved.param_groups[0]["l2"]) == (0.1, 0.5)
    given(halved).zero_grad()
    assert all(bool((p.grad == 0).all()) for p in halved.param_groups[0]["params"])


def test_a_subclass_with_defaults_of_its_own():
    """Which calls the initializer of all optimizers, and not that of its base."""
    found = []
    for base in pair("SGD"):

        class Bare(base):
            def __init__(self, params):
                keys = ("dampening", "weight_decay", "nesterov", "maximize", "foreach", "differentiable", "fused")
                torch.optim.Optimizer.__init__(self, params, {"lr": 0.1, "momentum": 0.5, **dict.fromkeys(keys, False)})

        model = net()
        optimizer = Bare(model.parameters())
        train(model, optimizer)
        found.append(model)
    assert_same(*found)
    optimizer.param_groups[0].update(PENALTY)
    optimizer.step()
    assert optimizer.penalty > 0


def test_a_scheduler_and_a_subclass():
    """The scheduler puts a function of its own around the step of this instance."""
    model = net()
    optimizer = Logged(model.parameters())
    ExponentialLR(optimizer, 0.5)
    train(model, optimizer)
    assert len(optimizer.rates) == 4
    assert optimizer._opt_called


def test_steps_keep_nothing_alive():
    """Neither gradients that are dropped, nor an optimizer that nobody has."""
    model, refs = net(), []
    for name, options in ONE_EACH:
        optimizer = pair(name)[1](model.parameters(), **options, **PENALTY)
        backward(model, 0)
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert all(ref() is None for ref in grads)
        refs.append(weakref.ref(optimizer))
    del optimizer
    gc.collect()
    assert all(ref() is None for ref in refs)


@EACH
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(name, options, set_to_none):
    """A step with gradients of 0 is one, a step without gradients is none: as torch's."""
    found = []
    for kind in pair(name):
        model = net()
        optimizer = kind(model.parameters(), **{**options, "weight_decay": 0.1})
        train(model, optimizer, [0])
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        found.append((model, optimizer))
    assert_same(found[0][0], found[1][0])
    assert_same_states(found[0][1], found[1][1])


def test_two_over_the_same_parameters():
    """Each has states and a penalty of its own: that of the weights which it finds."""
    found = []
    for place in (0, 1):
        model = net()
        first, second = (pair(name)[place](model.parameters(), lr=0.01) for name in ("SGD", "Adam"))
        for i in range(3):
            backward(model, i)
            first.step()
            second.step()
        found.append((model, second))
    assert_same(found[0][0], found[1][0])
    assert_same_states(found[0][1], found[1][1])
    for optimizer in (first, second):
        optimizer.param_groups[0]["l1"] = 1.0
        optimizer.step()
    assert first.penalty != second.penalty
