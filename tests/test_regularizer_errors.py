"""What a `Regularizer` says when it is given something wrong. (Hard cases 3, 19, 25, 26.)"""

import math
import re

import pytest
import torch
from test_regularizer import make_net
from torch import nn

from fused_reg import Regularizer, regularized
from fused_reg._terms import ABSENT, ANY_TERM, KINDS
from fused_reg.schedules import PatternRamp

PARAMETER = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (
            3,
            TypeError,
            "Regularizer: params must be a module, an iterable of tensors or of (name, tensor) pairs, got int",
        ),
        ({"w": PARAMETER}, TypeError, "Regularizer: params must be tensors or pairs, got dict; pass its `.items()`"),
        ([PARAMETER, None], TypeError, "Regularizer: params['1'] must be a tensor, got NoneType"),
        ([("w", 3.0)], TypeError, "Regularizer: params['w'] must be a tensor, got float"),
        ([nn.Linear(2, 2)], TypeError, "Regularizer: params['0'] must be a tensor, got Linear"),
        (
            [("w", PARAMETER.data)],
            ValueError,
            "Regularizer: params['w'] must be a parameter, got a tensor without grad; pass it itself, not its `.data`",
        ),
        ([("w", PARAMETER), ("w", nn.Parameter(torch.ones(2)))], ValueError, "got 'w' for two tensors"),
        (
            [2 * PARAMETER],
            ValueError,
            "Regularizer: params['0'] must be a leaf, as a parameter is, got the result of <Mul",
        ),
        (nn.LazyLinear(3), TypeError, "Regularizer: params['weight'] must be initialized, got UninitializedParameter"),
        (
            [nn.Parameter(torch.ones(2, dtype=torch.complex64))],
            TypeError,
            "Regularizer: params['0'] must be one tensor of float32, float64, bfloat16 or float16, got torch.complex64",
        ),
        (
            [nn.Parameter(torch.eye(2).to_sparse())],
            TypeError,
            "params['0'] must be dense (torch.strided), got torch.sparse_coo",
        ),
        ([], ValueError, "Regularizer: params must hold a parameter, got none"),
        (nn.ReLU(), ValueError, "Regularizer: params must hold a parameter, got none"),
        (
            nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)]),
            ValueError,
            "Regularizer: params must hold a dense floating point parameter, got none",
        ),
        (nn.Linear(2, 2).parameters, TypeError, "or of (name, tensor) pairs, got method; call it"),
    ],
)
def test_params(params, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Regularizer(params, l1=0.5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: nested tensors are a prototype
def test_a_nested_parameter():
    nested = nn.Parameter(torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]))
    with pytest.raises(TypeError, match=r"^Regularizer: params\['0'\] must be one tensor of .*, got a nested tensor"):
        Regularizer([nested], l1=0.5)


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        (-0.5, ValueError, "must be finite and >= 0, got -0.5"),
        (math.nan, ValueError, "must be finite and >= 0, got nan"),
        (math.inf, ValueError, "must be finite and >= 0, got inf"),
        (10**400, ValueError, "must be finite and >= 0, got 1000"),
        (True, TypeError, "must be a float, a 0-dim tensor or a schedule, got bool"),
        ("0.1", TypeError, "must be a float, a 0-dim tensor or a schedule, got str"),
        ([0.1, 0.2], TypeError, "got list; for strengths per parameter give rules"),
        (torch.ones(2), ValueError, "got a tensor of shape (2,); for strengths per parameter give rules"),
        (nn.Parameter(torch.zeros(1)), ValueError, "got a tensor of shape (1,); give its `reshape(())`"),
        (torch.tensor(1), TypeError, "must be floating point, got torch.int64"),
        (torch.tensor(-1.0), ValueError, "must be finite and >= 0, got -1.0"),
        (nn.Parameter(torch.tensor(math.nan)), ValueError, "must be finite and >= 0, got nan"),
        (torch.tensor(math.inf, dtype=torch.bfloat16), ValueError, "must be finite and >= 0, got inf"),
        (lambda step: -1.0, ValueError, "what the schedule gives at step 0 must be finite and >= 0, got -1.0"),
        (lambda step: "1", TypeError, "the schedule must give a number at step 0, got str"),
        (lambda: 0.5, TypeError, "must be a schedule that takes the step as its one argument, got a function of ()"),
        (lambda step, epoch: 0.5, TypeError, "as its one argument, got a function of (step, epoch)"),
    ],
)
def test_strengths(strength, error, message):
    """In every place that takes one; and `set_strength` changes nothing then."""
    net = make_net()
    with pytest.raises(error, match=re.escape(message)) as raised:
        Regularizer(net, l2_norm=strength)
    assert str(raised.value).startswith("Regularizer: l2_norm")
    with pytest.raises(error, match=re.escape(message)) as raised:
        Regularizer(net, rules=[("0.*", {"l1": strength})])
    assert str(raised.value).startswith(("Regularizer: rules[0] '0.*': l1", "Regularizer: l1 of '0.weight'"))

    regularizer = Regularizer(net, l1=0.5)
    before = repr(regularizer)
    with pytest.raises(error, match=re.escape(message)) as raised:
        regularizer.set_strength(l1=0.25, l2=strength)
    assert str(raised.value).startswith("set_strength: l2")
    assert repr(regularizer) == before

    if not callable(strength) or isinstance(strength, torch.Tensor):
        with pytest.raises(error, match=re.escape(message)) as raised:
            regularized(net[0], l1=strength)
        assert str(raised.value).startswith("regularized: l1")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            {},
            ValueError,
            f"Regularizer: {', '.join(ABSENT)}, zeros, rules or marks by `regularized` must give a strength, got none",
        ),
        (
            {"l1": 0.5, "group": "rows"},
            ValueError,
            'Regularizer: group must be "tensor", "row", "column", "output", "input", or a pair of',
        ),
        ({"l1": 0.5, "weights_only": "yes"}, TypeError, "Regularizer: weights_only must be True or False, got 'yes'"),
        ({"l1": 0.5, "weights_only": 1}, TypeError, "Regularizer: weights_only must be True or False, got 1"),
        ({"l1": 0.5, "include": 3}, TypeError, "include must be a pattern or a list of them, got int"),
        ({"l1": 0.5, "include": [3]}, TypeError, "Regularizer: include must be a pattern or a list of them, got int"),
        (
            {"l1": 0.5, "include": "*.bias", "weights_only": True},
            ValueError,
            "Regularizer: include, types, exclude, weights_only and rules must leave a parameter, got none",
        ),
        (
            {"rules": ["0.*"]},
            TypeError,
            "Regularizer: rules[0] must be a pair (pattern or type, dict(l1=...)), got '0.*'",
        ),
        ({"rules": [0.5]}, TypeError, "Regularizer: rules[0] must be a pair (pattern or type, dict(l1=...)), got 0.5"),
        (
            {"rules": [("0.*", 0.5)]},
            TypeError,
            "Regularizer: rules[0] must be a pair (pattern or type, dict(l1=...)), got (",
        ),
        ({"rules": [("0.*", {})]}, ValueError, f"Regularizer: rules[0] must give {ANY_TERM}, got {{}}"),
        (
            {"rules": [("0.*", {"l3": 1})]},
            ValueError,
            f"Regularizer: rules[0] must have keys of {', '.join(KINDS)}, group, zeros, got 'l3'",
        ),
        (
            {"rules": [("0.*", {"l1": 1, "group": "r"})]},
            ValueError,
            'rules[0] \'0.*\': group must be "tensor", "row", "column", "output", "input", or a pair of',
        ),
    ],
)
def test_choice(given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Regularizer(make_net(), **given)


@pytest.mark.parametrize(
    ("module", "given", "error", "message"),
    [
        (PARAMETER, {"l1": 0.5}, TypeError, "regularized: module must be a torch.nn.Module, got Parameter"),
        (nn.ReLU(), {}, ValueError, f"regularized: {ANY_TERM} must give a strength, got none"),
        (nn.ReLU(), {"l1": 1, "bias": 1}, TypeError, "regularized: bias must be True, False or dict(l1=...), got 1"),
        (nn.ReLU(), {"bias": {}}, ValueError, f"regularized: bias must give {ANY_TERM}, got {{}}"),
        (
            nn.ReLU(),
            {"bias": {"l1": None}},
            ValueError,
            f"regularized: bias must give {ANY_TERM}, got {{",
        ),
        (
            nn.ReLU(),
            {"bias": {"l3": 1}},
            ValueError,
            "regularized: bias must have keys of l1, l2, l2_norm, smooth_l1, ",
        ),
        (nn.ReLU(), {"bias": {"l1": -1}}, ValueError, "regularized: bias: l1 must be finite and >= 0, got -1"),
        (
            nn.ReLU(),
            {"l2_norm": 1, "bias": {"l1": 1, "group": "row"}},
            ValueError,
            'regularized: bias: group="row" must come with l2_norm or max_norm, whose norms',
        ),
        (
            nn.ReLU(),
            {"l1": 1, "group": "row"},
            ValueError,
            'regularized: group="row" must come with l2_norm or max_norm, whose norms',
        ),
        (
            nn.ReLU(),
            {"l1": 1, "group": "x"},
            ValueError,
            'regularized: group must be "tensor", "row", "column", "output", "input", or a pair of',
        ),
    ],
)
def test_regularized(module, given, error, message):
    with pytest.raises(error, match=re.escape(message)):
        regularized(module, **given)


def test_set_strength():
    regularizer = Regularizer(make_net(), l1=0.5)
    with pytest.raises(TypeError, match=f"set_strength: {ANY_TERM} must be given, got none"):
        regularizer.set_strength()
    with pytest.raises(ValueError, match=r"set_strength: where must match the name of a parameter, got '9\.\*'"):
        regularizer.set_strength(l1=0.25, where="9.*")


def test_a_pattern_in_the_place_of_a_strength():
    with pytest.raises(TypeError, match=r"^set_strength: l2 must be a float, .*, got str; .* say where='0.\*'$"):
        Regularizer(make_net(), l1=0.5).set_strength(1e-3, "0.*")


@pytest.mark.parametrize(
    "use",
    [
        lambda r: torch.ones(()) + r,
        lambda r: r + torch.ones(()),
        lambda r: 0.5 * r,
        lambda r: torch.ones(()) * r,
        lambda r: r / 2,
        lambda r: 1.0 - r,
        lambda r: -r,
        lambda r: sum([r, r]),
        float,
        lambda r: r.backward(),
        lambda r: r.item(),
    ],
)
def test_a_regularizer_is_no_number(use):
    with pytest.raises(
        TypeError, match=r"^Regularizer: the penalty is what its call gives, as in `loss \+ regularizer"
    ):
        use(Regularizer(make_net(), l1=0.5))


@pytest.mark.parametrize(
    ("given", "rule"), [(math.nan, "finite and >= 0, got nan"), (-1.0, "finite and >= 0, got -1.0")]
)
def test_a_schedule_that_goes_wrong_later(given, rule):
    """It is named with its step, and no other strength has moved."""
    regularizer = Regularizer(
        make_net(), l1=lambda step: 1.0 + step, rules=[("3.*", {"l2": lambda step: given if step == 2 else 1.0})]
    )
    regularizer.advance()
    before = regularizer.state_dict()
    message = rf"^Regularizer: l2 of '3.weight': what the schedule gives at step 2 must be {rule}$"
    with pytest.raises(ValueError, match=message):
        regularizer.advance()
    assert regularizer.state_dict() == before


def test_wrong_state_dicts_change_nothing():
    regularizer = Regularizer(make_net(), l1=lambda step: 0.5, rules=[("3.*", {"l2_norm": 1.0, "group": "row"})])
    before = regularizer.state_dict()

    def state(**change):
        return {"step": 7, "groups": [before["groups"][0] | change, before["groups"][1]]}

    first = before["groups"][0]["params"]
    for wrong, message in (
        ({"step": 3}, "must have the keys step and groups"),
        (3, "must have the keys step and groups"),
        (state(params=first[1:]), "must have the same parameters, but lacks '0.weight'"),
        (state(params=[*first, "9.weight"]), "must have the same parameters, but has the unknown '9.weight'"),
        (state(group="row"), "group of '0.weight' must be 'tensor' as here, got 'row'"),
        (state(l1=-1.0), "l1 of '0.weight' must be finite and >= 0, got -1.0"),
        (state(scheduled=["l2"]), "l2 of '0.weight' must have a schedule, as in the state_dict, got 0.0"),
        *((state(l1=x), f"l1 of '0.weight' must be finite and >= 0, got {x}") for x in (math.nan, math.inf)),
        *(
            (state(l1=torch.tensor(x)), f"l1 of '0.weight' must be finite and >= 0, got {x}")
            for x in (-1.0, math.nan, math.inf)
        ),
        (state(l1=None), "l1 of '0.weight' must be a number, got NoneType"),
        (state(l1=True), "l1 of '0.weight' must be a number, got bool"),
        (state(l1="0.5"), "l1 of '0.weight' must be a number, got str"),
        (state(l1=lambda step: 0.5), "l1 of '0.weight' must be a number, got function"),
        (state(l1=torch.ones(2)), "l1 of '0.weight' must be a number, got Tensor"),
        (state(l1=torch.tensor(1.0, device="meta")), "l1 of '0.weight' must be a number, got Tensor"),
        (state(scheduled="l1"), "groups[0]: scheduled must be a list of kinds of strengths, got 'l1'"),
        (state(scheduled=["l3"]), "groups[0]: scheduled must be a list of kinds of strengths, got ['l3']"),
        (state(params="0.weight"), "groups[0]: params must be a list of names, got '0.weight'"),
        (state(params=[]), "groups[0]: params must be a list of names, got []"),
        (state(params=[*first, "3.weight"]), "groups must name each parameter once, got '3.weight' twice"),
        (
            state(l3=0.5),
            f"groups[0] must have the keys params, {', '.join(KINDS)}, group, scheduled, got",
        ),
        (
            {"step": 1, "groups": ["0.weight"]},
            "groups[0] must have the keys params, l1, l2, l2_norm, smooth_l1, beta",
        ),
        ({"step": 1, "groups": {}}, "groups must be a list, as `state_dict` gives it, got dict"),
        (state() | {"step": None}, "step must be an integer >= 0, got None"),
        (state() | {"step": math.nan}, "step must be an integer >= 0, got nan"),
    ):
        with pytest.raises(ValueError, match=rf"^load_state_dict: .*{re.escape(message)}"):
            regularizer.load_state_dict(wrong)
        assert regularizer.state_dict() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l2_norm": 0.1}, "l2_norm of '0.weight' must come without importance, which has a strength for each element"),
        ({"max_norm": 0.1}, "max_norm of '0.weight' must come without importance"),
        ({"lower": 2.0, "upper": 1.0}, "lower of '0.weight' must be less than upper, got 2.0 and 1.0"),
        ({"upper": -1.5}, "lower of '0.weight' must be less than upper, got -1.0 and -1.5"),
    ],
)
def test_strengths_that_are_none_beside_others(change, message):
    """Whoever gives them is told so, and not the next step."""
    net = make_net()
    importance = {"0.weight": torch.ones_like(net[0].weight)}
    regularizer = Regularizer(net, l2=0.1, lower=-1.0, importance=importance)
    before = regularizer.state_dict()["groups"]
    with pytest.raises(ValueError, match=f"^set_strength: {message}"):
        regularizer.set_strength(l2=0.5, **change)
    state = regularizer.state_dict()
    for group in state["groups"]:
        group.update(change)
    with pytest.raises(ValueError, match=f"^load_state_dict: {message}"):
        regularizer.load_state_dict(state | {"step": 3})
    assert (regularizer.step, regularizer.state_dict()["groups"]) == (0, before)
    with pytest.raises(ValueError, match=f"^Regularizer: {message}"):
        Regularizer(net, **{"l2": 0.1, "lower": -1.0, "importance": importance} | change)


def test_a_ramp_of_patterns_is_no_strength():
    with pytest.raises(TypeError, match=r"l1 must be a float, .*, got PatternRamp, which is of zeros"):
        Regularizer(make_net(), l1=PatternRamp("2:4", steps=3))
