"""A `Regularizer` in the pass of an optimizer of ours."""

import copy

import pytest
import torch
from optim_cases import ONE_EACH, PENALTY, assert_same, assert_same_states, backward, given, named, net, pair, train

from fused_reg import Regularizer, fused_penalty, optim
from fused_reg._one_pass import OnePass
from fused_reg.regularizer.attachment import _PROX

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
MODES = pytest.mark.parametrize("mode", ["grad", "prox"])
TERMS = [
    PENALTY,
    {"l1": 0.02, "smooth_l1": 0.05, "beta": 0.1},
    {"l2_norm": 0.05},
    {"l1": 0.01, "l2": 0.02, "l2_norm": 0.05, "group": "row"},
    {"l2_norm": 0.05, "group": "column"},
]


@pytest.fixture(autouse=True)
def no_turns(monkeypatch):
    """The pass is taken, and never the steps in turn."""

    def fail(*_):
        raise AssertionError("in turn")

    monkeypatch.setattr(OnePass, "_step_in_turn", fail)


def without_decay(options):
    return {**options, "weight_decay": 0.0}


@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(terms))
@MODES
@EACH
def test_as_attached_to_torchs(name, options, mode, terms):
    found = []
    for kind in pair(name):
        model = net()
        optimizer = kind(model.parameters(), **without_decay(options))
        regularizer = Regularizer(model, **terms)
        attachment = regularizer.attach(optimizer, mode=mode)
        for i in range(4):
            backward(model, i)
            kept = [p.grad.clone() for p in model.parameters()]
            before = regularizer().detach()
            optimizer.step()
            if kind is pair(name)[1]:
                assert_same([p.grad for p in model.parameters()], kept, rtol=0, atol=0)
                torch.testing.assert_close(attachment.value, before)
                assert torch.equal(attachment.value, optimizer.penalty)
        found.append(([p.detach() for p in model.parameters()], optimizer))
    assert_same(found[0][0], found[1][0])
    assert_same_states(found[0][1], found[1][1])


@MODES
@EACH
def test_as_options(name, options, mode):
    """The same bits as with the strengths as options of the optimizer, value included."""
    a, b = net(), net()
    attached = pair(name)[1](a.parameters(), **without_decay(options))
    attachment = Regularizer(a, **PENALTY).attach(attached, mode=mode)
    own = pair(name)[1](b.parameters(), **without_decay(options), **PENALTY, prox=mode == "prox")
    train(a, attached)
    train(b, own)
    assert_same(a, b, rtol=0, atol=0)
    assert torch.equal(attachment.value, own.penalty)


@EACH
def test_by_element(name, options):
    a, b = net(), net()
    attached = pair(name)[1](a.parameters(), **without_decay(options))
    Regularizer(a, **PENALTY).attach(attached, mode="preconditioned")
    train(a, attached)
    train(b, pair(name)[1](b.parameters(), **without_decay(options), **PENALTY, prox="preconditioned"))
    assert_same(a, b, rtol=0, atol=0)


@MODES
def test_rules_schedules_and_changes(mode):
    """Strengths by name, that change by the step and by hand, of part of the parameters, in two groups."""
    found = []
    for kind in pair("Adam"):
        model = net()
        rules = [("*.weight", {"l1": lambda step: 0.02 * step, "l2": 0.1}), ("2.bias", {"l1": torch.tensor(0.05)})]
        regularizer = Regularizer(model, rules=rules)
        groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "lr": 0.02}]
        optimizer = kind(groups, lr=0.01)
        attachment = regularizer.attach(optimizer, mode=mode)
        values = []
        for i in range(6):
            if i == 3:
                regularizer.set_strength(l2=0.5, where="2.weight")
            backward(model, i)
            if i == 4:
                model[2].bias.grad = None
            before = regularizer().detach()
            optimizer.step()
            values.append(attachment.value if mode == "grad" or kind is pair("Adam")[1] else before)
            torch.testing.assert_close(values[-1], before)
            assert regularizer.step == i + 1
        found.append(([p.detach() for p in model.parameters()], values))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


def test_what_is_frozen_or_unused():
    """Without a penalty where it is frozen; where it is not used it counts in the value, and stays as it is."""
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    attachment = Regularizer(model, l1=0.25).attach(optimizer)
    given(optimizer)
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = None
    before = copy.deepcopy(model)
    optimizer.step()
    assert torch.equal(model[0].weight, before[0].weight - 0.5 * model[0].weight.grad)
    assert torch.equal(model[0].bias, before[0].bias)
    counted = [before[0].bias, *before[2].parameters()]
    torch.testing.assert_close(attachment.value, fused_penalty(counted, 0.25).detach())


@MODES
def test_unused_with_a_penalty(mode):
    found = []
    for kind in pair("SGD"):
        model = net()
        optimizer = kind(model.parameters(), lr=0.5)
        Regularizer(model, **PENALTY).attach(optimizer, mode=mode, include_unused=True)
        backward(model, 0)
        model[0].bias.grad = None
        optimizer.step()
        found.append(model)
    assert_same(*found)


def test_beside_a_penalty_of_its_own():
    model, other = net(), net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, l1=0.01)
    attachment = Regularizer(model, l2=0.02).attach(optimizer)
    train(model, optimizer)
    train(other, optim.SGD(other.parameters(), lr=0.1, l1=0.01, l2=0.02))
    assert_same(model, other)
    assert attachment.value > 0
    assert optimizer.penalty > attachment.value


def test_two_of_them():
    model, other = net(), net()
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    one, two = Regularizer(model[0], l1=0.02).attach(optimizer), Regularizer(model[2], l2=0.02).attach(optimizer)
    theirs = torch.optim.Adam(other.parameters(), lr=0.1)
    three, four = Regularizer(other[0], l1=0.02).attach(theirs), Regularizer(other[2], l2=0.02).attach(theirs)
    train(model, optimizer)
    train(other, theirs)
    assert_same(model, other)
    torch.testing.assert_close((one.value, two.value), (three.value, four.value))


@MODES
def test_closures(mode):
    found = []
    for kind in pair("RMSprop"):
        model = net()
        optimizer = kind(model.parameters(), lr=0.1)
        attachment = Regularizer(model, **PENALTY).attach(optimizer, mode=mode)
        losses = []
        for i in range(3):

            def closure(i=i, model=model):
                backward(model, i)
                return torch.ones(())

            losses.append(optimizer.step(closure))
        found.append(([p.detach() for p in model.parameters()], losses))
        attachment.remove()
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-9)


class Around(optim.SGD):
    """A step around ours, which doubles gradients first."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = p.grad * 2
        return super().step(closure)


class Instead(optim.SGD):
    """A step of its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])


@MODES
@pytest.mark.parametrize("kind", [Around, Instead])
def test_subclasses(kind, mode):
    model = net()
    optimizer = kind(model.parameters(), lr=0.1)
    Regularizer(model, l2=0.05).attach(optimizer, mode=mode)
    given(optimizer)
    before = copy.deepcopy(model)
    grads = [p.grad.clone() * (2 if kind is Around else 1) for p in model.parameters()]
    optimizer.step()
    for p, q, g in zip(model.parameters(), before.parameters(), grads, strict=True):
        expected = q - 0.1 * (g + 0.1 * q) if mode == "grad" else (q - 0.1 * g) / 1.01
        torch.testing.assert_close(p, expected)


def test_a_scaler():
    """Of a step that it skips nothing is left, also of the value and the schedule."""
    model = net(torch.float32)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    regularizer = Regularizer(model, l1=lambda step: 0.1 + step)
    attachment = regularizer.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i, factor in enumerate((1.0, float("inf"), 1.0)):
        value, step = attachment.value, regularizer.step
        optimizer.zero_grad()
        x = torch.randn(8, 10, generator=torch.Generator().manual_seed(i))
        scaler.scale(model(x).square().mean() * factor).backward()
        before = copy.deepcopy(model)
        scaler.step(optimizer)
        scaler.update()
        if i == 1:
            assert_same(model, before, rtol=0, atol=0)
            assert (attachment.value, regularizer.step) == (value, step)
        else:
            assert regularizer.step == step + 1
            torch.testing.assert_close(attachment.value, fused_penalty(before.parameters(), 0.1 + step).detach())


@pytest.mark.parametrize(
    ("kind", "options", "terms", "message"),
    [
        (torch.optim.SGD, {}, {"l1": 0.1}, "must be the only penalty in the pass of an optimizer of fused_reg.optim"),
        (optim.SGD, {"l2": 0.1}, {"l1": 0.1}, "l1 and l2 of its own must be 0"),
        (Instead, {}, {"l1": 0.1}, "the step must be its own"),
        (optim.SGD, {}, {"l2_norm": 0.1}, "must have no term but l1 and l2, got l2_norm of '0.weight'"),
        (optim.SGD, {}, {"smooth_l1": 0.1}, "got smooth_l1 of '0.weight'"),
    ],
)
def test_no_rate_of_each_element(kind, options, terms, message):
    """An error at once, and nothing is attached."""
    model = net()
    optimizer = kind(model.parameters(), lr=0.1, **options)
    with pytest.raises(ValueError, match=f'attach: mode "preconditioned" .*{message}'):
        Regularizer(model, **terms).attach(optimizer, mode="preconditioned")
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("mode", ["grad", "prox", "preconditioned"])
def test_an_interrupted_step(mode):
    """Nothing of it is left: neither in the next step, nor where the attachment is gone."""
    model, other = net(), net()
    optimizer, regularizer = optim.SGD(model.parameters(), lr=0.1), Regularizer(model, **PENALTY)
    attachment = regularizer.attach(optimizer, mode=mode)

    def interrupt(*_):
        raise KeyboardInterrupt

    def check(same):
        given(same)
        given(optimizer)
        same.step()
        optimizer.step()
        assert_same(model, other)

    hook = optimizer.register_step_pre_hook(interrupt)
    for remove in (False, True):
        given(optimizer)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        if remove:
            attachment.remove()
        hook.remove()
        check(optim.SGD(other.parameters(), lr=0.1, **({} if remove else PENALTY), prox=_PROX[mode]))
        hook = optimizer.register_step_pre_hook(interrupt)


@pytest.mark.parametrize("mode", ["prox", "preconditioned"])
@pytest.mark.parametrize("include_unused", [False, True])
def test_what_a_closure_changes(mode, include_unused):
    """Strengths, and which parameters have a gradient."""
    model, other = net(), net()
    optimizer, regularizer = optim.SGD(model.parameters(), lr=0.1), Regularizer(model, l1=0.02)
    regularizer.attach(optimizer, mode=mode, include_unused=include_unused)
    for i in range(3):

        def closure(i=i):
            backward(model, i)
            regularizer.set_strength(l1=0.02 + i)

        optimizer.step(closure)
        train(other, optim.SGD(other.parameters(), lr=0.1, l1=0.02 + i, prox=True), [i])
    assert_same(model, other)


def test_wrong_in_a_later_launch():
    """Nothing is written by the first."""
    w, b, strength = (torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2)), torch.tensor(0.1))
    optimizer = optim.SGD([{"params": [w], "momentum": 0.9}, {"params": [b]}], lr=0.1)
    Regularizer([("w", w), ("b", b)], l1=0.1, rules=[("b", {"l1": strength})]).attach(optimizer)
    given(optimizer).step()
    kept = [w.detach().clone(), b.detach().clone()]
    strength.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"SGD: l1.* must be finite and >= 0"):
        optimizer.step()
    assert_same([w, b], kept, rtol=0, atol=0)


def test_penalty_of_the_optimizer():
    """That of all that is in its steps, whichever way it enters."""
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    one = Regularizer(model[0], l1=0.02).attach(optimizer)
    assert torch.equal(optimizer.penalty, one.value)
    two = Regularizer(model[2], l2=0.02).attach(optimizer)
    torch.testing.assert_close(optimizer.penalty, one.value + two.value)
    before = optimizer.penalty
    optimizer.step(lambda: given(optimizer) and None)
    torch.testing.assert_close(optimizer.penalty, before)
    two.remove()
    assert torch.equal(optimizer.penalty, one.value)


def test_momentum_without_an_end():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([w], lr=0.1, momentum=1.0)
    Regularizer([("w", w)], l1=0.1).attach(optimizer, mode="preconditioned")
    with pytest.raises(ValueError, match="SGD: momentum must be < 1"):
        given(optimizer).step()
    assert bool((w == 1).all())


@MODES
def test_rows_beside_a_maximized_group(mode):
    """Parameters without norms stand alone in a call of their own."""
    p, q = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([{"params": [p]}, {"params": [q], "maximize": True}], lr=0.1)
    rules = [("p", {"l2_norm": 0.1, "group": "row"})]
    Regularizer([("p", p), ("q", q)], l1=0.1, rules=rules).attach(optimizer, mode=mode)
    p.grad, q.grad = torch.zeros(3, 4), torch.zeros(3)
    optimizer.step()
    assert bool((p < 1).all())
    assert bool((q < 1).all())
