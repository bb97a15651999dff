"""``zeros`` in `Regularizer.set_strength` and in states: an aim is changed, dropped and given back as a strength is."""

import copy
import json
import pickle

import pytest
import torch
from optim_cases import backward, net
from test_zeros_aim import clones, weights, without_smallest, zeros_in
from torch import nn

from fused_reg import Regularizer, optim, regularized
from fused_reg.schedules import CubicRamp, PatternRamp

RAMP = CubicRamp(0.0, 0.8, steps=8)


def layers(count=4, **given):
    """The weights of each are larger than those before."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(count)))
    for i, p in enumerate(model.parameters()):
        torch.nn.init.uniform_(p, i + 1, i + 2)
    return model, Regularizer(model, **given)


def reached(model, regularizer):
    """How many of each 100 weights are zero after a step."""
    before = clones(model)
    regularizer.prox_(0.0)
    found = [zeros_in([p]) for p in model.parameters()]
    for p, x in zip(model.parameters(), before, strict=True):
        p.data.copy_(x)
    return found


@pytest.mark.parametrize("before", [0.2, RAMP, "1:2", 0.0], ids=str)
def test_for_all(before):
    model, regularizer = layers(zeros=before)
    regularizer.step = 2
    for share, count in ((0.5, 50), (0.25, 25), (0.75, 75)):
        regularizer.set_strength(zeros=share)
        assert sum(reached(model, regularizer)) == 4 * count
        assert f"zeros={share}: 4 parameters" in repr(regularizer)
        assert regularizer.report()["group 0"]["zeros_aim"] == share
    regularizer.set_strength(zeros=RAMP)
    assert sum(reached(model, regularizer)) == round(RAMP(2) * 400)
    regularizer.advance()
    assert sum(reached(model, regularizer)) == round(RAMP(3) * 400)
    regularizer.set_strength(zeros=PatternRamp("1:2", steps=1))
    assert reached(model, regularizer) == [50, 50, 50, 50]
    regularizer.set_strength(zeros=0.0)
    assert reached(model, regularizer) == [0, 0, 0, 0]
    assert "zeros" not in repr(regularizer)
    assert regularizer() == 0  # which has no zeros by now


def test_what_where_names_reaches_it_together():
    model, regularizer = layers(zeros=0.5)
    regularizer.set_strength(zeros=0.5, where="[01].*")
    assert reached(model, regularizer) == [100, 0, 100, 0]
    regularizer.set_strength(zeros=0.1, where=nn.Linear)
    assert reached(model, regularizer) == [40, 0, 0, 0]
    regularizer.set_strength(zeros=0, where="0.*")
    assert reached(model, regularizer) == [0, 30, 0, 0]
    regularizer.set_strength(zeros=0.2)  # as l1: of all that have been given one, also 0
    assert reached(model, regularizer) == [80, 0, 0, 0]


def test_all_that_have_one_or_all():
    model, regularizer = layers(l1=0.0, rules=[("1.*", {"zeros": 0.25}), ("2.*", {"zeros": 0.0})])
    regularizer.set_strength(zeros=0.0)
    regularizer.set_strength(zeros=0.5)
    assert reached(model, regularizer) == [0, 50, 0, 0]
    model, regularizer = layers(l1=0.0)
    regularizer.set_strength(zeros=0.5)
    assert reached(model, regularizer) == [100, 100, 0, 0]
    model, regularizer = layers(zeros=0.5, zeros_per="parameter")
    regularizer.set_strength(zeros=0.25)
    assert reached(model, regularizer) == [25, 25, 25, 25]


def test_what_a_rule_or_a_mark_gave_stays_by_itself():
    """Also when it was dropped in between, or has had a share of its own, with a schedule, in a state, and of what the
    module gets later; `where` takes all together."""
    model, _ = layers(zeros=0.5)
    regularized(model[2], zeros=0.5)
    regularizer = Regularizer(model, zeros=0.5, rules=[("3.*", {"zeros": 0.5})])
    for share, pair in ((0.25, 50), (0.0, 0), (0.5, 100), (lambda step: 0.75, 150)):
        regularizer.set_strength(zeros=share)
        assert reached(model, regularizer) == [min(pair, 100), max(pair - 100, 0), pair // 2, pair // 2]
    state = regularizer.state_dict()
    assert [aim["params"] for aim in state["aims"]] == [["0.weight", "1.weight"], ["2.weight"], ["3.weight"]]
    regularizer.load_state_dict(state)
    copied, again = copy.deepcopy((model, regularizer))
    regularizer.set_strength(zeros=0.5, where="*")
    assert reached(model, regularizer) == [100, 100, 0, 0]
    regularizer.set_strength(zeros=0.5)
    assert reached(model, regularizer) == [100, 0, 50, 50]
    copied[3] = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    torch.nn.init.uniform_(copied[3][0].weight, 7, 8)
    torch.nn.init.uniform_(copied[3][1].weight, 8, 9)
    with pytest.warns(UserWarning, match="follows its module"):
        assert reached(copied, again) == [100, 50, 75, 100, 50]


def test_groups_are_those_that_they_have():
    model, regularizer = layers(2, l2_norm=0.0, group="output", rules=[("1.*", {"group": "tensor"})])
    regularizer.set_strength(zeros=0.33)
    regularizer.prox_(0.0)
    rows, elements = model.parameters()
    assert ((rows == 0).all(1).sum(), zeros_in([rows]), zeros_in([elements])) == (3, 30, 33)


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
def test_between_attached_steps(make):
    model = net()
    optimizer = make(model.parameters(), lr=0.0)
    regularizer = Regularizer(model, l1=0.1, zeros=0.3, weights_only=True)
    regularizer.attach(optimizer, mode="prox")
    for share in (0.3, 0.5, 0.0, 0.7):
        regularizer.set_strength(zeros=share)
        for p in model.parameters():
            torch.nn.init.normal_(p)
        own = [w.detach() for w in weights(model)]
        expected = without_smallest(own, round(share * 260))
        backward(model, 0)
        optimizer.step()
        assert all(torch.equal(w, x) for w, x in zip(weights(model), expected, strict=True))


def test_bounds_change_with_it():
    model, regularizer = layers(zeros=0.5)
    regularizer.set_strength(zeros=0.0, lower=0.25)
    assert reached(model, regularizer) == [0, 0, 0, 0]
    regularizer.set_strength(zeros=0.5, lower=0.0)
    assert sum(reached(model, regularizer)) >= 200


@pytest.mark.parametrize(
    ("given", "change", "message"),
    [
        ({"zeros": 0.5}, {"zeros": 1.0}, "zeros must be a share from 0 to below 1, got 1.0"),
        ({"zeros": 0.5}, {"zeros": "0.8"}, 'zeros must be "n:m" with 1 <= n < m <= 64, as "2:4", got \'0.8\''),
        ({"zeros": 0.5}, {"zeros": "2:4"}, "zeros of '0.weight': the rows must have a multiple of 4 elements"),
        (
            {"l1": 0.5, "group": "row", "l2_norm": 0.1},
            {"zeros": "1:2"},
            "zeros of '0.weight' must be of elements where",
        ),
        ({"zeros": 0.5}, {"zeros": 0.001}, "zeros=0.001 must leave some and make others zero, but of the 400 elements"),
        ({"zeros": 0.5, "zeros_per": "parameter"}, {"zeros": 0.001}, "zeros=0.001 must leave some .* of the 100"),
        ({"l1": 0.5, "lower": 0.5}, {"zeros": 0.5}, "zeros of '0.weight' must be within its bounds, .* lower=0.5"),
        ({"zeros": 0.5}, {"zeros": 0.4, "lower": 0.5}, "zeros of '0.weight' must be within its bounds, .* lower=0.5"),
        ({"l1": 0.5, "toward": "start"}, {"zeros": 0.5}, "zeros of '0.weight' must come without toward, got both"),
        (
            {"l2_norm": 0.5, "group": "column", "together": [["0.weight", "1.weight"]]},
            {"zeros": 0.5},
            "zeros of '0.weight' must come without together, got both",
        ),
        ({"zeros": 0.5}, {"zeros": 0.4, "where": "9.*"}, "where must match the name of a parameter, got '9"),
        ({"zeros": 0.5}, {"zeros": lambda step: 2.0}, "zeros at step 0 must be a share from 0 to below 1, got 2.0"),
    ],
)
def test_what_cannot_be(given, change, message):
    regularizer = layers(**given)[1]
    before = repr(regularizer), regularizer.state_dict()
    with pytest.raises(ValueError, match=f"^(set_strength|Regularizer): {message}"):
        regularizer.set_strength(l2=0.25, **change)
    assert (repr(regularizer), regularizer.state_dict()) == before
    with pytest.raises(TypeError, match=r"^set_strength: zeros must be a share, a schedule .* got list"):
        regularizer.set_strength(zeros=[0.5])
    with pytest.raises(TypeError, match=r"must be given, got none"):
        regularizer.set_strength(zeros=None)


def test_what_is_attached_by_gradients_says_so_at_every_step():
    model, regularizer = layers(l1=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = clones(model)
    regularized(model[0], l1=0.1, zeros=0.5)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"mode must be .prox. where parameters have zeros, as '0.weight'"):
            optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))


def test_a_module_that_changes_has_the_aim_of_now():
    model, regularizer = layers(zeros=0.25)
    regularizer.set_strength(zeros=0.5, where="[01].*")
    model[1] = nn.Linear(10, 10, bias=False)
    with pytest.warns(UserWarning, match="it follows its module"):
        assert sum(reached(model, regularizer)[:2]) == 100
    assert reached(model, regularizer)[2:] == [50, 0]
    model.append(nn.Linear(10, 10, bias=False))  # which reaches it with those that have the same
    nn.init.uniform_(model[4].weight, 0, 1)
    with pytest.warns(UserWarning, match="it follows its module"):
        assert reached(model, regularizer)[2:] == [0, 0, 75]


def test_groups_that_do_not_fit():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 5, bias=False))
    regularizer = Regularizer(model, l2_norm=0.1, group=("row", 3), rules=[("1.*", {"l2_norm": 0.0, "l1": 0.1})])
    with pytest.raises(ValueError, match=r"^set_strength: params\['1.weight'\] must have a multiple of 3 rows"):
        regularizer.set_strength(zeros=0.5, where="1.*")


def test_groups_that_are_weighed_when_the_aim_is_dropped():
    model, regularizer = layers(2, zeros=0.5, group="row", group_weights="sqrt_size")
    regularizer.set_strength(zeros=0.0)
    model[1] = nn.Linear(10, 20, bias=False)
    with pytest.warns(UserWarning, match="it follows its module"):
        assert reached(model, regularizer) == [0, 0]
    regularizer.set_strength(zeros=0.5)
    assert sum(reached(model, regularizer)) == 150


def changed():
    """An aim of its own for two layers, one that is dropped, and one that is as it was built."""
    rules = [("3.*", {"zeros": 0.5})]
    model, regularizer = layers(zeros=RAMP, rules=rules)
    fresh = Regularizer(model, zeros=RAMP, rules=rules)
    regularizer.step = 2
    regularizer.set_strength(zeros=0.5, where="[01].*")
    regularizer.set_strength(zeros=0.0, where="2.*")
    return model, regularizer, fresh


@pytest.mark.parametrize("through", [copy.deepcopy, lambda x: json.loads(json.dumps(x))])
def test_states_have_what_was_changed(through):
    model, regularizer, fresh = changed()
    assert reached(model, regularizer) == [100, 0, 0, 50]
    state = through(regularizer.state_dict())
    fresh.load_state_dict(state)
    assert reached(model, fresh) == [100, 0, 0, 50]
    assert fresh.state_dict() == regularizer.state_dict()
    model[1] = nn.Linear(10, 10, bias=False)  # held as it was
    torch.nn.init.uniform_(model[1].weight, 2, 3)
    for r in (regularizer, fresh):
        with pytest.warns(UserWarning, match="it follows its module"):
            assert reached(model, r) == [100, 0, 0, 50]
    model, _, fresh = changed()
    del state["aims"]  # as in a state of before there were any
    fresh.load_state_dict(state)
    assert sum(reached(model, fresh)[:3]) == round(RAMP(2) * 300)
    assert "aims" not in Regularizer(model, l1=0.1).state_dict()


def test_states_of_schedules_go_on():
    model, regularizer = layers(zeros=RAMP)
    regularizer.step = 5
    state = regularizer.state_dict()
    assert state["aims"] == [
        {"params": [f"{i}.weight" for i in range(4)], "zeros": RAMP(5), "scheduled": True},
    ]
    other = Regularizer(model, zeros=CubicRamp(0.0, 0.5, steps=10))
    other.load_state_dict(state)
    assert sum(reached(model, other)) == round(CubicRamp(0.0, 0.5, steps=10)(5) * 400)
    regularizer.set_strength(zeros=0.25)
    other.load_state_dict(regularizer.state_dict())  # whose ramp has ended
    other.advance()
    assert sum(reached(model, other)) == 100
    other.load_state_dict(state)
    other.advance()
    assert sum(reached(model, other)) == round(CubicRamp(0.0, 0.5, steps=10)(6) * 400)


def test_a_pattern_at_the_end_of_its_ramp():
    model, regularizer = layers(zeros=PatternRamp("1:2", steps=2))
    regularizer.step = 9
    state = regularizer.state_dict()
    assert state["aims"][0]["zeros"] == 0.5
    other = Regularizer(model, zeros=PatternRamp("1:2", steps=2))
    other.load_state_dict(state)
    assert reached(model, other) == [50, 50, 50, 50]


def test_a_pool_whose_schedules_are_several_here():
    model, regularizer = layers(zeros=RAMP)
    other = Regularizer(model, zeros=RAMP, rules=[("1.*", {"zeros": CubicRamp(0.0, 0.5, steps=8)})])
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"zeros of '1.weight' must have a schedule, .* and one with '0.weight', got "):
        other.load_state_dict(regularizer.state_dict())
    assert other.state_dict() == before


def test_a_state_may_give_an_aim_and_drop_one():
    model, regularizer = layers(l1=0.5)
    other = Regularizer(model, l1=0.5)
    regularizer.set_strength(zeros="1:2", where="2.*")
    other.load_state_dict(regularizer.state_dict())
    assert reached(model, other) == reached(model, regularizer) == [0, 0, 50, 0]
    assert other.state_dict() == regularizer.state_dict()
    model[3] = nn.Linear(10, 10, bias=False)  # which has none
    for r in (regularizer, other):
        with pytest.warns(UserWarning, match="it follows its module"):
            assert reached(model, r) == [0, 0, 50, 0]
    regularizer.set_strength(zeros=0.0)
    other.load_state_dict(regularizer.state_dict())
    assert reached(model, other) == reached(model, regularizer) == [0, 0, 0, 0]


def pool(**others):
    return {"params": ["0.weight"], "zeros": 0.5, "scheduled": False} | others


@pytest.mark.parametrize(
    ("aims", "message"),
    [
        ({}, "aims must be a list, as `state_dict` gives it, got dict"),
        (["0.weight"], r"aims\[0\] must have the keys params, zeros, scheduled, got str"),
        ([pool(steps=1)], r"aims\[0\] must have the keys params, zeros, scheduled, got \["),
        ([pool(zeros=1.5)], r"aims\[0\]: zeros must be a share from 0 to below 1, got 1.5"),
        ([pool(zeros=None)], r"aims\[0\] must have a list of names and a share or pattern, got {"),
        ([pool(params="0.weight")], r"aims\[0\] must have a list of names and a share or pattern, got {"),
        ([pool(params=["4.weight"])], r"aims\[0\] must name parameters .* each once, got \['4.weight'\]"),
        ([pool(params=[])], r"aims\[0\] must name parameters that are regularized, each once, got \[\]"),
        ([pool(params=[["0.weight"]])], r"aims\[0\] must name parameters that are regularized, each once"),
        ([pool(), pool()], r"aims\[1\] must name parameters that are regularized, each once, got \['0.weight'\]"),
        ([pool(zeros="2:4")], "zeros of '0.weight': the rows must have a multiple of 4 elements"),
        ([pool(zeros=0.001)], "zeros=0.001 must leave some and make others zero"),
        ([pool(scheduled=True)], "zeros of '0.weight' must have a schedule, as in the state_dict, .* got 0.5"),
    ],
)
def test_wrong_states(aims, message):
    regularizer = layers(zeros=0.5)[1]
    before = regularizer.state_dict()
    with pytest.raises(ValueError, match=f"^load_state_dict: {message}"):
        regularizer.load_state_dict(before | {"step": 3, "aims": aims})
    assert regularizer.state_dict() == before


def test_copies():
    model, regularizer, _ = changed()
    for own, other in (copy.deepcopy((model, regularizer)), pickle.loads(pickle.dumps((model, regularizer)))):
        assert reached(own, other) == [100, 0, 0, 50]
        other.set_strength(zeros=0.2, where="3.*")
        assert reached(own, other) == [100, 0, 0, 20]


@pytest.mark.parametrize(
    ("zeros", "said"),
    [
        (lambda step: -1.0, "zeros: what the schedule gives at step 0 must be finite"),
        (lambda step: 1.0, "zeros at step 0 must be a share from 0 to below 1"),
        (lambda step: None, "zeros: the schedule must give a number at step 0"),
    ],
)
def test_a_schedule_that_is_wrong_is_of_set_strength(zeros, said):
    _, regularizer = layers(zeros=0.5)
    with pytest.raises((TypeError, ValueError), match=f"^set_strength: {said}"):
        regularizer.set_strength(zeros=zeros)
    assert regularizer.report()["group 0"]["zeros_aim"] == 0.5


def test_zeros_of_what_is_attached_with_gradients():
    """Not at the next step, which could not be mended by then."""
    model, regularizer = layers(l1=0.1)
    first, rest = (torch.optim.SGD(layer.parameters(), lr=0.0) for layer in (model[0], model[1:]))
    attachment = regularizer.attach(first)
    regularizer.attach(rest, mode="prox")
    for where in (None, "*", "[01].*"):
        with pytest.raises(ValueError, match=r"^set_strength: mode must be .prox. where .* as '0.weight', got .grad."):
            regularizer.set_strength(zeros=0.5, l1=0.2, where=where)
    assert "l1=0.1: 4 parameters" in repr(regularizer)
    regularizer.set_strength(zeros=0.0)
    regularizer.set_strength(zeros=0.5, where="1.*")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    rest.step()
    assert [zeros_in([p]) for p in model.parameters()] == [0, 50, 0, 0]
    attachment.remove()
    regularizer.set_strength(zeros=0.5, where="*")
