"""What a `Regularizer` does beyond one fused call: several at once, names in errors, steps, wrong arguments."""

import re

import pytest
import torch
from oracle import assert_same_bits
from test_attach import step
from torch import nn

from fused_reg import Regularizer, fused_penalty, regularized

GROUPS = [("rows", {"l2_norm": 1.0, "group": "row"}), ("whole", {"l2_norm": 1.0})]


def pair():
    rows, whole = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(4))
    return rows, whole, Regularizer([("rows", rows), ("whole", whole)], rules=GROUPS)


def test_no_call_writes_if_a_later_one_fails():
    """Norms of rows and of tensors are two calls."""
    rows, whole, regularizer = pair()
    rows.grad = torch.ones(3, 3)
    whole.grad = torch.ones(4).to_sparse()
    with pytest.raises(TypeError, match=r"^accumulate_grad_: params\['whole'\].grad must be dense"):
        regularizer.accumulate_grad_()
    assert_same_bits([rows.grad], [torch.ones(3, 3)])
    whole.data = torch.ones(1).expand(4)
    before = rows.detach().clone()
    with pytest.raises(ValueError, match=r"^prox_: params\['whole'\] must have memory for each of its elements"):
        regularizer.prox_(0.5)
    assert_same_bits([rows.detach()], [before])


def test_no_group_of_an_optimizer_is_written_if_another_fails():
    """Groups with and without ``maximize`` are two calls."""
    rows, whole = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(4))
    optimizer = torch.optim.SGD([{"params": [rows]}, {"params": [whole], "maximize": True}], lr=0.1)
    Regularizer([("rows", rows), ("whole", whole)], l1=0.5).attach(optimizer)
    rows.grad, whole.grad = torch.ones(3), torch.ones(4).to_sparse()
    with pytest.raises(TypeError, match=r"params\['whole'\]"):
        optimizer.step()
    assert_same_bits([rows.grad], [torch.ones(3)])


def test_errors_name_the_parameter_also_beside_frozen_ones():
    frozen, sparse = nn.Parameter(torch.ones(2), requires_grad=False), nn.Parameter(torch.ones(3))
    sparse.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=r"params\['emb.w'\].grad"):
        Regularizer([("lin.w", frozen), ("emb.w", sparse)], l1=1.0).accumulate_grad_()


@pytest.mark.parametrize("step", [[0.5], [0.5] * 10, "a", None, torch.ones(2), True])
def test_a_step_is_one_number(step):
    rows, _, regularizer = pair()
    before = rows.detach().clone()
    with pytest.raises(TypeError, match=r"^prox_: step must be a float or a 0-dim tensor, got "):
        regularizer.prox_(step)
    assert_same_bits([rows.detach()], [before])


@pytest.mark.parametrize("scale", [[0.5], "a", None, True])
def test_a_scale_is_one_number(scale):
    rows, _, regularizer = pair()
    with pytest.raises(TypeError, match=r"^accumulate_grad_: scale must be a float or a 0-dim tensor, got "):
        regularizer.accumulate_grad_(scale)
    assert rows.grad is None


def test_an_empty_list_of_patterns_is_an_error():
    with pytest.raises(ValueError, match="include must have a pattern, got an empty list"):
        Regularizer(nn.Linear(2, 2), l1=1.0, include=[])
    assert len(list(Regularizer(nn.Linear(2, 2), l1=1.0, exclude=[]).named_parameters())) == 2


@pytest.mark.parametrize(
    ("net", "rules"),
    [(regularized(nn.Linear(2, 2), l1=1e-4, bias=True), None), (nn.Linear(2, 2), [("*", {"l1": 0.1})])],
    ids=["marks", "rules"],
)
def test_strengths_that_nothing_takes_are_an_error(net, rules):
    with pytest.raises(ValueError, match="Regularizer: l1 must apply to a parameter"):
        Regularizer(net, l1=0.03, rules=rules)


def test_the_step_can_be_set():
    """To go on from a checkpoint that knows the step alone."""
    regularizer = Regularizer([nn.Parameter(torch.ones(2))], l1=lambda step: 0.5 + step)
    regularizer.step = 3
    assert (regularizer.step, regularizer().item()) == (3, 7.0)
    regularizer.advance()
    assert (regularizer.step, regularizer().item()) == (4, 9.0)
    for wrong in (-1, 1.5, "a", True):
        with pytest.raises(ValueError, match="step must be an integer >= 0"):
            regularizer.step = wrong
    assert (regularizer.step, regularizer().item()) == (4, 9.0)


@pytest.mark.parametrize(
    "state",
    [
        {"step": 1, "groups": [{}]},
        {"step": 1, "groups": None},
        {"step": -3, "groups": []},
        {"step": 1.5, "groups": []},
        {"step": "a", "groups": []},
        {
            "step": 1,
            "groups": [{"params": ["0"], "l1": "x", "l2": 0, "l2_norm": 0, "group": "tensor", "scheduled": []}],
        },
    ],
)
def test_a_broken_state_changes_nothing(state):
    regularizer = Regularizer([nn.Parameter(torch.ones(2))], l1=0.5)
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=r"^load_state_dict: "):
        regularizer.load_state_dict(state)
    assert regularizer.state_dict() == before


def test_a_learned_strength_cannot_be_attached():
    """It would never get its gradient: a penalty in the loss gives it one."""
    w, strength = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor(0.5))
    regularizer = Regularizer([w], l1=strength)
    with pytest.raises(ValueError, match="attach: l1 of '0' must be a constant, got a tensor that requires grad"):
        regularizer.attach(torch.optim.SGD([w, strength], lr=0.1))
    regularizer().backward()
    assert strength.grad == 2


def test_an_optimizer_whose_groups_change_places_is_followed():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.3}])
    Regularizer([a, b], l1=1.0).attach(optimizer, mode="prox")
    optimizer.param_groups.reverse()
    step(optimizer)
    torch.testing.assert_close((a.item(), b.item()), (0.9, 0.7))


def test_a_report_has_norms_whose_squares_overflow():
    w, empty = nn.Parameter(torch.full((3,), 1e200, dtype=torch.float64)), nn.Parameter(torch.empty(0))
    regularizer = Regularizer([w, empty], l2_norm=1.0)
    rows = {row["name"]: row for row in regularizer.report().rows}
    for name in ("0", "group 0", "total"):
        assert rows[name]["norm"] == rows[name]["value"] == pytest.approx(regularizer().item(), rel=1e-15)
    assert rows["1"]["norm"] == 0


def test_strengths_are_checked_before_the_first_of_several_calls_writes():
    a, b = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    elsewhere = torch.tensor(0.1, device="meta")
    rules = [("a", {"l2_norm": 0.1}), ("b", {"l2_norm": elsewhere, "group": "row"})]
    regularizer = Regularizer([("a", a), ("b", b)], rules=rules)
    for call in (regularizer.accumulate_grad_, lambda: regularizer.prox_(1.0)):
        with pytest.raises(ValueError, match="l2_norm must be on the CPU or on the parameters' device"):
            call()
        assert a.grad is None
        assert (a == 1).all()


class SuperStep(torch.optim.SGD):
    """torch calls the hooks around this step and around that of its base class."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_step_that_calls_its_base_class_counts_once(mode):
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # now the base class calls hooks, too
    w = nn.Parameter(torch.ones(1))
    optimizer = SuperStep([w], lr=1.0)
    regularizer = Regularizer([w], l1=0.125)
    regularizer.attach(optimizer, mode)
    for count in (1, 2, 3):
        w.grad = torch.zeros(1)
        optimizer.step()
        assert (w.item(), regularizer.step) == (1 - 0.125 * count, count)
        with pytest.raises(ZeroDivisionError):  # leaves the hooks half-way
            optimizer.step(lambda: 1 / 0)


def test_a_learned_strength_set_after_attaching_is_an_error():
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    regularizer = Regularizer([w], l1=0.1)
    regularizer.attach(optimizer)
    regularizer.set_strength(l1=torch.tensor(0.2, requires_grad=True))
    with pytest.raises(ValueError, match="attach: l1 of '0' must be a constant"):
        optimizer.step()
    assert w.grad is None


def test_weight_decay_that_comes_later_warns():
    w = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    Regularizer([w], l2=0.1).attach(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.warns(UserWarning, match="L2 counts twice"):
        optimizer.step()


def test_a_parameter_that_an_optimizer_exchanges_is_followed():
    first, old, new = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = torch.optim.SGD([first, old], lr=0.125)
    Regularizer([first, old, new], l1=1.0).attach(optimizer, "prox")
    with pytest.warns(UserWarning, match="^attach: '2' of the regularizer must be in an attached optimizer"):
        step(optimizer)
    optimizer.param_groups[0]["params"][1] = new
    with pytest.warns(UserWarning, match="^attach: '1' of the regularizer must be in an attached optimizer"):
        step(optimizer)
    assert (first.item(), old.item(), new.item()) == (0.75, 0.875, 0.875)


def test_a_first_call_under_inference_mode_leaves_nothing_behind():
    regularizer = Regularizer(nn.Linear(3, 2), l2=0.5, rules=[("bias", {"l2": 0.25})])
    with torch.inference_mode():
        value = regularizer()
    assert regularizer().item() == value.item()
    regularizer().backward()


def test_the_default_device_does_not_matter():
    regularizer = Regularizer(nn.Linear(2, 2), l1=0.5, rules=[("bias", {"l1": 0.25})])
    with torch.device("meta"):
        value = regularizer()
        assert fused_penalty([]).device.type == "cpu"
    assert value.item() == regularizer().item() > 0


def test_errors_of_the_penalty_and_of_a_report_name_the_parameter():
    net = nn.Linear(2, 2)
    regularizer = Regularizer(net, l1=0.1)
    net.weight.data = net.weight.data.to(torch.float8_e4m3fn)
    for call, name in ((regularizer, "fused_penalty"), (regularizer.report, "report")):
        with pytest.raises(TypeError, match=re.escape(f"{name}: params['weight'] must be float32, float64, bf")):
            call()
