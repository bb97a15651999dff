"""What a `Regularizer` is given acts, or is an error; what it does not choose may be anything."""

import re

import pytest
import torch
from test_regularizer import HALVED, assert_penalty, make_net, names_of, strengths_of
from torch import nn

from fused_reg import Regularizer, regularized

RULE = {"l1": 0.5}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rules": [("*.bias", RULE)], "weights_only": True}, "rules[0] must apply to a parameter, but weights_only"),
        ({"rules": [("0.*", RULE)], "exclude": "0.*"}, "takes all of '0.*'"),
        ({"rules": [("0.*", RULE)], "include": "[1-3].*"}, "takes all of '0.*'"),
        ({"rules": [("*", RULE), ("0.*", RULE)]}, "rules[1] must apply to a parameter, but a rule before it takes all"),
        ({"rules": [("0.w*", RULE), ("0.b*", RULE), ("0.*", RULE)]}, "rules[2] must apply to a parameter, but a rule"),
        ({"include": ["0.*", "3.bias"], "weights_only": True}, "types, exclude or weights_only removes '3.bias'"),
        ({"include": ["0.*", "3.*"], "exclude": "3.*"}, "exclude or weights_only removes '3.*'"),
        ({"rules": [("*", {"l2": 0.5})]}, "l2 must apply to a parameter, but rules or marks by `regularized` speak"),
        ({"l1": HALVED, "rules": [("*", RULE)]}, "l1 must apply to a parameter, but rules or marks"),
        ({"group": "row"}, 'group="row" must come with l2_norm or max_norm, whose norms it is about, got none'),
        ({"group": "row", "rules": [("*", {"l2_norm": 1.0, "group": "tensor"})]}, 'group="row" must come with l2_norm'),
        (
            {"rules": [("0.*", {"l1": 0.5, "group": "row"})]},
            "rules[0] '0.*': group=\"row\" must come with l2_norm or max_norm, whose norms",
        ),
    ],
)
def test_what_has_no_effect_is_an_error(given, message):
    with pytest.raises(ValueError, match=f"^Regularizer: .*{re.escape(message)}"):
        Regularizer(make_net(), **({"l2": 0.25} | given))


@pytest.mark.parametrize(
    "given",
    [
        {"exclude": ["*.bias", "1.*"], "weights_only": True},  # removed twice
        {"rules": [("*.bias", {"l2": 0.0})], "weights_only": True},  # nothing to lose
        {"rules": [("0.weight", RULE), ("0.*", RULE)]},
        {"l1": 0.0, "rules": [("*", RULE)]},
        {"group": "row", "l2_norm": 0.0},  # for `set_strength`
        {"group": "row", "rules": [("0.*", {"l2_norm": 0.5})]},
        {"l2_norm": 0.5, "rules": [("0.*", {"group": "row"})]},
    ],
)
def test_what_has_an_effect_or_no_loss_is_none(given):
    Regularizer(make_net(), **({"l2": 0.25} | given))


def marked(*indices: int, **mark) -> nn.Sequential:
    net = make_net()
    for i in indices:
        regularized(net[i], l1=0.5, **mark)
    return net


@pytest.mark.parametrize(
    ("net", "given", "message"),
    [
        (
            nn.Sequential(nn.Linear(2, 2), regularized(nn.ReLU(), l1=0.5)),
            {},
            "on 1 (ReLU) must speak about a parameter",
        ),
        (
            nn.Sequential(nn.Linear(2, 2), regularized(nn.ReLU(), l1=0.5)),
            {"l2": None},
            "on 1 (ReLU) must speak about a",
        ),
        (
            nn.ModuleList([nn.Linear(2, 2), regularized(nn.ParameterDict({"bias": torch.ones(2)}), l1=0.5)]),
            {},
            "on 1 (ParameterDict) must speak about a parameter, but there is none in it, or other marks speak",
        ),
        (regularized(marked(0, 1, 2, 3), l1=0.25), {}, "on the module (Sequential) must speak about a parameter"),
        (
            marked(0, bias=True),
            {"weights_only": True},
            "weights_only leaves out the biases that the mark on 0 (Linear)",
        ),
        (
            marked(1),
            {"weights_only": True},
            "weights_only leaves out all that the mark by `regularized` on 1 (LayerNorm)",
        ),
        (
            nn.Sequential(regularized(nn.Linear(2, 2, bias=False), l1=0.5, bias={"l1": 0.25})),
            {},
            "the mark on 0 (Linear) must speak about biases, for which it has strengths, got none",
        ),
        (
            nn.Sequential(
                regularized(nn.ParameterDict({"bias": torch.ones(2)}), l1=0.5, bias={"l1": 0.25}), nn.Linear(2, 2)
            ),
            {},
            "the mark on 0 (ParameterDict) must speak about weights, for which it has strengths, got none",
        ),
        (marked(0, 1, 2, 3, bias=True), {"l1": 0.5}, "l1 must apply to a parameter, but rules or marks"),
    ],
)
def test_a_mark_without_effect_is_an_error(net, given, message):
    with pytest.raises(ValueError, match=f"^Regularizer: .*{re.escape(message)}"):
        Regularizer(net, **({"l2": 0.25} | given))


def test_two_marks_on_a_tied_weight():
    net = nn.ModuleDict({"embed": nn.Embedding(9, 4), "head": nn.Linear(4, 9)})
    net["head"].weight = net["embed"].weight
    regularized(net["embed"], l1=0.5)
    assert strengths_of(Regularizer(net)) == {"embed.weight": (0.5, 0, 0)}
    regularized(net["head"], l1=0.5)
    assert strengths_of(Regularizer(net)) == {"embed.weight": (0.5, 0, 0)}
    regularized(net["head"], l1=0.25)
    message = "must have one mark by `regularized`, got one as 'embed.weight' and another as 'head.weight'"
    with pytest.raises(ValueError, match=f"^Regularizer: a tied parameter {message}$"):
        Regularizer(net)


class Odd(nn.Module):
    """A network with a parameter that cannot be regularized."""

    def __init__(self, odd: nn.Parameter) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.odd = odd


ODD = {
    "complex": nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)),
    "sparse": nn.Parameter(torch.eye(2).to_sparse()),
    "float8": nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn)),
    "frozen float8": nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn), requires_grad=False),
    "frozen integers": nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False),
    "lazy": nn.UninitializedParameter(),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_parameter_that_is_not_chosen_may_be_anything(kind):
    net = Odd(ODD[kind])
    weight, bias = net.net.parameters()
    for given in ({"exclude": "odd"}, {"include": "net.*"}, {"rules": [("net.*", {"l1": 0.5})], "l1": None}):
        assert_penalty(Regularizer(net, **({"l1": 0.5} | given)), [weight, bias], l1=0.5)
    net.odd_bias, net.odd = net.odd, None
    assert_penalty(
        Regularizer(net, l2=0.5, weights_only=True, exclude="net.bias", rules=[("*", RULE)]), [weight], l1=0.5, l2=0.5
    )
    assert_penalty(
        Regularizer([*net.net.named_parameters(), ("odd", net.odd_bias)], l1=0.5, exclude="odd"), [weight, bias], l1=0.5
    )
    regularized(net.net, l1=0.5)
    assert_penalty(Regularizer(net), [weight], l1=0.5)


@pytest.mark.parametrize("kind", [kind for kind in ODD if "frozen" not in kind])
def test_one_that_is_chosen_is_an_error_that_says_how_to_leave_it_out(kind):
    with pytest.raises(TypeError, match=r"^Regularizer: params\['odd'\] must be .* leave it out with exclude='odd'$"):
        Regularizer(Odd(ODD[kind]), l1=0.5)


def test_a_lazy_weight_is_one_for_weights_only():
    """Whose dimensions are not known yet: left out it would be for ever."""
    with pytest.raises(TypeError, match=r"^Regularizer: params\['0.weight'\] must be initialized"):
        Regularizer(nn.Sequential(nn.LazyLinear(3)), l1=0.5, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_frozen_torchscript_beside_other_layers():
    scripted = torch.jit.script(nn.Linear(3, 3).eval())
    for inner in (scripted, torch.jit.freeze(scripted)):
        net = nn.ModuleDict({"inner": inner, "head": nn.Linear(3, 2)})
        assert_penalty(Regularizer(net, l1=0.5, include="head.*"), list(net["head"].parameters()), l1=0.5)


def test_rules_inherit():
    """From the mark if there is one, else from the arguments; 0 drops; the group too."""
    net = make_net()
    regularized(net[3], l2_norm=0.5, group="row", bias=True)
    rules = [("0.weight", {"l2": 0}), ("0.bias", {"l2_norm": 0.25}), ("3.weight", {"l1": 0.75, "l2": None})]
    found = Regularizer(net, l1=0.125, l2=0.0625, rules=rules)
    assert strengths_of(found) == {
        "0.weight": (0.125, 0, 0),
        "0.bias": (0.125, 0.0625, 0.25),
        **dict.fromkeys(["1.weight", "1.bias", "2.weight", "2.bias"], (0.125, 0.0625, 0)),
        "3.weight": (0.75, 0, 0.5),
        "3.bias": (0, 0, 0.5),
    }
    groups = {row["name"]: row["group"] for row in found.report().rows if row["level"] == "parameter"}
    assert [groups[name] for name in ("0.bias", "3.weight")] == ["tensor", "row"]


def test_strengths_are_set_where_the_term_is():
    net = make_net()
    regularizer = Regularizer(net, rules=[("0.*", {"l1": 0.5}), ("1.*", {"l2": 0.5}), ("2.*", {"l1": 0, "l2": 0.5})])
    regularizer.set_strength(l1=0.25)
    assert strengths_of(regularizer) == {
        **dict.fromkeys(["0.weight", "0.bias"], (0.25, 0, 0)),
        **dict.fromkeys(["1.weight", "1.bias", "2.weight", "2.bias"], (0, 0.5, 0)),
    }
    regularizer.set_strength(l1=0.0)
    regularizer.set_strength(l1=0.75)
    assert names_of(regularizer)[0] == "0.weight"
    assert [s[0] for s in strengths_of(regularizer).values()] == [0.75, 0.75, 0, 0, 0, 0]
    regularizer.set_strength(l1=0.125, where="*")
    assert [s[0] for s in strengths_of(regularizer).values()] == [0.125] * 6
    regularizer.set_strength(l2_norm=0.25, where="0.*")
    regularizer.set_strength(l2_norm=0.75)  # which these have now
    assert [s[2] for s in strengths_of(regularizer).values()] == [0.75, 0.75, 0, 0, 0, 0]
    regularizer = Regularizer(net, rules=[("[0-2].*", {"l1": 0.5})])
    regularizer.set_strength(l2_norm=0.5)  # nobody has it yet
    assert [s[2] for s in strengths_of(regularizer).values()] == [0.5] * 6


@pytest.mark.filterwarnings("error")
def test_a_schedule_that_never_advances():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def train(regularizer, steps, after=lambda: None, use=torch.Tensor.backward):
        for _ in range(steps):
            for _ in range(2):  # micro-batches
                use(regularizer())
            optimizer.step()
            after()

    regularizer = Regularizer(net, l1=HALVED)
    train(regularizer, 2)
    with pytest.warns(UserWarning, match=r"^Regularizer: a schedule stands at step 0, .* call regularizer.advance\(\)"):
        regularizer()
    train(regularizer, 3)  # said once
    regularizer = Regularizer(net, l1=HALVED)
    train(regularizer, 4, regularizer.advance)
    regularizer = Regularizer(net, l1=HALVED)
    regularizer.step = 0  # of epochs
    train(regularizer, 4)
    train(Regularizer(net, l1=0.5), 4)
    regularizer = Regularizer(net, l1=HALVED)
    with regularizer.attach(optimizer):  # which advances it; called for a log
        train(regularizer, 4, use=torch.Tensor.detach)
