"""Penalties that would count twice, enter too early, or be left behind."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD

from fused_reg import Regularizer, regularized


def one():
    w = nn.Parameter(torch.ones(1))
    return w, SGD([w], lr=0.1)


def step(w, optimizer, grad=0.0):
    w.grad = torch.full_like(w, grad)
    optimizer.step()
    return w.item()


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_another_regularizer_of_the_same_strength(mode):
    """As by a cell of a notebook that is run again. Once it is said."""
    w, optimizer = one()
    v = nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [v]})
    first = Regularizer([w, v], l2=0.5).attach(optimizer, mode=mode)
    with pytest.warns(UserWarning, match="l2 of '0' counts twice, because another Regularizer is attached") as said:
        Regularizer([w, v], l2=0.5).attach(optimizer, mode=mode)
    assert len(said) == 1
    first.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(w, optimizer) == pytest.approx(0.9 if mode == "grad" else 1 / 1.1)


def test_regularizers_that_add_up():
    """Of other terms, of other parameters, or of an optimizer that is another one."""
    w, optimizer = one()
    v, other = one()
    optimizer.add_param_group({"params": [v]})
    Regularizer([w], l2=0.5).attach(optimizer)
    Regularizer([w], l1=0.5).attach(optimizer, mode="prox")
    Regularizer([v], l2=0.5).attach(optimizer)
    Regularizer([v], l2=0.5).attach(other)


def test_hooks_that_come_after_the_attachment():
    """What they make of the gradient has the penalty behind it, as it has weight_decay."""
    found = []
    for decay in (0.0, 1.0):
        w, optimizer = one()
        optimizer.param_groups[0]["weight_decay"] = decay
        if not decay:
            Regularizer([w], l2=0.5).attach(optimizer)
        optimizer.register_step_pre_hook(lambda *_, w=w: setattr(w, "grad", torch.full_like(w, 2.0)))
        found.append([step(w, optimizer) for _ in range(2)])
    assert found[0] == pytest.approx(found[1])


def test_all_of_it_copied():
    """The copy of the optimizer is not attached, which its first step says; not where the copy is used otherwise."""
    w, optimizer = one()
    regularizer = Regularizer([w], l2=0.5)
    regularizer.attach(optimizer)
    for is_used in (False, True):
        copied, own, penalty = copy.deepcopy((w, optimizer, regularizer))
        if is_used:
            penalty().backward()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step(copied, own)
            step(copied, own)
        assert len(said) == (not is_used)


def test_a_new_mark_in_the_place_of_one_that_is_gone():
    net = nn.Sequential(regularized(nn.Linear(3, 3), l2=2.0))
    regularizer = Regularizer(net)
    net[0] = regularized(nn.Linear(3, 3), l2=9.0)
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="follows its module"):
        assert regularizer().item() == pytest.approx(9 * net[0].weight.square().sum().item())


def test_a_module_in_front_of_a_marked_one():
    net = nn.Sequential(regularized(nn.Linear(3, 3), l2=2.0), nn.Linear(3, 3))
    regularizer = Regularizer(net)
    net.insert(0, nn.Linear(3, 3))
    assert [name for name, _ in regularizer.named_parameters()] == ["1.weight"]


def test_rates_that_are_no_lr():
    w, _ = one()
    with pytest.raises(ValueError, match="must be given an optimizer that steps by lr, got Adafactor"):
        Regularizer([w], l1=0.1).attach(torch.optim.Adafactor([w], lr=0.01), mode="prox")


def sgd_step(optimizer, closure):
    return SGD.step(optimizer, closure)


def by_variable(base):
    class Doubled(base):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad = p.grad * 2
            return base.step(self, closure)

    return Doubled


def by_helper(base):
    class Doubled(base):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad = p.grad * 2
            return sgd_step(self, closure)

    return Doubled


@pytest.mark.parametrize("make", [by_variable, by_helper])
def test_base_steps_by_other_names(make):
    found = []
    for decay in (0.0, 1.0):
        w = nn.Parameter(torch.ones(1))
        optimizer = make(SGD)([w], lr=0.1, weight_decay=decay)
        if not decay:
            Regularizer([w], l2=0.5).attach(optimizer)
        found.append([step(w, optimizer, 0.5) for _ in range(3)])
    assert found[0] == pytest.approx(found[1])


def test_a_complex_parameter_that_is_unfrozen():
    net = nn.Linear(2, 2)
    net.z = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    regularizer, without = Regularizer(net, l2=0.5), Regularizer(net, l2=0.5, exclude="z")
    expected = regularizer().item()
    net.z.requires_grad_()
    with pytest.raises(
        TypeError, match=r"params\['z'\] must be .*, got torch.complex64; leave it out with exclude='z'"
    ):
        regularizer()
    assert without().item() == expected


def test_an_optimizer_that_is_initialized_again():
    w, optimizer = one()
    attachment = Regularizer([w], l2=0.5).attach(optimizer)
    step(w, optimizer)
    optimizer.__init__([w], lr=0.1)
    assert not attachment.is_active
    with pytest.warns(UserWarning, match="'0' has its penalty in the steps of an optimizer that is gone"):
        step(w, optimizer)


def test_an_attachment_ends_with_its_optimizer():
    """Nothing else keeps it and its parameters alive, also behind a step."""
    w, optimizer = one()
    attachment = weakref.ref(Regularizer([w], l2=0.5).attach(optimizer))
    step(w, optimizer)
    del optimizer
    gc.collect()
    assert attachment() is None


def test_a_shallow_copy_of_what_is_attached():
    """Its parameters are the same, and have their penalty."""
    w, optimizer = one()
    regularizer = Regularizer([w], l2=0.5)
    regularizer.attach(optimizer)
    copy.copy(regularizer)
    assert step(w, optimizer) == pytest.approx(0.9)
