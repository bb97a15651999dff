"""Steps of `fused_reg.optim` as training loops make them: hooks, closures, schedulers, scalers, wrappers, compilers."""

import copy
import warnings

import pytest
import torch
from optim_cases import (
    CASES,
    ONE_EACH,
    PENALTY,
    assert_same,
    assert_same_states,
    backward,
    given,
    named,
    net,
    pair,
    train,
)
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fused_reg import Regularizer, optim

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
ALL = pytest.mark.parametrize(("name", "options"), named(CASES))


class Odd(torch.nn.Parameter):
    """A parameter that no kernel takes as it is."""


def made(name="SGD", options=(), kind=torch.nn.Parameter, **more):
    p = kind(torch.linspace(-1, 1, 9))
    return p, given(pair(name)[1]([p], **dict(options), **more))


@ALL
@pytest.mark.parametrize("prox", [False, True])
def test_in_turn(name, options, prox):
    """What no kernel takes has the penalty, torch's step and the proximal step in turn."""
    found, options = [], {k: x for k, x in options.items() if k != "lr_decay"}
    for kind in (torch.nn.Parameter, Odd):
        p, optimizer = made(name, options, kind, **PENALTY, prox=prox)
        rest = kind(torch.ones(3))
        optimizer.add_param_group({"params": [rest], "l1": 1.0})
        if name == "Adagrad":
            optimizer.state[rest] = {"step": torch.tensor(0.0), "sum": torch.zeros(3)}  # which torch does not make
        for i in range(3):
            given(optimizer, i)
            rest.grad = None
            optimizer.step()
        found.append((p.detach().clone().as_subclass(torch.Tensor), rest.detach().as_subclass(torch.Tensor)))
        found[-1] += (optimizer.penalty.as_subclass(torch.Tensor),)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    for group in optimizer.param_groups:
        group.update(l1=0.0, l2=0.0)
    optimizer.step()
    assert optimizer.penalty == 0


@pytest.mark.parametrize("kind", [torch.nn.Parameter, Odd])
def test_hooks(kind):
    """Each runs once, in order, and sees what `step` was given; a hook may change it."""
    _, optimizer = made(kind=kind, l1=0.1)
    seen = []

    def before(o, args, kwargs):
        seen.append(("before", o is optimizer, args[1:], kwargs))

    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    closure = lambda: seen.append("closure")  # noqa: E731
    optimizer.step(closure=closure)
    assert seen == ["all before", ("before", True, (), {"closure": closure}), "closure", "after", "all after"]
    handles.append(optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {"closure": lambda: 7})))
    assert optimizer.step() == 7
    for handle in handles:
        handle.remove()
    seen.clear()
    optimizer.step()
    assert seen == []


@pytest.mark.parametrize(
    "register",
    [
        lambda o, hook: o.register_step_pre_hook(hook),
        lambda o, hook: o.register_step_post_hook(hook),
        lambda o, hook: register_optimizer_step_pre_hook(hook),
        lambda o, hook: register_optimizer_step_post_hook(hook),
    ],
)
def test_a_hook_alone(register):
    _, optimizer = made()
    seen = []
    handle = register(optimizer, lambda *_: seen.append(1))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [1]


def test_hooks_of_torch():
    """Those that torch has put around its own step, if one was made before this package was imported, do not run."""
    made_before = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    assert made_before.step.__func__.hooked

    class New(optim.SGD):
        _pass = 0

    optimizer = given(New([Odd(torch.ones(3))], l1=0.1))
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    optimizer.step()
    assert seen == [1]


def test_profile():
    _, optimizer = made()
    with torch.profiler.profile(acc_events=True) as profile:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in [event.key for event in profile.key_averages()]


@EACH
def test_closure(name, options):
    """With gradients, and its result passed through as it is, as with LBFGS."""
    p, optimizer = made(name, options, **PENALTY)
    result = object()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        p.square().sum().backward()
        return result

    before = p.detach().clone()
    with torch.no_grad():
        assert optimizer.step(closure) is result
    assert not torch.equal(p.detach(), before)
    assert optimizer.step() is None
    optimizer.zero_grad(set_to_none=False)
    assert bool((p.grad == 0).all())
    optimizer.zero_grad()
    assert p.grad is None
    assert optimizer.step() is None


@EACH
def test_schedulers(name, options):
    """With a rate as a number and as a tensor."""
    a, b, c = net(), net(), net()
    options = {k: x for k, x in options.items() if k != "lr"}
    theirs = pair(name)[0](a.parameters(), lr=0.01, **options)
    ours, of_tensor = (
        pair(name)[1](m.parameters(), lr=lr, **options) for m, lr in ((b, 0.01), (c, torch.tensor(0.01)))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.01, 6, cycle_momentum=False) for o in (theirs, ours)]
        schedulers.append(torch.optim.lr_scheduler.OneCycleLR(of_tensor, 0.01, 6, cycle_momentum=False))
        for i in range(5):
            for model, optimizer, scheduler in zip((a, b, c), (theirs, ours, of_tensor), schedulers, strict=True):
                train(model, optimizer, [i])
                scheduler.step()
    assert_same(a, b)
    assert_same(a, c, rtol=1e-5, atol=1e-6)  # a rate in float32


def test_zero_rates():
    """A rate of 0 leaves the weights; one that a schedule has made negative by a rounding is as with torch."""
    for lr in (0.0, -1e-9):
        for prox in (False, True):
            a, b = net(), net()
            theirs, ours = torch.optim.SGD(a.parameters()), optim.SGD(b.parameters(), l1=1e-3, prox=prox)
            for optimizer in (theirs, ours):
                optimizer.param_groups[0]["lr"] = lr
            train(a, theirs)
            train(b, ours)
            assert_same(a, b, rtol=0, atol=1e-10)


@EACH
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, Odd])
def test_scaler(name, options, fused, kind):
    """The gradient is unscaled before the penalty. An overflow, also at the first step, leaves all as it is."""
    if name == "RMSprop" and fused:
        return  # torch has none
    fused = {"fused": True} if fused else {}
    p, optimizer = made(name, options, kind, **PENALTY, **fused)
    q, plain = made(name, options, **PENALTY)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, backoff_factor=0.5, growth_interval=100)
    for i, factor in enumerate((float("inf"), 1.0, float("nan"), 3.0)):
        state, before, penalty = copy.deepcopy(optimizer.state_dict()), p.detach().clone(), optimizer.penalty.clone()
        optimizer.zero_grad()
        scaler.scale((p * torch.linspace(1, 2, 9)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if i % 2 == 0:
            torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
            torch.testing.assert_close((p.detach(), optimizer.penalty), (before, penalty), rtol=0, atol=0)
        else:
            q.grad = torch.linspace(1, 2, 9) * factor
            plain.step()
            torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), q.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                p.grad.as_subclass(torch.Tensor) if kind is not Odd else q.grad, q.grad, rtol=1e-6, atol=0
            )


@EACH
def test_distributed_checkpoint(name, options):
    """The helpers' step that is none makes the states and changes no weight; the state comes back, torch's too."""
    for kind in pair(name):
        a, b = net(), net()
        saving, loading = kind(a.parameters(), **options), pair(name)[1](b.parameters(), **options, **PENALTY)
        train(a, saving)
        before = [p.detach().clone() for p in b.parameters()]
        values = loading.penalty
        set_optimizer_state_dict(b, loading, get_optimizer_state_dict(a, saving))
        assert_same_states(saving, loading)
        assert_same(b.parameters(), before, rtol=0, atol=0)
        if kind is pair(name)[0]:
            assert loading.param_groups[0]["l1"] == PENALTY["l1"]
            torch.testing.assert_close(loading.penalty, values)


@ALL
def test_inert(name, options):
    """A step with rates and gradients of 0 makes the states that torch's makes, without a penalty; a gradient that is
    not 0 makes it a step."""
    a, b = net(), net()
    theirs, ours = pair(name)[0](a.parameters(), **options), pair(name)[1](b.parameters(), **options, **PENALTY)
    backward(b, 0)
    ours.zero_grad()
    before = ours.penalty
    for optimizer in (theirs, ours):
        optimizer.param_groups[0]["lr"] = 0.0
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same_states(theirs, ours)
    assert_same(a, b, rtol=0, atol=0)
    assert ours.penalty == before
    if "momentum" in options and name == "SGD":
        next(iter(b.parameters())).grad[0, 0] = 1.0
        state = copy.deepcopy(ours.state_dict()["state"][1])
        ours.step()
        assert not torch.equal(ours.state_dict()["state"][1]["momentum_buffer"], state["momentum_buffer"])


@EACH
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("kind", [torch.nn.Parameter, Odd])
def test_no_gradients(name, options, lr, kind):
    """A step without any is none: the value stays that of the last one, whatever becomes of the weights."""
    p, optimizer = made(name, {**options, "lr": lr}, kind, **PENALTY)
    optimizer.step()
    before, state = optimizer.penalty, copy.deepcopy(optimizer.state_dict()["state"])
    p.grad = None
    with torch.no_grad():
        p *= 2
    optimizer.step()
    assert optimizer.penalty == before
    torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


class Doubled(optim.SGD):
    """As users write them: a step around that of the base class, and an initializer of its own."""

    def __init__(self, params, factor=2.0):
        super().__init__(params, lr=0.1, momentum=0.5, l1=0.01)
        self.factor = factor

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad *= self.factor
        return super().step(closure)


def test_subclass():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    own, plain = Doubled([p], 4.0), optim.SGD([q], lr=0.1, momentum=0.5, l1=0.01)
    for _ in range(2):
        p.grad, q.grad = torch.full((3,), 0.25), torch.ones(3)
        assert own.step(lambda: 3) == 3
        plain.step()
    assert_same([p], [q], rtol=0, atol=0)
    copy.deepcopy(own)
    attachment = Regularizer([("p", p)], l2=0.5).attach(own)
    p.grad, q.grad = torch.full((3,), 0.25), 1 + q.detach()
    own.step()
    plain.step()
    assert_same([p], [q], rtol=1e-6, atol=0)
    assert attachment.value > 0


@pytest.mark.parametrize("broken", ["sparse", "complex"])
def test_unsupported(broken):
    """An error before anything is written, or torch's own step where there is no penalty."""
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64 if broken == "complex" else None))
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([{"params": [p]}, {"params": [w], "l2": 0.5}], lr=0.5, l1=0.5)
    p.grad, w.grad = torch.ones(2), torch.ones(2, dtype=w.dtype)
    if broken == "sparse":
        w.grad = w.grad.to_sparse()
    message = {
        "sparse": r"params\[0\].grad must be dense .* got torch.sparse",
        "complex": r"params\[0\] must be real .*",
    }
    with pytest.raises(TypeError, match=f"SGD: {message[broken]}"):
        optimizer.step()
    assert bool((p == 1).all())
    for group in optimizer.param_groups:
        group.update(l1=0.0, l2=0.0)
    optimizer.step()
    assert bool((p == 0.5).all())
    assert bool((w == 0.5).all())


def test_preconditioned_in_turn():
    p, optimizer = made(kind=Odd, l1=0.1, prox="preconditioned")
    before = p.detach().clone()
    with pytest.raises(NotImplementedError, match='SGD: prox="preconditioned" must have parameters that'):
        optimizer.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.long
@EACH
def test_compiled(name, options):
    """A compiled training step leaves the optimizer's as it is, outside of the graph, as torch's does: a rate or a
    strength that changes compiles nothing anew."""
    from torch._dynamo.testing import CompileCounter  # which takes a second

    found, counter = [], CompileCounter()
    for compiled in (False, True):
        model, graphs = net(), []
        optimizer = pair(name)[1](model.parameters(), **options, **PENALTY)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def step(model=model, optimizer=optimizer):
            loss = model(torch.ones(4, 10, dtype=torch.float64)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(step, backend=counter) if compiled else step
        for i in range(5):
            run()
            scheduler.step()
            optimizer.param_groups[0]["l1"] = 0.01 * i
            graphs.append(counter.frame_count)
        assert graphs[1:] == graphs[1:2] * 4
        assert (graphs[1] > 0) is compiled
        found.append(([p.detach() for p in model.parameters()], optimizer.penalty))
    torch.testing.assert_close(*found, rtol=0, atol=0)
