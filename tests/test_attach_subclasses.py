"""`Regularizer.attach` to subclasses that change gradients and go on to the step of their base class, and to classes
whose steps call no hooks: as `weight_decay`, a penalty enters in the innermost step. (Hard case 45.)"""

import copy
import inspect
import itertools
from collections import defaultdict

import pytest
import torch
from test_attach_wrappers import Lookahead, backward, check, trained, with_closure
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, Adam, Optimizer

from fused_reg import Regularizer
from fused_reg.regularizer import nesting


def clip(params):
    nn.utils.clip_grad_norm_(list(params), 0.01)


class Clipped(SGD):
    def step(self, closure=None):
        clip(self.param_groups[0]["params"])
        return super().step(closure)


class Centered(Adam):
    """New gradients, by the name of the base class."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad - p.grad.mean()
        return Adam.step(self, closure)


class ClipMixin:
    @torch.no_grad()
    def step(self, closure=None):
        clip(self.param_groups[0]["params"])
        return super().step(closure)


class Mixed(ClipMixin, SGD):
    pass


class ClipOptimizer(Optimizer):
    def step(self, closure=None):
        clip(self.param_groups[0]["params"])
        return super().step(closure)


class MixedOptimizer(ClipOptimizer, SGD):
    pass


class Helped(SGD):
    def step(self, closure=None):
        clip(self.param_groups[0]["params"])
        return self.go_on(closure)

    def go_on(self, closure):
        return (lambda: super(Helped, self).step(closure))()


def decorated(step):
    """Nothing says what it wraps."""

    def around(self, *args):
        clip(self.param_groups[0]["params"])
        return step(self, *args)

    return around


class Decorated(SGD):
    @decorated
    def step(self, closure=None):
        return super().step(closure)


class Twice(Clipped):
    """Three steps within one another."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad = p.grad + 1
        return super().step(closure)


class Aware(SGD):
    """Sharpness-aware, by inheritance."""

    def step(self, closure):
        params = self.param_groups[0]["params"]
        before = [p.detach().clone() for p in params]
        with torch.no_grad():
            torch._foreach_add_(params, [0.1 * p.grad for p in params])
        self.zero_grad()
        closure()
        with torch.no_grad():
            torch._foreach_copy_(params, before)
        super().step()


class Inner(SGD):
    """A step of its own, and no initializer of the classes above."""

    def __init__(self, params, lr, weight_decay):
        params = list(params)
        self.param_groups = [{"params": params, "lr": lr, "weight_decay": weight_decay}]
        self.defaults, self.state = {}, defaultdict(dict)

    def zero_grad(self):
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad + group["weight_decay"] * p, alpha=-group["lr"])


class Outer(Inner):
    def step(self, closure=None):
        clip(self.param_groups[0]["params"])
        super().step()


SUBCLASSES = [Clipped, Centered, Mixed, MixedOptimizer, Helped, Decorated, Twice, Inner, Outer]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_subclasses(kind, scheduled):
    check(kind, lambda base: base, scheduled=scheduled)


@pytest.mark.parametrize("is_mixin", [False, True])
def test_a_scheduler_around_a_subclass_that_was_never_attached(is_mixin):
    class Base(Inner):
        step = inspect.unwrap(Inner.step)

    class Derived(Base):
        def step(self, closure=None):
            clip(self.param_groups[0]["params"])
            super().step()

    class Mixture(ClipMixin, Base):
        pass

    check(Mixture if is_mixin else Derived, lambda base: base, scheduled=True)


def test_a_subclass_that_takes_its_own_closure():
    check(Aware, lambda base: base, step=with_closure)


@pytest.mark.parametrize("kind", [Clipped, Mixed], ids=lambda kind: kind.__name__)
def test_a_wrapper_of_a_subclass(kind):
    check(kind, Lookahead)


def test_no_class_of_torchs_goes_on():
    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type) and k is not Optimizer]
    assert len(kinds) > 10
    for kind in kinds:
        steps = list(nesting._steps_of(kind))
        mro = kind.__mro__
        assert not any(nesting._calls(mro[a:b], mro[b]) for (a, _), (b, _) in itertools.pairwise(steps))


class Accumulating(SGD):
    """Steps at every second call."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 2 == 0:
            super().step()


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_accumulation_in_a_subclass(mode):
    """A call that is no step has no penalty and counts for nothing."""
    w = nn.Parameter(torch.ones(1))
    optimizer = Accumulating([w], lr=0.5)
    regularizer = Regularizer([w], l1=0.25)
    regularizer.attach(optimizer, mode)
    for count in range(1, 5):
        w.grad = torch.zeros(1)
        optimizer.step()
        assert (w.item(), regularizer.step) == (1 - 0.125 * (count // 2), count // 2)


def go_on(optimizer, closure):
    SGD.step(optimizer, closure)


class Hidden(SGD):
    """Goes on by a function elsewhere, with new gradients."""

    def step(self, closure=None):
        self.zero_grad()
        backward(self.net)
        go_on(self, closure)


def test_a_subclass_whose_code_does_not_show_it():
    def step(net, optimizer):
        optimizer.net = net
        backward(net)
        optimizer.step()

    check(Hidden, lambda base: base, step=step)


class Extrapolating(SGD):
    """Two steps, each with a gradient of its own."""

    def step(self, closure):
        super().step()
        self.zero_grad()
        closure()
        super().step()


def test_each_inner_step_has_its_penalty():
    expected, _ = trained(Extrapolating, lambda base: base, False, step=with_closure)
    actual, regularizer = trained(Extrapolating, lambda base: base, True, step=with_closure)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert regularizer.step == 5


class Renewing(SGD):
    """The second of two steps has another gradient, which was written as often as the first."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            p.grad = torch.ones_like(p).mul_(0)
        super().step()


def test_an_inner_step_with_a_new_gradient():
    w = nn.Parameter(torch.ones(1))
    Regularizer([w], l1=0.25).attach(optimizer := Renewing([w], lr=0.5))
    w.grad = torch.zeros(1)
    optimizer.step()
    assert w.item() == 1 - 2 * 0.125


def test_gradients_that_are_kept_keep_their_penalty():
    """From one whole step to the next, as with the base class."""

    class Plain(SGD):
        def step(self, closure=None):
            return super().step(closure)

    def run(kind):
        w = nn.Parameter(torch.ones(1))
        Regularizer([w], l1=0.25).attach(optimizer := kind([w], lr=0.5))
        w.grad = torch.zeros(1)
        optimizer.step()
        optimizer.step()
        return w.item()

    assert run(Plain) == run(SGD) == 1 - 0.125 - 0.25


class Averaging(SGD):
    """Changes the weights behind the step of its base class."""

    def step(self, closure=None):
        super().step()
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.add_(0.25)


def test_prox_follows_the_whole_step():
    w = nn.Parameter(torch.ones(1))
    Regularizer([w], l1=1.0).attach(optimizer := Averaging([w], lr=0.5), mode="prox")
    w.grad = torch.ones(1)
    optimizer.step()
    assert w.item() == 1 - 0.5 + 0.25 - 0.5


class Deceiving(SGD):
    """Names the step of its base class, and takes one of its own."""

    def step(self, closure=None):
        if closure is not None:
            return super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.data -= self.param_groups[0]["lr"] * p.grad
        return None


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_step_that_does_not_go_on(mode):
    """Where the code deceives: said once, and right from the second step on."""
    w = nn.Parameter(torch.ones(1))
    optimizer = Deceiving([w], lr=0.5)
    regularizer = Regularizer([w], l1=0.25)
    regularizer.attach(optimizer, mode)
    w.grad = torch.zeros(1)
    if mode == "grad":
        w.grad += 0.25
        with pytest.warns(UserWarning, match="^attach: a step of Deceiving changed '0' without the step of its base"):
            optimizer.step()
    else:
        w.grad += 0.25
        optimizer.step()
        assert w.item() == 1 - 0.125 - 0.125
    w.data.fill_(1.0)
    for count in (1, 2):
        w.grad = torch.full((1,), 0.25)
        optimizer.step()
        assert (w.item(), regularizer.step) == (1 - 0.25 * count, count + 1)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
def test_a_compiled_step_of_a_subclass():
    def compiled(net, optimizer):
        backward(net)
        step()

    def wrap(optimizer):
        nonlocal step
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        return optimizer

    step = None
    check(Clipped, wrap, step=compiled)


class Scaled(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, rate):
        for p in self.param_groups[0]["params"]:
            p -= rate * p.grad


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
@pytest.mark.parametrize(("mode", "given"), [("grad", {}), ("prox", {}), ("prox", {"zeros": 0.5})])
def test_a_compiled_step_that_takes_a_tensor(mode, given):
    """A compiler looks at functions that have a tensor, as both hooks do then: of them it makes no graph."""
    weights, operations = [], []
    for is_attached, is_compiled in ((True, False), (True, True), (False, True)):
        torch._dynamo.reset()
        w = nn.Parameter(torch.tensor([1.0, -2.0, 0.25, 3.0]))
        optimizer = Scaled([w], {"lr": 0.5})
        regularizer = Regularizer([w], l1=0.125, **given)
        if is_attached:
            regularizer.attach(optimizer, mode)
        counter = CompileCounterWithBackend("eager")
        step = torch.compile(optimizer.step, backend=counter) if is_compiled else optimizer.step
        for _ in range(3):
            w.grad = torch.ones_like(w)
            step(torch.tensor(0.25))
        assert regularizer.step == 3 * is_attached
        weights.append(w.tolist())
        operations.append({n.target for graph in counter.graphs for n in graph.graph.nodes if n.op.startswith("call")})
    assert weights[0] == weights[1] != weights[2]
    assert set() < operations[1] <= operations[2]


def test_other_optimizers_of_a_class_that_is_hooked_now():
    """One without hooks of its own steps as before."""
    attached, other = (Inner([nn.Parameter(torch.ones(1))], lr=0.5, weight_decay=0.0) for _ in range(2))
    Regularizer(attached.param_groups[0]["params"], l1=0.25).attach(attached)
    for optimizer, expected in ((attached, 1 - 0.125), (other, 1.0)):
        (w,) = optimizer.param_groups[0]["params"]
        w.grad = torch.zeros(1)
        optimizer.step()
        assert w.item() == expected


def test_a_scheduler_around_a_step_without_hooks():
    """Its wrapper holds the step of a class that had no hooks then. A copy of the optimizer is left as it is."""

    class Bare(Inner):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"])

    w = nn.Parameter(torch.ones(1))
    optimizer = Bare([w], 0.5, 0.0)
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Regularizer([w], l1=0.25).attach(optimizer)
    copy.copy(optimizer)
    w.grad = torch.zeros(1)
    optimizer.step()
    assert (w.item(), optimizer._opt_called) == (1 - 0.125, True)
