"""What is said where ``zeros`` of a `Regularizer` cannot be reached, before anything is written."""

import pytest
import torch
from optim_cases import backward, net, train
from test_zeros_aim import weights, zeros_in

from fused_reg import Regularizer
from fused_reg.schedules import CubicRamp


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"zeros": 1.0}, ValueError, "Regularizer: zeros must be a share from 0 to below 1, got 1.0"),
        ({"zeros": -0.1}, ValueError, "Regularizer: zeros must be a share from 0 to below 1, got -0.1"),
        ({"zeros": float("nan")}, ValueError, "Regularizer: zeros must be a share from 0 to below 1, got nan"),
        ({"zeros": [0.8]}, TypeError, 'zeros must be a share, a schedule of it or a pattern as "2:4", got list'),
        ({"zeros": torch.tensor(0.8)}, TypeError, "zeros must be a share, .* got Tensor"),
        ({"zeros": lambda: 0.5}, TypeError, "zeros must be a schedule that takes the step as its one argument"),
        ({"zeros": CubicRamp(0.0, 80.0, 9)}, ValueError, "zeros: end of CubicRamp must be a share .* got 80.0"),
        ({"zeros": lambda step: 1.5}, ValueError, "Regularizer: zeros at step 0 must be a share .* got 1.5"),
        ({"zeros": "4:2"}, ValueError, 'Regularizer: zeros must be "n:m" with 1 <= n < m <= 64, as "2:4", got \'4:2\''),
        ({"zeros": "0.8"}, ValueError, "Regularizer: zeros must be \"n:m\" .* got '0.8'"),
        ({"zeros": "2:4"}, ValueError, r"'0.weight': the rows must have a multiple of 4 .* shape \(20, 10\)"),
        ({"zeros": "1:3", "include": "2.*"}, ValueError, r"zeros of '2.weight': the rows .* got shape \(3, 20\)"),
        ({"zeros": "1:2", "group": "row"}, ValueError, 'zeros of .* must be of elements .* got group="row"'),
        ({"zeros": 0.8, "zeros_per": "layer"}, ValueError, "zeros_per must be None or \"parameter\", got 'layer'"),
        ({"l1": 0.8, "zeros_per": "parameter"}, ValueError, "zeros_per=.* must come with a share of zeros, got none"),
        ({"zeros": "1:2", "zeros_per": "parameter", "weights_only": True}, ValueError, "zeros_per=.* got a pattern"),
        ({"zeros": 0.001, "include": "2.*"}, ValueError, "zeros=0.001 must .* of the 63 elements .* makes 0 "),
        ({"zeros": 0.92, "include": "2.*", "group": "row"}, ValueError, "zeros=0.92 must leave .* of the 6 groups"),
        ({"zeros": CubicRamp(0.0, 0.8, 9), "include": "2.bias", "group": "tensor"}, None, ""),
        ({"zeros": CubicRamp(0.0, 0.9, 9), "include": "2.bias"}, ValueError, "zeros=0.9 must .* it makes 3 zero"),
        ({"zeros": 0.5, "zeros_per": "parameter", "include": ["0.*", "2.bias"]}, None, ""),
        ({"zeros": 0.9, "zeros_per": "parameter"}, ValueError, "of the 3 elements of '2.bias' it makes 3 zero"),
        ({"zeros": 0.5, "toward": "start", "l2": 0.1}, ValueError, "must come without toward, got both"),
        ({"zeros": 0.5, "importance": {"0.bias": torch.zeros(20).double()}}, ValueError, "without importance"),
        ({"zeros": 0.5, "lower": 0.1}, ValueError, "zeros of '0.weight' must be within its bounds, .* lower=0.1"),
        ({"zeros": 0.5, "upper": -0.1}, ValueError, "zeros of '0.weight' must be within its bounds, .* upper=-0.1"),
        ({"zeros": 0.5, "lower": 0.0, "upper": 1.0}, None, ""),
        ({"zeros": 0.5, "lower": torch.tensor(0.1)}, ValueError, "'0.weight' must be within its bounds, .* lower=0.1"),
        ({"zeros": 0.5, "upper": lambda step: step - 1}, ValueError, "must be within its bounds, .* upper=-1"),
        ({"zeros": 0.5, "rules": [("2.*", {"lower": 1})]}, ValueError, "zeros of '2.weight' must be within its bounds"),
        ({"zeros": 0.5, "rules": [("*", {"zeros": 0.4})]}, ValueError, "zeros must apply to a parameter, but rules"),
        ({"l1": 0.5, "rules": [("0.*", {"zeros": 2})]}, ValueError, "rules.0. '0.*': zeros must be a share"),
        ({"group": "row", "l1": 0.5}, ValueError, 'group="row" must come with l2_norm'),
        ({"group_weights": "sqrt_size", "zeros": 0.5}, ValueError, "group_weights must come with l2_norm"),
    ],
)
def test_errors_when_it_is_built(given, error, message):
    if error is None:
        Regularizer(net(), **given)
        return
    with pytest.raises(error, match=message):
        Regularizer(net(), **given)


def with_bounds():
    model = net()
    given = {"l1": lambda step: 0.1 * step, "l2": 0.2, "lower": lambda step: 0.2 * step - 0.4, "upper": 1.0}
    return model, Regularizer(model, zeros=0.5, **given)


def state_of(regularizer, **others):
    state = regularizer.state_dict()
    groups = [group | others for group in state["groups"]]
    return state | {"groups": groups}


@pytest.mark.parametrize(
    ("change", "function", "bound"),
    [
        (lambda r: r.set_strength(l2=0.3, lower=0.5), "set_strength", "lower=0.5, upper=1.0"),
        (lambda r: r.set_strength(upper=-0.5, where="2.*"), "set_strength", "lower=-0.4, upper=-0.5"),
        (lambda r: r.set_strength(l2=0.3, lower=torch.tensor(0.5)), "set_strength", "lower=0.5, upper=1.0"),
        (lambda r: r.set_strength(l2=0.3, lower=lambda step: 0.5), "set_strength", "lower=0.5, upper=1.0"),
        (lambda r: setattr(r, "step", 3), "Regularizer", "lower=0.2"),
        (lambda r: [r.advance() for _ in range(3)], "Regularizer", "lower=0.2"),
        (lambda r: r.load_state_dict(r.state_dict() | {"step": 3}), "load_state_dict", "lower=0.2"),
        (lambda r: r.load_state_dict(state_of(r, upper=-0.1, l2=0.3)), "load_state_dict", "upper=-0.1"),
        (lambda r: r.load_state_dict(state_of(r, lower=0.1, scheduled=["l1"])), "load_state_dict", "lower=0.1"),
    ],
)
def test_bounds_that_leave_zero_out_whatever_sets_them(change, function, bound):
    """Before anything is changed; with advance() the last step is one that may be."""
    model, regularizer = with_bounds()
    before = repr(regularizer), regularizer.state_dict(), [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"^{function}: zeros of '..weight' must be within its bounds, .*{bound}"):
        change(regularizer)
    regularizer.step = 0 if regularizer.step == 2 else regularizer.step
    assert (repr(regularizer), regularizer.state_dict()) == before[:2]
    regularizer.prox_(0.1)
    assert zeros_in(model.parameters()) == round(0.5 * 283)


def test_a_bound_that_is_written():
    model, bound = net(), torch.zeros(())
    regularizer = Regularizer(model, zeros=0.5, lower=bound)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer, mode="prox")
    backward(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    bound.fill_(0.25)
    for use in (optimizer.step, lambda: regularizer.prox_(0.1)):
        with pytest.raises(ValueError, match=r"zeros of '0.weight' must be within its bounds, .* lower=0.25"):
            use()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_what_is_frozen_does_not_count():
    model = net()
    for p in list(model.parameters())[:3]:
        p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"of the 3 elements of '2.bias' it makes 3 zero"):
        Regularizer(model, zeros=0.9)
    model[2].bias.requires_grad_(False)
    Regularizer(model, zeros=0.9).prox_(0.1)  # of nothing
    assert zeros_in(model.parameters()) == 0


def test_it_has_no_part_in_values_and_gradients():
    model = net()
    regularizer = Regularizer(model, l1=0.1, zeros=0.8)
    for use in (regularizer, regularizer.accumulate_grad_):
        with pytest.raises(ValueError, match="zeros must be reached by proximal steps"):
            use()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"mode must be .prox. where parameters have zeros, as '0.weight', got .grad."):
        regularizer.attach(optimizer)
    assert all(p.grad is None for p in model.parameters())
    assert regularizer.attach(optimizer, mode="prox").value == Regularizer(model, l1=0.1)()


@pytest.mark.parametrize("change", ["set_strength", "load_state_dict"])
def test_what_is_attached_for_gradients_gets_none(change):
    model = net()
    aimed = Regularizer(model, l1=0.5, zeros=0.8)
    regularizer = Regularizer(model, l1=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = regularizer.attach(optimizer)
    given = {"set_strength": lambda: regularizer.set_strength(zeros=0.8)}
    given["load_state_dict"] = lambda: regularizer.load_state_dict(aimed.state_dict())
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=rf"^{change}: mode must be .prox. where parameters have zeros, as '0.weight'"):
        given[change]()
    assert regularizer.state_dict() == before
    attachment.remove()
    given[change]()
    assert regularizer.state_dict()["aims"][0]["zeros"] == 0.8


def test_a_schedule_that_goes_wrong_is_told_a_step_ahead():
    model = net()
    regularizer = Regularizer(model, zeros=lambda step: [0.1, 0.2, 1.0][step], weights_only=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer, mode="prox")
    train(model, optimizer, range(1))
    backward(model, 1)
    with pytest.raises(ValueError, match=r"zeros at step 2 must be a share from 0 to below 1, got 1.0"):
        optimizer.step()
    assert zeros_in(weights(model)) == 52


def test_shards_are_refused(mesh):
    from torch.distributed.fsdp import fully_shard

    model = net(torch.float32)
    regularizer = Regularizer(model, zeros=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer, mode="prox")
    fully_shard(model, mesh=mesh)
    with pytest.raises(TypeError, match=r"zeros of '0.weight' must be of plain tensors, got a DTensor"):
        optimizer.step()
