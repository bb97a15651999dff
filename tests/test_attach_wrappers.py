"""`Regularizer.attach` to optimizers that wrap others, and to subclasses that change gradients: as `weight_decay`, a
penalty enters in the innermost step. (Hard case 45.)

The classes are built as those of well-known packages. Each is trained with `weight_decay` and, instead, attached.
"""

import threading
from collections import OrderedDict, defaultdict

import pytest
import torch
from test_attach import X, Y, make
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from fused_reg import Regularizer

L2 = 0.05


def backward(net):
    loss = nn.functional.mse_loss(net(X.double()), Y.double())
    loss.backward()
    return loss


class Lookahead(Optimizer):
    """Has no initializer of `Optimizer`."""

    def __init__(self, base):
        self._base_optimizer = base
        self.param_groups, self.defaults, self.state = base.param_groups, base.defaults, defaultdict(dict)
        self.slow = [p.detach().clone() for p in base.param_groups[0]["params"]]
        self.count = 0

    def step(self, closure=None):
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)
        return loss


class HookedLookahead(Lookahead):
    """With hooks that nothing calls, as timm's."""

    def __init__(self, base):
        super().__init__(base)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()


class SharpnessAware(Optimizer):
    """Two steps, of which the second is that of its base."""

    def __init__(self, base):
        super().__init__(base.param_groups[0]["params"], {"rho": 0.05})
        self.base_optimizer, self.param_groups = base, base.param_groups

    @torch.no_grad()
    def first_step(self):
        params = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.climbed = [0.05 * p.grad / norm for p in params]
        torch._foreach_add_(params, self.climbed)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        torch._foreach_sub_(self.param_groups[0]["params"], self.climbed)
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Delegating(Optimizer):
    """All by properties of what it wraps, one of which fails."""

    def __init__(self, base):
        self.optimizer = base
        base.wrapper = self.wrapper = self  # cycles

    param_groups = property(lambda self: self.optimizer.param_groups)
    state, defaults = (
        property(lambda self, name=name: getattr(self.optimizer, name)) for name in ("state", "defaults")
    )
    broken = property(lambda self: 1 / 0)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class Private(Optimizer):
    """Rewrites the gradients before the step of what it wraps, and hands everything else on."""

    def __init__(self, base):
        self.original_optimizer = base

    def __getattr__(self, name):
        if name == "original_optimizer":
            raise AttributeError(name)
        return getattr(self.original_optimizer, name)

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad * 0.5 + 0.01
        return self.original_optimizer.step(closure)


class _Imitating:
    """Takes the class of what it wraps as a base."""

    def __init__(self, base):
        self._optimizer = base
        self.__class__ = type("Imitating" + type(base).__name__, (type(self), type(base)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Warming:
    """No optimizer, but with the methods of one."""

    def __init__(self, base):
        self._optimizer = base

    def zero_grad(self):
        self._optimizer.zero_grad()

    def step(self):
        for group in self._optimizer.param_groups:
            group["lr"] *= 0.9
        self._optimizer.step()


WRAPPERS = {
    "lookahead": Lookahead,
    "lookahead with hooks": HookedLookahead,
    "delegating": Delegating,
    "private": Private,
    "imitating": _Imitating,
    "warming": Warming,
    "two wrappers": lambda base: Lookahead(Delegating(base)),
    "three wrappers": lambda base: Warming(Delegating(HookedLookahead(base))),
}


def trained(kind, wrap, attached, scheduled=False, step=None, mode="grad"):
    """The weights after some steps, and the regularizer."""
    net = make().double()
    base = kind(net.parameters(), lr=0.1, weight_decay=0 if attached else 2 * L2)
    optimizer = wrap(base)
    if scheduled:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    regularizer = Regularizer(net, l2=L2)
    if attached:
        regularizer.attach(optimizer, mode)
    for _ in range(5):
        base.zero_grad()
        if step is None:
            backward(net)
            optimizer.step()
        else:
            step(net, optimizer)
        if scheduled:
            scheduler.step()
    return [p.detach() for p in net.parameters()], regularizer


def check(kind, wrap, **options):
    expected, _ = trained(kind, wrap, False, **options)
    actual, regularizer = trained(kind, wrap, True, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert regularizer.step == 5


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers(wrapper, kind):
    check(kind, WRAPPERS[wrapper])


@pytest.mark.parametrize("wrapper", ["lookahead", "lookahead with hooks", "delegating", "two wrappers"])
def test_wrappers_with_a_scheduler(wrapper):
    check(SGD, WRAPPERS[wrapper], scheduled=True)


def with_closure(net, optimizer):
    backward(net)
    optimizer.step(lambda: backward(net))


def in_two_steps(net, optimizer):
    backward(net)
    optimizer.first_step()
    backward(net)
    optimizer.second_step()


@pytest.mark.parametrize("step", [with_closure, in_two_steps])
def test_two_steps(step):
    check(SGD, SharpnessAware, step=step)


@pytest.mark.parametrize("wrapper", ["lookahead", "delegating", "imitating"])
def test_attached_once_within_and_without(wrapper):
    net = make()
    base = SGD(net.parameters(), lr=0.1)
    outer = WRAPPERS[wrapper](base)
    regularizer = Regularizer(net, l1=0.5)
    attachment = regularizer.attach(outer)
    assert attachment.optimizer is base
    for optimizer in (outer, base):
        with pytest.raises(ValueError, match="got one that is attached already"):
            regularizer.attach(optimizer)


def test_a_wrapper_whose_optimizer_holds_others():
    """Copies of the parameters, or one rank's share of them: the outer step is taken."""

    class Masters(Optimizer):
        def __init__(self, params):
            super().__init__(list(params), {"lr": 0.5})
            self.inner = SGD([nn.Parameter(p.detach().clone()) for p in self.param_groups[0]["params"]], lr=0.5)

        @torch.no_grad()
        def step(self, closure=None):
            for p, master in zip(self.param_groups[0]["params"], self.inner.param_groups[0]["params"], strict=True):
                master.grad = p.grad
                self.inner.step()
                p.copy_(master)

    w = nn.Parameter(torch.ones(1))
    optimizer = Masters([w])
    assert Regularizer([w], l1=0.25).attach(optimizer).optimizer is optimizer
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 1 - 0.125


def test_a_wrapper_with_two_optimizers_of_all():
    """Which of them steps, nobody knows: the outer step is taken."""

    class Switching(Optimizer):
        def __init__(self, params):
            params = list(params)
            super().__init__(params, {"lr": 0.5})
            self.first, self.second = SGD(params, lr=0.5), SGD(params, lr=0.25)

        def step(self, closure=None):
            self.second.step()

    w = nn.Parameter(torch.ones(1))
    optimizer = Switching([w])
    assert Regularizer([w], l1=0.25).attach(optimizer).optimizer is optimizer
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 1 - 0.0625


class Averaging:
    """Schedule-free around another optimizer."""

    def __init__(self, base):
        self.base, self.state = base, {}

    @property
    def param_groups(self):
        return self.base.param_groups

    def zero_grad(self):
        self.base.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            x, z, k = self.state.get(p, (p.clone(), p.clone(), 0))
            p.copy_(z)
            self.state[p] = (x, p, k + 1)
        self.base.step()
        for p, (x, z, k) in list(self.state.items()):
            self.state[p] = (x.lerp(z, 1 / (k + 1)), z.clone(), k)
            p.copy_(self.state[p][0].lerp(z, 0.1))


class Passing(Averaging):
    """A trainer's, which is not copied."""

    def __init__(self, base):
        super().__init__(base)
        self.trainer = threading.Lock()

    def step(self, closure=None):
        self.base.step()


@pytest.mark.parametrize("trained", [False, True])
def test_a_wrapper_that_undoes_it(trained):
    net = nn.Linear(12, 9)
    base = torch.optim.Adam(net.parameters(), lr=0.1)
    if trained:
        net(torch.ones(12)).sum().backward()
        base.step()
    with pytest.raises(ValueError, match="got Averaging, whose weights are a function of its state"):
        Regularizer(net, l1=0.1).attach(Averaging(base), "prox")
    for wrapper in (Passing(base), base):
        Regularizer(net, l1=0.1).attach(wrapper, "prox").remove()
    Regularizer(net, l1=0.1).attach(Averaging(base))


class Several(Optimizer):
    """Two optimizers, each of a part."""

    def __init__(self, params, clips):
        params = list(params)
        super().__init__(params, {"lr": 0.1})
        self.parts, self.clips = [SGD(params[:1], lr=0.1), Adam(params[1:], lr=0.1)], clips

    def step(self, closure=None):
        if self.clips:
            nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.1)
        for part in self.parts:
            part.step()


def test_a_wrapper_of_several_that_changes_gradients_is_said():
    for clips in (False, True):
        net = make()
        optimizer = Several(net.parameters(), clips)
        Regularizer(net, l2=L2).attach(optimizer)
        sum(p.sum() for p in net.parameters()).backward()
        if clips:
            message = r"^attach: a step of Several changes gradients after the penalty has entered and before SGD"
            with pytest.warns(UserWarning, match=message):
                optimizer.step()
        optimizer.step()


def test_an_optimizer_that_has_another_one_for_a_part():
    net = make()
    optimizer = Several(net.parameters(), clips=False)
    optimizer.part = optimizer.parts[0]
    attachment = Regularizer(net, l2=L2).attach(optimizer)
    assert attachment.optimizer is optimizer
    attachment.remove()
    optimizer.part = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert Regularizer(net, l2=L2).attach(optimizer).optimizer is optimizer
