"""`Regularizer.attach` where a step is none, or part of another one. (Hard case 43.)"""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from oracle import assert_same_bits
from ranks import ranks
from test_attach import loss_of, make, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fused_reg import Regularizer, fused_penalty
from fused_reg.regularizer.nesting import depth_of

MODES = pytest.mark.parametrize("mode", ["grad", "prox"])


def schedule(step):
    return 0.125 * (1 + step)


def save_and_load(net, optimizer) -> None:
    states = get_state_dict(net, optimizer)
    set_state_dict(net, optimizer, model_state_dict=states[0], optim_state_dict=states[1])


def everything(net, optimizer, regularizer, attachment) -> list[torch.Tensor]:
    """All that a step may change."""
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    numbers = [float(regularizer.step), *(group["l1"] for group in regularizer.state_dict()["groups"])]
    tensors = (*net.parameters(), *moments, attachment.value, *map(torch.tensor, numbers))
    return [x.detach().clone() for x in tensors]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": torch.tensor(0.01), "fused": True, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
        (torch.optim.Adagrad, {"lr": 0.01}),
    ],
)
def test_a_state_dict_of_a_fresh_optimizer(kind, options):
    """torch makes its state by a step. Training goes on as with the penalty in the loss, to the bit."""
    expected, actual = make(), make()
    optimizers = [kind(net.parameters(), **options) for net in (expected, actual)]
    regularizer = Regularizer(actual, l1=schedule)
    attachment = regularizer.attach(optimizers[1])
    for net, optimizer in zip((expected, actual), optimizers, strict=True):
        save_and_load(net, optimizer)
    assert regularizer.step == 0
    assert_same_bits([attachment.value], [regularizer().detach()])
    for state in optimizers[1].state.values():
        assert not any(x.any() for name, x in state.items() if name != "step")
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        penalty = fused_penalty(expected.parameters(), l1=schedule(step))
        loss_of(expected).backward()
        penalty.backward()
        loss_of(actual).backward()
        for net, optimizer in zip((expected, actual), optimizers, strict=True):
            optimizer.step()
            save_and_load(net, optimizer)
        assert_same_bits([p.detach() for p in actual.parameters()], [p.detach() for p in expected.parameters()])
        assert_same_bits([attachment.value], [penalty.detach()])


@MODES
def test_a_state_dict_leaves_the_training_as_it_is(mode):
    """To the bit the weights of a training without it, where the step leaves nothing of torch's own behind."""

    def run(saved):
        net = make()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        Regularizer(net, l1=schedule).attach(optimizer, mode)
        if saved:
            save_and_load(net, optimizer)
        return train(net, optimizer, 3)

    assert_same_bits(run(True), run(False))


def no_gradients(net, groups):
    net.zero_grad()


def rates_of_zero(net, groups):
    for p, group in zip(net.parameters(), groups, strict=True):
        p.grad = torch.zeros_like(p)
        group["lr"] = 0.0


def rates_of_zero_in_tensors(net, groups):
    rates_of_zero(net, groups)
    for group in groups:
        group["lr"] = torch.tensor(0.0)


def some_of_both(net, groups):
    rates_of_zero(net, groups)
    net.bias.grad = None
    groups[1]["lr"] = 0.5


@MODES
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("inert", [no_gradients, rates_of_zero, rates_of_zero_in_tensors, some_of_both])
def test_inert_steps(inert, with_closure, mode):
    """A fresh optimizer's, and one in the middle of the training: nothing changes but by Adam itself."""
    net = make()
    optimizer = torch.optim.Adam([{"params": p} for p in net.parameters()], lr=0.125)
    regularizer = Regularizer(net, l1=schedule)
    attachment = regularizer.attach(optimizer, mode)
    for _ in range(2):
        rates = [group["lr"] for group in optimizer.param_groups]
        inert(net, optimizer.param_groups)
        plain = torch.optim.Adam([{"params": p} for p in copy.deepcopy(list(net.parameters()))])
        for p, q in zip(net.parameters(), (group["params"][0] for group in plain.param_groups), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        expected = plain, copy.deepcopy(regularizer), copy.deepcopy(attachment)
        gradients = [p.grad for p in net.parameters()]
        optimizer.step(lambda: 1.5) if with_closure else optimizer.step()
        plain.step()
        actual = everything(net, optimizer, regularizer, attachment)
        assert_same_bits(
            actual, everything(nn.ParameterList(plain.param_groups[i]["params"][0] for i in (0, 1)), *expected)
        )
        assert not any(g.any() for g in gradients if g is not None)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        train(net, optimizer, 1)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.0, 0.5)])
def test_a_warm_up_from_a_learning_rate_of_zero_is_a_step(rates):
    """Its gradient goes into the moments, and so does that of the penalty, as from the loss."""
    net, plain = make(), make()
    optimizer, other = (
        torch.optim.Adam([{"params": p, "lr": rate} for p, rate in zip(n.parameters(), rates, strict=True)])
        for n in (net, plain)
    )
    regularizer = Regularizer(net, l1=schedule)
    regularizer.attach(optimizer)
    train(net, optimizer, 1)
    (loss_of(plain)).backward()
    fused_penalty(plain.parameters(), l1=schedule(0)).backward()
    other.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert_same_bits([optimizer.state[p]["exp_avg"]], [other.state[q]["exp_avg"]])
    assert regularizer.step == 1


def test_a_sparse_gradient_of_zeros_is_looked_at():
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    regularizer = Regularizer(net, l1=schedule)
    regularizer.attach(optimizer, "prox")
    for factor, steps in ((0.0, 0), (1.0, 1)):
        optimizer.zero_grad()
        (factor * net(torch.tensor([1])).sum()).backward()
        optimizer.step()
        assert regularizer.step == steps


@MODES
@pytest.mark.parametrize("known_to", ["host", "device"])
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_scaler_skips(fused, scheduled, known_to, mode, device, monkeypatch):
    if known_to == "device":  # which the host does not wait for
        monkeypatch.setattr("fused_reg.regularizer.attachment.is_inert", lambda optimizer: False)
    net = make(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.125, fused=fused)
    regularizer = Regularizer(net, l1=schedule if scheduled else 0.125)
    attachment = regularizer.attach(optimizer, mode)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for count, factor in enumerate((1.0, torch.inf, 1.0, torch.inf, torch.inf)):
        optimizer.zero_grad()
        scaler.scale(sum(p.sum() for p in net.parameters()) * factor).backward()
        before = everything(net, optimizer, regularizer, attachment)
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert_same_bits(everything(net, optimizer, regularizer, attachment), before)
        assert regularizer.step == (1 if count < 2 else 2)


def of_shards(rank_with_gradient):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    w = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    gradient = torch.zeros(4, 3)
    if rank_with_gradient is not None:
        gradient[2 * rank_with_gradient] = 1.0
    optimizer = torch.optim.SGD([w], lr=0.0)
    regularizer = Regularizer([w], l1=0.5)
    regularizer.attach(optimizer)
    w.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.step()
    return regularizer.step


def test_gradients_of_shards_are_looked_at_together():
    assert [ranks(2).run(of_shards, rank) for rank in (None, 0, 1)] == [[0, 0], [1, 1], [1, 1]]


class Fallback(torch.optim.SGD):
    """Goes on to its base class: twice, where the first time fails, or in a thread."""

    how = "twice"

    def step(self, closure=None):
        if self.how == "thread":
            thread = threading.Thread(target=super().step)
            thread.start()
            thread.join()
            return
        with contextlib.suppress(ZeroDivisionError):
            super().step(lambda: 1 / 0 if self.how == "failure" else None)
        super().step()


@MODES
@pytest.mark.parametrize("how", ["twice", "failure", "thread"])
def test_steps_within_a_step_count_once(how, mode):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # now the base class calls hooks, too
    w = nn.Parameter(torch.ones(1))
    optimizer = Fallback([w], lr=0.5 if how == "twice" and mode == "grad" else 1.0)
    optimizer.how = how
    regularizer = Regularizer([w], l1=0.125)
    regularizer.attach(optimizer, mode)
    for count in (1, 2):
        w.grad = torch.zeros(1)
        optimizer.step()
        assert (w.item(), regularizer.step) == (1 - 0.125 * count, count)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
def test_steps_within_a_compiled_step_count_once():
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    w = nn.Parameter(torch.ones(1))
    optimizer = Fallback([w], lr=1.0)
    optimizer.how = "failure"
    regularizer = Regularizer([w], l1=0.125)
    regularizer.attach(optimizer)
    step = torch.compile(lambda: optimizer.step(), backend="eager")
    for count in (1, 2):
        w.grad = torch.zeros(1)
        step()
        assert (w.item(), regularizer.step) == (1 - 0.125 * count, count)


def hooked(step):
    """What torch wraps around a step, under names of its own."""

    def around(*given):
        for hook in given[0]._optimizer_step_pre_hooks.values():
            hook(given[0], given, {})
        step(*given)
        for hook in given[0]._optimizer_step_post_hooks.values():
            hook(given[0], given, {})

    around.hooked = True
    return around


class Base(torch.optim.SGD):
    step = hooked(lambda self: self.param_groups[0]["params"][0].data.sub_(self.param_groups[0]["params"][0].grad))


class Derived(Base):
    step = hooked(lambda self: Base.step(self))


def test_torch_may_name_what_calls_the_hooks_as_it_likes():
    w = nn.Parameter(torch.ones(1))
    optimizer = Derived([w], lr=1.0)
    regularizer = Regularizer([w], l1=0.125)
    regularizer.attach(optimizer)
    for count in (1, 2):
        w.grad = torch.zeros(1)
        optimizer.step()
        assert (w.item(), regularizer.step) == (1 - 0.125 * count, count)


def test_hooks_that_are_called_from_nowhere_are_an_error():
    """Rather than a penalty that is added twice."""
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)]

    def hook():
        return depth_of(optimizers[0], hook)

    with pytest.raises(RuntimeError, match="attach: torch must call the hooks of a step from a function that has the"):
        hook()


@MODES
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_a_copied_attachment_is_detached(copied, mode):
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, l1=0.5).attach(optimizer, mode)
    train(net, optimizer, 1)
    other = copied(attachment)
    assert (attachment.is_active, other.is_active, other.optimizer) == (True, False, None)
    assert_same_bits([other.value], [attachment.value])
    with other:
        pass
    assert attachment.is_active
    train(net, optimizer, 1)
    assert attachment.value != other.value or mode == "prox"
