"""What a `Regularizer` does beyond one fused call: several at once, names in errors, steps, wrong arguments."""

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer, regularized

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


def test_an_empty_list_of_patterns_is_an_error():
    with pytest.raises(ValueError, match="include must have a pattern, got an empty list"):
        Regularizer(nn.Linear(2, 2), l1=1.0, include=[])
    assert len(list(Regularizer(nn.Linear(2, 2), l1=1.0, exclude=[]).named_parameters())) == 2


@pytest.mark.parametrize(
    ("net", "rules"),
    [(regularized(nn.Linear(2, 2), l1=1e-4, bias=True), None), (nn.Linear(2, 2), [("*", {"l2": 0.1})])],
    ids=["marks", "rules"],
)
def test_strengths_that_nothing_takes_are_an_error(net, rules):
    with pytest.raises(ValueError, match="l1, l2 or l2_norm must apply to a parameter"):
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
    optimizer.step()
    torch.testing.assert_close((a.item(), b.item()), (0.9, 0.7))


def test_a_report_has_norms_whose_squares_overflow():
    w, empty = nn.Parameter(torch.full((3,), 1e200, dtype=torch.float64)), nn.Parameter(torch.empty(0))
    regularizer = Regularizer([w, empty], l2_norm=1.0)
    rows = {row["name"]: row for row in regularizer.report().rows}
    for name in ("0", "group 0", "total"):
        assert rows[name]["norm"] == rows[name]["value"] == pytest.approx(regularizer().item(), rel=1e-15)
    assert rows["1"]["norm"] == 0
