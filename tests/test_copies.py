"""A `Regularizer` that is copied, pickled or resumed."""

import copy
import io
import pickle

import pytest
import torch
from test_regularizer import HALVED, assert_penalty, make_net, strengths_of
from torch import nn

from fused_reg import Regularizer


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved])
FORMS = pytest.mark.parametrize("form", [lambda net: net, nn.Module.named_parameters], ids=["module", "list"])
USES = {"call": Regularizer.__call__, "accumulate": Regularizer.accumulate_grad_, "prox": lambda r: r.prox_(0.1)}


@COPIES
@FORMS
@pytest.mark.parametrize("use", USES)
def test_a_copy_without_its_model_warns_once(copied, form, use):
    net = make_net()
    net[0].parent = [net]  # a cycle, which the garbage collector breaks
    regularizer = copied(Regularizer(form(net), l1=0.5))
    regularizer.report()
    regularizer.load_state_dict(regularizer.state_dict())
    with pytest.warns(UserWarning, match="^Regularizer: it is a copy whose parameter '0.weight' no model has"):
        USES[use](regularizer)
    USES[use](regularizer)


@COPIES
@FORMS
def test_a_copy_with_its_model_is_quiet(copied, form):
    net = make_net()
    other, regularizer = copied((net, Regularizer(form(net), l1=0.5)))
    assert_penalty(regularizer, list(other.parameters()), l1=0.5)
    net.regularizer = Regularizer(form(net), l1=0.5)
    other = copied(net)
    assert_penalty(other.regularizer, list(other.parameters()), l1=0.5)
    assert_penalty(net.regularizer, list(net.parameters()), l1=0.5)
    params, regularizer = copied((list(net.parameters()), Regularizer(form(net), l1=0.5)))
    assert_penalty(regularizer, params, l1=0.5)


def test_a_copy_is_not_attached_to_the_first_optimizer():
    net = make_net()
    regularizer = copy.deepcopy(Regularizer(net, l1=0.5))
    with pytest.raises(ValueError, match="optimizer must hold a parameter of the regularizer, got one that holds none"):
        regularizer.attach(torch.optim.SGD(net.parameters(), lr=0.1))


def test_a_new_schedule_goes_on_at_the_loaded_step():
    net = make_net()
    regularizer = Regularizer(net, l1=HALVED, rules=[("3.*", {"l1": 0, "l2": HALVED})])
    regularizer.step = 3
    state = regularizer.state_dict()
    held = Regularizer(net, l1=lambda step: 10.0 + step, rules=[("3.*", {"l1": 0, "l2": HALVED})])
    held.load_state_dict(state)
    assert (held.step, strengths_of(held)["0.weight"], strengths_of(held)["3.bias"]) == (3, (13, 0, 0), (0, 0.125, 0))
    held.advance()
    assert strengths_of(held)["0.weight"] == (14, 0, 0)


def test_a_new_schedule_goes_on_beside_what_has_left_it():
    net = make_net()
    regularizer = Regularizer(net, l1=HALVED)
    regularizer.step = 3
    regularizer.set_strength(l1=0.75, where="0.weight")
    other = Regularizer(net, l1=lambda step: 10.0 + step)
    other.load_state_dict(regularizer.state_dict())
    assert [s[0] for s in strengths_of(other).values()] == [0.75] + [13] * 7


def test_a_new_schedule_that_fails_there_changes_nothing():
    net = make_net()
    regularizer = Regularizer(net, l1=HALVED, l2=0.5)
    regularizer.step = 3
    other = Regularizer(net, l1=lambda step: 1.0 - step, l2=0.25)
    before = other.state_dict()
    with pytest.raises(
        ValueError, match=r"load_state_dict: l1 of '0.weight': what the schedule gives at step 3 must be"
    ):
        other.load_state_dict(regularizer.state_dict())
    assert other.state_dict() == before


class Clipped(torch.optim.SGD):
    def step(self, closure=None):
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 0.5)
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Clipped])
def test_parameters_that_an_optimizer_has_are_as_others_to_torch(tmp_path, kind):
    """They can be swapped, as those that are distributed are by ``net.cpu()``, and a file of them has tensors only."""
    net = make_net()
    optimizer = kind(net.parameters(), lr=0.1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        Regularizer(net, l2=0.5).attach(optimizer)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    torch.save(list(net.parameters()), tmp_path / "parameters.pt")
    torch.load(tmp_path / "parameters.pt", weights_only=True)
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    optimizer.state.clear()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer.step()


@COPIES
def test_an_attachment_that_has_stepped(copied):
    """What it keeps of rows from step to step is a view in another dtype: no file has that beside its parameter."""
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, l1=0.5, zeros=0.5, group="row", zeros_per="parameter", weights_only=True)
    attachment = regularizer.attach(optimizer, mode="prox")
    sum(p.sum() for p in net.parameters()).backward()
    optimizer.step()
    other, own = copied((net, attachment))
    assert not own.is_active
    assert own.value == attachment.value > 0
    with torch.no_grad():
        other[0].weight.zero_()
    assert 0 < own.value < attachment.value
