"""Proximal steps after optimizers whose weights are a function of their state are refused. (Hard case 46.)"""

import copy
import random
import threading

import pytest
import torch
from oracle import assert_same_bits
from samples import draw
from torch import nn
from torch.optim import Optimizer

from fused_reg import Regularizer, prox_
from fused_reg.regularizer import lasting


def kind(update, base=Optimizer, **defaults):
    """An optimizer of a trainer's own: its step calls the function with parameter, gradient, state and group."""

    class Own(base):
        def __init__(self, params, lr=0.1):
            Optimizer.__init__(self, params, {"lr": lr, **defaults})

        @torch.no_grad()
        def step(self, closure=None):
            loss = None if closure is None else torch.enable_grad()(closure)()
            for group in self.param_groups:
                group["k"] = group.get("k", 0) + 1
                for p in group["params"]:
                    if p.grad is not None:
                        update(p, p.grad, self.state[p], group)
            return loss

    Own.__name__ = update.__name__.title()
    return Own


def first(state, **made):
    """The state, made with these where it is empty."""
    for name, value in made.items():
        state.setdefault(name, value.clone())
    return state


# Weights that are a function of the state.


def schedule_free(p, g, state, group):
    """p is y = 0.1 z + 0.9 x, where z takes the steps and x is their average."""
    z = first(state, z=p)["z"]
    x = p.lerp(z, 1 - 1 / 0.9)
    z.sub_(group["lr"] * g)
    x.lerp_(z, 1 / group["k"])
    p.copy_(x.lerp(z, 0.1))


class Switched:
    """Changes between the weights of the training and those of the model, and takes no step with the latter."""

    is_training = False

    def train(self):
        self.switch(True, 1 - 0.9)

    def eval(self):
        self.switch(False, 1 - 1 / 0.9)

    def switch(self, to, weight):
        if self.is_training != to:
            self.is_training = to
            for p, state in self.state.items():
                p.data.lerp_(state["z"], weight)


class ScheduleFree(kind(schedule_free, type("Base", (Switched, Optimizer), {}), k=0)):
    def step(self, closure=None):
        assert self.is_training, "call optimizer.train()"
        return super().step(closure)


def ftrl(p, g, state, group):
    state = first(state, z=torch.zeros_like(p), n=torch.zeros_like(p))
    n = state["n"] + g * g
    state["z"].add_(g - (n.sqrt() - state["n"].sqrt()) / group["lr"] * p)
    state["n"].copy_(n)
    p.copy_(-state["z"] / ((1e-6 + n.sqrt()) / group["lr"]))


def dual_averaging(p, g, state, group):
    state = first(state, x0=p, s=torch.zeros_like(p), v=torch.zeros_like(p))
    rate = group["lr"] * group["k"] ** 0.5
    state["s"].add_(g, alpha=rate)
    state["v"].add_(rate * g * g)
    z = state["x0"] - state["s"] / (state["v"].pow(1 / 3) + 1e-6)
    p.lerp_(z, 1 - group["momentum"])


def d_adapted_sgd(p, g, state, group):
    state = first(state, x0=p, s=torch.zeros_like(p))
    state["s"].add_(g, alpha=group["lr"] * group["d"])
    p.copy_(state["x0"] - state["s"])


def master_copy(p, g, state, group):
    master = first(state, master=p.double())["master"]
    p.copy_(master.sub_(g.double(), alpha=group["lr"]))


def of_vectors_alone(p, g, state, group):
    (sgd if p.ndim == 2 else ftrl)(p, g, state, group)


def d_adapted_adam(p, g, state, group):
    m = first(state, m=torch.zeros_like(p))["m"].lerp_(g, 0.1)
    group["d"] *= 1.02
    p.sub_(group["lr"] * group["d"] * m.sign())


def distance_over_gradients(p, g, state, group):
    state = first(state, x0=p, squares=torch.zeros(()), far=torch.tensor(1e-6))
    state["far"] = torch.maximum(state["far"], (p - state["x0"]).norm())
    state["squares"] += g.square().sum()
    p.sub_(group["lr"] * state["far"] / state["squares"].sqrt() * g)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (kind(schedule_free), "function of its state"),
        (ScheduleFree, "function of its state"),
        (kind(ftrl), "function of its state"),
        (kind(dual_averaging, momentum=0.0), "function of its state"),
        (kind(dual_averaging, momentum=0.9), "function of its state"),
        (kind(dual_averaging, momentum=0.98), "function of its state"),
        (kind(d_adapted_sgd, d=1e-6), "function of its state"),
        (kind(master_copy), "function of its state"),
        (kind(of_vectors_alone), "function of its state"),
        (kind(d_adapted_adam, d=1e-6), "steps by lr"),
        (kind(d_adapted_adam, d=0.5), "steps by lr"),
        (kind(distance_over_gradients), "steps by lr"),
    ],
)
def test_refused(optimizer, reason):
    net = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 1))
    optimizer = optimizer(net.parameters())
    with pytest.raises(ValueError, match=rf'^attach: mode "prox" must be given an optimizer .*{reason}.*mode "grad"'):
        Regularizer(net, l1=0.1).attach(optimizer, "prox")
    Regularizer(net, l1=0.1).attach(optimizer)


# Weights that go on from where they are.


def sgd(p, g, state, group):
    p.sub_(group["lr"] * first(state, m=torch.zeros_like(p))["m"].mul_(0.9).add_(g))


def decoupled(p, g, state, group):
    p.mul_(1 - group["lr"] * 0.1).sub_(group["lr"] * g)


def sign(p, g, state, group):
    p.sub_(group["lr"] * g.sign())


def lion(p, g, state, group):
    m = first(state, m=torch.zeros_like(p))["m"]
    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m.lerp(g, 0.1).sign())
    m.lerp_(g, 0.01)


def lars(p, g, state, group):
    p.sub_(group["lr"] * 1e-3 * p.norm() / g.norm() * g)


def lamb(p, g, state, group):
    v = first(state, v=torch.zeros_like(p))["v"].lerp_(g * g, 0.01)
    u = g / (v.sqrt() + 1e-6)
    p.sub_(group["lr"] * p.norm() / u.norm() * u)


def muon(p, g, state, group):
    assert group["use_muon"] == (p.ndim == 2)
    if p.ndim == 2:
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        g = u @ v
    p.sub_(group["lr"] * g)


def adafactor(p, g, state, group):
    v = g * g
    if p.ndim == 2:
        v = v.mean(1, keepdim=True) * v.mean(0, keepdim=True) / v.mean()
    p.sub_(group["lr"] * p.square().mean().sqrt().clamp(min=1e-3) * g / (v.sqrt() + 1e-6))


def noisy(p, g, state, group):
    p.sub_(group["lr"] * (g + 0.1 * torch.randn_like(g)))


def lookahead(p, g, state, group):
    slow = first(state, slow=p)["slow"]
    p.sub_(group["lr"] * g)
    if group["k"] % 5 == 0:
        p.copy_(slow.lerp_(p, 0.5))


def averaged(p, g, state, group):
    """Beside the weights their moving average, of which the model is made."""
    p.sub_(group["lr"] * g)
    first(state, average=p)["average"].lerp_(p, 0.01)


class MakesItsStateFirst(kind(sgd)):
    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.state.update((p, {"sum": torch.zeros_like(p)}) for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad / self.state[p]["sum"].add_(p.grad.square()).sqrt())


class NeedsAClosure(torch.optim.SGD):
    def step(self, closure=None):
        assert closure is not None
        return super().step(closure)


HONEST = [kind(f) for f in (sgd, decoupled, sign, lars, lamb, adafactor, noisy, lookahead, averaged)]
HONEST += [kind(lion, weight_decay=3.0), kind(muon, use_muon=True), MakesItsStateFirst, NeedsAClosure]


def groups_of(net):
    """With what the trainer has set, also a rate that a warm-up begins with."""
    matrices, vectors = ([p for p in net.parameters() if (p.ndim == 2) is wanted] for wanted in (True, False))
    return [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False, "lr": 0.0}]


@pytest.mark.parametrize("optimizer", HONEST, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accepted(optimizer, dtype):
    """The training is that with `prox_` after each step, to the bit, and with the same random numbers."""

    def run(attached):
        net = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 3)).to(dtype)
        for i, p in enumerate(net.parameters()):
            p.data.copy_(draw(p.shape, seed=i))
        own = optimizer(groups_of(net), lr=0.125)
        torch.manual_seed(0)
        if attached:
            Regularizer(net, l1=0.01).attach(own, "prox")
        for k in range(3):

            def closure(k=k):
                for i, p in enumerate(net.parameters()):
                    p.grad = draw(p.shape, seed=10 * k + i).to(dtype)

            closure() if optimizer is not NeedsAClosure else None
            own.step(closure) if optimizer is NeedsAClosure else own.step()
            if not attached:
                for group in own.param_groups:
                    prox_(group["params"], l1=0.01, step=group["lr"])
        return [p.detach() for p in net.parameters()]

    assert_same_bits(run(True), run(False))


class ErasesGradients(kind(noisy)):
    def step(self, closure=None):
        super().step(closure)
        self.zero_grad()


def test_nothing_is_touched():
    """In the middle of a training: weights, gradients, state, groups, hooks, and random numbers."""
    net = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 1))
    optimizer = ErasesGradients(net.parameters())
    optimizer.zero_grad = lambda: net.zero_grad()  # of the real one, as the step of a scheduler
    optimizer.state[net[0].weight]["m"] = torch.ones(9, 12)
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)  # replaces optimizer.step, which is the real one's
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(None))
    for p in net.parameters():
        p.grad = torch.ones_like(p)

    def everything():
        tensors = [x for p in net.parameters() for x in (p.detach(), p.grad, *optimizer.state[p].values())]
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        versions = [x._version for x in tensors]
        return copy.deepcopy((tensors, groups, versions, torch.get_rng_state(), random.getstate(), len(calls)))

    before = everything()
    Regularizer(net, l1=0.1).attach(optimizer, "prox")
    after = everything()
    assert_same_bits(after[0], before[0])
    assert after[1:3] + after[4:] == before[1:3] + before[4:]
    assert (after[3] == before[3]).all()


def test_a_late_state_hides_nothing():
    """After many steps an average hardly moves, and d is large."""
    for made, late in ((kind(schedule_free, k=0), {"k": 10**6}), (kind(d_adapted_adam, d=1e-6), {"d": 1.0})):
        net = nn.Linear(12, 9)
        optimizer = made(net.parameters())
        optimizer.param_groups[0].update(late)
        optimizer.state[net.weight] = {"z": torch.zeros(9, 12), "m": torch.zeros(9, 12)}
        with pytest.raises(ValueError, match=r'^attach: mode "prox" must be given an optimizer'):
            Regularizer(net, l1=0.1).attach(optimizer, "prox")


class WithALock(kind(sgd)):
    def __init__(self, params):
        super().__init__(params)
        self.lock = threading.Lock()


class NeedsArguments(torch.optim.SGD):
    def step(self, loss, graph):
        pass


def still(p, g, state, group):
    pass


@pytest.mark.parametrize("made", [WithALock, NeedsArguments, kind(still)], ids=lambda made: made.__name__)
def test_what_cannot_be_tried_is_said(made):
    net = nn.Linear(3, 2)
    message = rf"^attach: could not try whether {made.__name__} keeps what a proximal step does \(.*mode \"grad\""
    with pytest.warns(UserWarning, match=message) as caught:
        Regularizer(net, l1=0.1).attach(made(net.parameters()), "prox")
    assert [w.filename for w in caught] == [__file__]


def test_torchs_own_are_not_tried(monkeypatch):
    monkeypatch.setattr(lasting, "_tried", lambda *_: pytest.fail("tried"))
    net = nn.Linear(3, 2)
    for optimizer in (torch.optim.SGD, torch.optim.AdamW, torch.optim.ASGD):
        Regularizer(net, l1=0.1).attach(optimizer(net.parameters()), "prox")


@pytest.mark.parametrize("shape", [(), (1,), (2, 1), (3, 1, 2, 2)])
def test_of_any_shape(shape):
    w = nn.Parameter(draw(shape))
    Regularizer([w, nn.Parameter(torch.empty(0))], l1=0.1).attach(kind(sgd)([w]), "prox")
    with pytest.raises(ValueError, match="function of its state"):
        Regularizer([w], l1=0.1).attach(kind(ftrl)([w]), "prox")


def test_a_copy_in_higher_precision_is_found_under_half_precision():
    net = nn.Linear(12, 9).bfloat16()
    Regularizer(net, l1=0.1).attach(kind(sgd)(net.parameters()), "prox")
    with pytest.raises(ValueError, match="function of its state"):
        Regularizer(net, l1=0.1).attach(kind(master_copy)(net.parameters()), "prox")
