"""`Regularizer.attach` where training goes on without the attached optimizer: it is said, once. (Hard case 44.)"""

import copy
import gc
import pickle
import re

import pytest
import torch
from test_attach import loss_of, make, train
from test_attach_steps import MODES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import SGD, Adam

from fused_reg import Regularizer

NOT_ATTACHED = (
    r"^attach: 'weight' has its penalty in the steps of .*, and Adam steps it without; call attach\(optimizer\)"
)
NO_STEP = (
    r"^attach: '(weight|bias)' is trained without its penalty: it changes from gradient to gradient, but no step of "
    r"the attached SGD comes"
)


@pytest.fixture
def no_collector():
    gc.disable()
    yield
    gc.enable()


# The next fit


@pytest.mark.usefixtures("no_collector")
@MODES
def test_a_loop_over_folds(mode):
    """As written, though each scheduler keeps its optimizer alive. Each fold trains as one alone."""

    def fold(net, regularizer):
        net.load_state_dict(make().state_dict())
        optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        attachment = regularizer.attach(optimizer, mode)
        for _ in range(3):
            train(net, optimizer, 1)
            scheduler.step()
        return scheduler, attachment

    alone = make()
    fold(alone, Regularizer(alone, l1=0.05))
    net = make()
    regularizer = Regularizer(net, l1=0.05)
    kept = [fold(net, regularizer) for _ in range(3)]
    torch.testing.assert_close(list(net.parameters()), list(alone.parameters()), rtol=0, atol=0)
    assert regularizer.step == 9
    assert [attachment.is_active for _, attachment in kept] == [False, False, True]


@MODES
def test_a_step_of_the_earlier_optimizer_is_an_error(mode):
    net = make()
    first, second = SGD(net.parameters(), lr=0.1), Adam([net.bias])
    regularizer = Regularizer(net, l1=0.5, include="bias")
    regularizer.attach(first, mode)
    train(net, first, 1)
    regularizer.attach(second, mode)
    loss_of(net).backward()
    before = copy.deepcopy([[p, p.grad] for p in net.parameters()])
    message = "attach: 'bias' must be stepped by the optimizer that was attached last, but an earlier SGD steps"
    with pytest.raises(ValueError, match=message):
        first.step()
    for p, (weight, grad) in zip(net.parameters(), before, strict=True):
        assert torch.equal(p, weight)
        assert torch.equal(p.grad, grad)
    net.zero_grad()
    with pytest.raises(ValueError, match=message):
        first.step(lambda: None)
    first.step()  # changes nothing
    assert regularizer.step == 1
    train(net, second, 1)
    assert regularizer.step == 2  # those of the first that still handles something
    regularizer.attach(first, mode)  # again
    train(net, first, 1)
    with pytest.raises(ValueError, match="but an earlier Adam steps"):
        train(net, second, 1)
    assert regularizer.step == 3


# An optimizer that was created anew


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("regularizer_lives", [False, True])
@pytest.mark.parametrize("lives", [False, True])
def test_a_new_optimizer_that_is_not_attached(lives, regularizer_lives):
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.5)
    regularizer.attach(optimizer)
    train(net, optimizer, 1)
    kept = [optimizer] if lives else []
    optimizer = Adam(net.parameters())
    if not regularizer_lives:
        del regularizer
    optimizer.zero_grad()
    optimizer.step()  # without a gradient it is none
    with pytest.warns(UserWarning, match=NOT_ATTACHED) as caught:
        train(net, optimizer, 1)
    assert ("another optimizer, SGD" if lives else "an optimizer that is gone") in str(caught[0].message)
    train(net, optimizer, 2)  # said once
    train(net, Adam(net.parameters()), 1)
    assert len(kept) == lives


def test_a_parameter_that_the_optimizer_got_later():
    net = make()
    optimizer = SGD([net.weight], lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer)
    optimizer.add_param_group({"params": [net.bias]})
    train(net, optimizer, 1)
    optimizer = Adam([net.bias])
    with pytest.warns(UserWarning, match=NOT_ATTACHED.replace("weight", "bias")):
        train(net, optimizer, 1)


def test_a_wrapper_that_is_built_later():
    """It steps the attached optimizer, which none of its attributes is."""

    class Wrapper(SGD):
        def step(self, closure=None):
            self.hidden[0].step()

    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.5)
    regularizer.attach(optimizer)
    wrapper = Wrapper(net.parameters(), lr=0.1)
    wrapper.hidden = [optimizer]
    train(net, wrapper, 2)
    assert regularizer.step == 2


@pytest.mark.parametrize("wrapped", [False, True])
def test_with_a_closure(wrapped):
    net = make()
    regularizer = Regularizer(net, l1=0.5)
    regularizer.attach(SGD(net.parameters(), lr=0.1))
    optimizer = Adam(net.parameters())
    with pytest.warns(UserWarning, match=NOT_ATTACHED):
        optimizer.step(closure=lambda: loss_of(net).backward()) if wrapped else optimizer.step(lambda: None)


def test_where_no_penalty_is_meant():
    """Attached elsewhere, removed, another regularizer's, other parameters, a copy: nothing is said."""
    net, other = make(), make()
    optimizer = SGD(net.parameters(), lr=0.1)
    with Regularizer(net, l1=0.5).attach(optimizer):
        train(net, optimizer, 1)
    train(net, optimizer, 1)
    train(net, Adam(net.parameters()), 1)
    attachment = Regularizer(net, l1=0.5).attach(SGD(net.parameters(), lr=0.1))
    attachment.remove()  # behind its optimizer's end
    train(net, Adam(net.parameters()), 1)
    Regularizer(net, l1=0.5).attach(optimizer)
    train(other, Adam(other.parameters()), 1)
    copied = copy.deepcopy((net, optimizer))
    train(*copied, 1)
    again = Adam(net.parameters())
    Regularizer(net, l2=0.5).attach(again)
    train(net, again, 4)


def test_one_of_two_penalties_that_is_not_attached_again():
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    first, second = Regularizer(net, l1=0.5), Regularizer(net, l2=0.5)
    first.attach(optimizer)
    second.attach(optimizer)
    train(net, optimizer, 1)
    optimizer = Adam(net.parameters())
    second.attach(optimizer)
    with pytest.warns(UserWarning, match=NOT_ATTACHED):
        train(net, optimizer, 1)
    first.attach(optimizer)
    train(net, optimizer, 1)


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
def test_a_compiled_step_of_another_optimizer():
    net, other = make(), make()
    Regularizer(net, l1=0.5).attach(SGD(net.parameters(), lr=0.1))
    optimizer = SGD(other.parameters(), lr=0.1)
    loss_of(other).backward()
    expected = [p.detach() - 0.1 * p.grad for p in other.parameters()]
    torch.compile(optimizer.step, backend="eager")()
    torch.testing.assert_close([p.detach() for p in other.parameters()], expected)


# What no optimizer holds


def test_parameters_that_no_optimizer_holds():
    """A new head, of which a regularizer of a list does not know."""
    net = nn.Sequential(make(), nn.Linear(5, 5))
    regularizer = Regularizer(net.parameters(), l1=0.5)
    net[1] = nn.Linear(5, 5)
    regularizer.attach(optimizer := SGD(net.parameters(), lr=0.1))
    message = r"^attach: '2' and 1 more of the regularizer must be in an attached optimizer to get a penalty, but is in"
    with pytest.warns(UserWarning, match=message):
        train(net, optimizer, 1)
    optimizer.param_groups[0]["weight_decay"] = 0.5  # the groups are looked at again
    train(net, optimizer, 1)  # said once


def test_parameters_that_a_group_loses():
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer)
    train(net, optimizer, 1)
    optimizer.param_groups[0]["params"] = [net.weight, nn.Parameter(torch.ones(5))]
    with pytest.warns(UserWarning, match=r"^attach: 'bias' of the regularizer must be in an attached optimizer"):
        train(net, optimizer, 1)


def test_parameters_of_two_optimizers_and_frozen_ones():
    net = nn.Sequential(make(), nn.Linear(5, 5), nn.Linear(5, 5).requires_grad_(False))
    first, second = SGD(net[0].parameters(), lr=0.1), SGD(net[1].parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.5)
    regularizer.attach(first)
    regularizer.attach(second)
    train(net, first, 1)
    train(net, second, 1)
    net[2].requires_grad_(True)
    train(net, SGD(net[2].parameters(), lr=0.1), 1)
    with pytest.warns(UserWarning, match=r"^attach: '2.weight' and 1 more of the regularizer must be in an attached"):
        train(net, first, 1)
    train(net, second, 1)  # said once


# Gradients, but no step


def by_hand(net):
    for p in net.parameters():
        p.data -= 0.1 * p.grad


class TwoSteps(SGD):
    """Steps under other names."""

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.1 * p.grad)


@MODES
@pytest.mark.parametrize("way", ["by hand", "two steps"])
def test_no_step_of_the_attached_optimizer(way, mode):
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1) if way == "by hand" else TwoSteps(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer, mode)

    def fit(steps):
        for _ in range(steps):
            net.zero_grad()
            loss_of(net).backward()
            by_hand(net) if way == "by hand" else optimizer.second_step()

    fit(2)
    with pytest.warns(UserWarning, match=NO_STEP.replace("SGD", type(optimizer).__name__)) as caught:
        fit(5)
    assert len(caught) == 1


def test_gradients_without_a_step_that_are_right():
    """Accumulated; behind a checkpoint that is loaded; beside weights that are exchanged for an evaluation."""
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer)
    averages = {name: 0.5 * x for name, x in net.state_dict().items()}
    for _ in range(5):
        loss_of(net).backward()
        kept = copy.deepcopy(net.state_dict())
        net.load_state_dict(averages)
        net.load_state_dict(kept)
    net.load_state_dict(averages)
    loss_of(net).backward()
    loss_of(net).backward()


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_gradients_without_data(kind):
    """A dry run."""
    with FakeTensorMode() if kind == "fake" else torch.device("meta"):
        net = nn.Linear(7, 5)
        optimizer = SGD(net.parameters(), lr=0.1)
        Regularizer(net, l1=0.5).attach(optimizer)
        for _ in range(4):
            net(torch.ones(2, 7)).sum().backward()
            by_hand(net)


def test_the_watch_ends_with_the_first_step():
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    attachment = Regularizer(net, l1=0.5).attach(optimizer)
    assert all(net.get_parameter(name)._post_accumulate_grad_hooks for name in ("weight", "bias"))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert not any(p._post_accumulate_grad_hooks for p in copied.parameters())
    optimizer.step()  # without a gradient it is none
    assert all(p._post_accumulate_grad_hooks for p in net.parameters())
    train(net, optimizer, 1)
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
    for _ in range(3):
        by_hand(net)
        loss_of(net).backward()
    attachment.remove()
    other = make()
    regularizer, kept = Regularizer(other, l1=0.5), SGD(other.parameters(), lr=0.1)
    regularizer.attach(kept)
    regularizer.attach(SGD(other.parameters(), lr=0.1)).remove()  # takes over
    assert not any(p._post_accumulate_grad_hooks for p in other.parameters())


# What attach says


class Fused:
    """Steps, but is no optimizer of torch, nor holds one."""

    def step(self): ...

    def zero_grad(self): ...


class Trainer:
    def __init__(self, optimizer):
        self.optim = optimizer


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda optimizer: SGD, "got the class SGD; pass an instance of it"),
        (lambda optimizer: None, "got NoneType"),
        (lambda optimizer: [optimizer], "got a list; attach to each optimizer by a call of its own"),
        (
            lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
            "got StepLR; pass its attribute 'optimizer'",
        ),
        (Trainer, "got Trainer; pass its attribute 'optim'"),
        (
            lambda optimizer: Fused(),
            "got Fused, which holds none in its attributes; add regularizer() to the loss, or call "
            "regularizer.accumulate_grad_() before its step",
        ),
    ],
)
def test_what_is_no_optimizer(given, message):
    net = make()
    with pytest.raises(TypeError, match=re.escape("attach: optimizer must be a torch.optim.Optimizer, " + message)):
        Regularizer(net, l1=0.5).attach(given(SGD(net.parameters(), lr=0.1)))


def test_repr():
    net = make()
    optimizer = SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.5)
    attachment = regularizer.attach(optimizer, "prox")
    assert repr(attachment) == "Attachment('prox', SGD, 2 parameters, active)"
    other = regularizer.attach(Adam([net.bias]))
    assert (repr(attachment), repr(copy.copy(other))) == (
        "Attachment('prox', SGD, 2 parameters, taken over)",
        "Attachment('grad', no optimizer, 1 parameter, detached)",
    )
    other.remove()
    del optimizer
    assert (repr(attachment), repr(other)) == (
        "Attachment('prox', no optimizer, 2 parameters, taken over)",
        "Attachment('grad', no optimizer, 1 parameter, detached)",
    )
