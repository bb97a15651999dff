"""A `Regularizer` of a module follows it: what is there now has the penalty, by the same rules, marks and strengths."""

import copy
import pickle

import pytest
import torch
from test_regularizer import HALVED, assert_penalty, make_net, names_of, strengths_of
from torch import nn
from torch.nn.utils import prune

from fused_reg import Regularizer, regularized

RULES = [("0.weight", {"l1": 0.5}), ("3.*", {"l2": 0.25})]


def replaced(*names: str):
    """The warning that says so, once."""
    return pytest.warns(
        UserWarning, match=f"^Regularizer: it follows its module: {', '.join(map(repr, names))} replaced"
    )


def new_head(net):
    net[3] = nn.Linear(3, 4)


def new_parameter(net):
    net[3].weight = nn.Parameter(torch.randn(4, 3))
    net[3].bias = nn.Parameter(torch.randn(4))


def assigned(net):
    state = {key: torch.randn_like(p) for key, p in net[3].state_dict().items()}
    net[3].load_state_dict(state, assign=True)


def written_into_the_table(net):
    """As functions do that know how a module is made."""
    for key, p in net[3]._parameters.items():
        net[3]._parameters[key] = nn.Parameter(torch.randn_like(p))


CHANGES = [new_head, new_parameter, assigned, written_into_the_table]


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_has_the_penalty(change):
    net = make_net()
    regularizer = Regularizer(net, l1=0.125, rules=RULES)
    regularizer()
    change(net)
    with replaced("3.weight", "3.bias"):
        regularizer()
    assert_penalty(regularizer, list(net.parameters()), l1=[0.5] + [0.125] * 7, l2=[0] * 6 + [0.25] * 2)


USES = {
    "call": lambda r, net: r(),
    "accumulate": lambda r, net: r.accumulate_grad_(),
    "prox": lambda r, net: r.prox_(0.1),
    "report": lambda r, net: r.report(),
    "names": lambda r, net: list(r.named_parameters()),
    "state": lambda r, net: r.state_dict(),
    "load": lambda r, net: r.load_state_dict(Regularizer(net, l1=0.125).state_dict()),
    "set": lambda r, net: r.set_strength(l1=0.5, where="3.*"),
    "repr": lambda r, net: repr(r),
    "attach": lambda r, net: r.attach(torch.optim.SGD(net.parameters(), lr=0.1)),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_follows(use):
    net = make_net()
    regularizer = Regularizer(net, l1=0.125)
    new_head(net)
    with replaced("3.weight", "3.bias"):
        USES[use](regularizer, net)
    assert [p is q for (_, p), q in zip(regularizer.named_parameters(), net.parameters(), strict=True)] == [True] * 8


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_an_attached_step_follows(mode):
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.125)
    Regularizer(net, l1=0.5).attach(optimizer, mode)
    new_head(net)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    with replaced("3.weight", "3.bias"):
        optimizer.step()
    for p, old in zip(net.parameters(), before, strict=True):
        moved = old - 0.0625 * old.sign()
        torch.testing.assert_close(p.detach(), moved if mode == "grad" else torch.where(old.abs() > 0.0625, moved, 0.0))


def test_what_is_new_and_what_is_gone():
    net = make_net()
    regularizer = Regularizer(net, l1=0.125, rules=RULES)
    net.append(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="follows its module: '4.weight', '4.bias' new; an optimizer must hold these"):
        assert strengths_of(regularizer)["4.bias"] == (0.125, 0, 0)
    del net[3:]
    with pytest.warns(UserWarning, match=r"'3.weight', .* gone; rules must match the name of a parameter, got '3.\*'"):
        assert list(strengths_of(regularizer)) == [name for name, _ in net.named_parameters()]
    net[0] = net[1] = net[2] = nn.ReLU()
    for _ in range(2):
        with pytest.raises(ValueError, match="params must hold a parameter, got none"):
            regularizer()


def test_nothing_is_left_of_the_choice():
    net = make_net()
    regularizer = Regularizer(net, l1=0.125, include="3.*")
    net[3] = nn.Identity()
    with pytest.raises(
        ValueError, match="include, types, exclude, weights_only and rules must leave a parameter, got none"
    ):
        regularizer()


def test_changes_beside_the_choice_are_not_said():
    net = make_net()
    regularizer = Regularizer(net, l1=0.125, include="0.*")
    new_head(net)
    net[1] = nn.Dropout()
    assert_penalty(regularizer, list(net[0].parameters()), l1=0.125)


def test_a_warning_that_is_an_error_leaves_it_as_the_module_is(recwarn):
    net = make_net()
    regularizer = Regularizer(net, l1=0.125)
    new_head(net)
    with pytest.raises(UserWarning, match="follows its module"):
        raising(regularizer)
    assert_penalty(regularizer, list(net.parameters()), l1=0.125)


def raising(regularizer):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer()


def test_strengths_that_were_changed():
    """`set_strength`, its schedules and tensors, and what was loaded hold for what comes in the places."""
    net = make_net()
    shared = torch.tensor(0.25)
    regularizer = Regularizer(net, l1=0.125, l2=HALVED, rules=[("2.*", {"l1": shared})])
    regularizer.set_strength(l1=0.5, where="3.*")
    regularizer.set_strength(l1=0.75, where="3.bias")
    regularizer.advance()
    new_head(net)
    net[2] = nn.Linear(3, 3)
    with replaced("2.weight", "2.bias", "3.weight", "3.bias"):
        found = strengths_of(regularizer)
    assert found["3.weight"] == (0.5, 0.5, 0)
    assert found["3.bias"] == (0.75, 0.5, 0)
    shared.fill_(2.0)
    regularizer.advance()
    assert strengths_of(regularizer)["2.bias"] == (2.0, 0.25, 0)
    state = regularizer.state_dict()
    state["groups"][0]["l1"] = 0.375
    regularizer.load_state_dict(state)
    new_parameter(net)
    net[0] = nn.Linear(7, 5)
    with replaced("0.weight", "0.bias", "3.weight", "3.bias"):
        found = strengths_of(regularizer)
    assert [found[name][0] for name in ("0.weight", "3.weight", "3.bias")] == [0.375, 0.5, 0.75]


def test_strengths_that_were_changed_in_turn():
    """The last change counts, and one for all that have the term is none for others."""
    net = make_net()
    regularizer = Regularizer(net, l2=0.25, rules=[("3.*", {"l1": 0.5}), ("0.*", {"l1": 0.5})])
    regularizer.set_strength(l1=0.75, where="3.*")
    regularizer.set_strength(l1=0.125)
    regularizer.set_strength(l1=0.375, where="3.*")
    net[0], net[2], net[3] = nn.Linear(7, 5), nn.Linear(3, 3), nn.Linear(3, 2)
    with pytest.warns(UserWarning, match="replaced"):
        found = strengths_of(regularizer)
    assert [found[f"{i}.weight"] for i in (0, 2, 3)] == [(0.125, 0.25, 0), (0, 0.25, 0), (0.375, 0.25, 0)]


def test_loaded_strengths_stay_with_their_names():
    net = make_net()
    changed = Regularizer(net, l1=0.5)
    changed.set_strength(l1=0.25, where="3.weight")
    regularizer = Regularizer(net, l1=0.5)
    regularizer.load_state_dict(changed.state_dict())
    new_head(net)
    with replaced("3.weight", "3.bias"):
        found = strengths_of(regularizer)
    assert (found["0.weight"], found["3.weight"], found["3.bias"]) == ((0.5, 0, 0), (0.25, 0, 0), (0.5, 0, 0))


def test_a_layer_inside_of_one_that_had_none():
    net = make_net()
    regularizer = Regularizer(net, l1=0.125)
    net[1].inner = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="'1.inner.weight', '1.inner.bias' new"):
        regularizer()
    assert_penalty(regularizer, list(net.parameters()), l1=0.125)


CONVERSIONS = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "parametrized": nn.utils.parametrizations.weight_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Regularizer. it follows its module:UserWarning")
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_names_of_before_a_conversion(conversion):
    """Rules for ``0.weight`` mean what it is computed from, whether it was converted before or after."""
    net = make_net()
    regularizer = Regularizer(net, include="0.weight", rules=[("0.weight", {"l1": 0.5})])
    regularizer()
    CONVERSIONS[conversion](net[0])
    own = [p for name, p in net[0].named_parameters() if "bias" not in name]
    for each in (regularizer, Regularizer(net, l1=0.5, exclude=["?.bias", "1.*", "[23].weight"])):
        assert_penalty(each, own, l1=0.5)
        assert [p for _, p in each.named_parameters()] == own


def test_a_layer_that_is_wrapped_keeps_its_rules():
    """As an adapter does: the parameters have other names by then."""
    net = make_net()
    regularizer = Regularizer(net, l1=0.125, rules=RULES, exclude="0.bias")
    net[0] = nn.ModuleDict({"base": net[0], "adapter": nn.Linear(7, 1)})
    with pytest.warns(UserWarning, match="'0.adapter.weight', '0.adapter.bias' new"):
        found = strengths_of(regularizer)
    assert found["0.base.weight"] == (0.5, 0, 0)
    assert "0.base.bias" not in found


def test_layers_that_change_places_change_their_names():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    regularizer = Regularizer(net, rules=[("0.*", {"l1": 0.5}), ("1.*", {"l2": 0.25})])
    first, second = net
    net[0], net[1] = second, first
    assert [p for name, p in regularizer.named_parameters() if name[0] == "0"] == list(second.parameters())
    assert strengths_of(regularizer)["1.weight"] == (0, 0.25, 0)


def test_marks_that_come_later():
    net = make_net()
    regularizer = Regularizer(net, l2=0.25)
    regularized(net[0], l1=0.5)
    assert strengths_of(regularizer)["0.weight"] == (0.5, 0, 0)
    net[0] = nn.Linear(7, 5)  # keeps the mark of its name
    with replaced("0.weight", "0.bias"):
        assert strengths_of(regularizer)["0.weight"] == (0.5, 0, 0)
    net[0] = regularized(nn.Linear(7, 5), l1=0.75)  # has its own; the same change is said once
    assert strengths_of(regularizer)["0.weight"] == (0.75, 0, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_follows_the_copied_module(copied):
    net = make_net()
    other, regularizer = copied((net, Regularizer(net, l1=0.125, rules=RULES)))
    new_head(other)
    with replaced("3.weight", "3.bias"):
        assert regularizer().item() != 0
    assert_penalty(regularizer, list(other.parameters()), l1=[0.5] + [0.125] * 7, l2=[0] * 6 + [0.25] * 2)


def appended(net):
    net.append(nn.Linear(4, 2, bias=False))  # a place without a parameter


@pytest.mark.parametrize("change", [new_head, written_into_the_table, appended])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own, and what the tests above hold
def test_compiled_code_follows(change):
    """A penalty alone, and one beside code that uses the module. It compiles again for what has changed only."""
    torch.compiler.reset()
    compiled = 0

    def count(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph

    def loss(regularizer, rest):
        return regularizer() + sum(p.sum() for p in rest)

    loss = torch.compile(loss, fullgraph=True, backend=count)
    for net in (make_net(), make_net()):
        regularizer = Regularizer(net, l1=0.125)
        for rest in ([], list(net.parameters())[:2]):
            expected = 0.125 * sum(p.abs().sum() for p in net.parameters()) + sum(p.sum() for p in rest)
            torch.testing.assert_close(loss(regularizer, rest), expected)
    assert compiled == 2
    change(net)
    torch.testing.assert_close(loss(regularizer, []), 0.125 * sum(p.abs().sum() for p in net.parameters()))
    assert compiled == 3


def test_compiled_code_sees_a_mark():
    torch.compiler.reset()
    net = make_net()
    regularizer = Regularizer(net, l1=0.125)
    compiled = torch.compile(lambda: regularizer(), fullgraph=True, backend="eager")
    compiled()
    for strength in (0.25, 0.5, 0.75):
        regularized(net[0], l1=strength, bias=True)
        torch.testing.assert_close(compiled(), regularizer())
        assert strengths_of(regularizer)["0.weight"] == (strength, 0, 0)


class Penalized(nn.Module):
    """With a penalty in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.regularizer = Regularizer(self.layer, l1=0.125)

    def forward(self):
        return self.regularizer()


def test_a_functional_call_is_followed():
    """A penalty in a module's forward is that of the parameters which the call puts there, for as long as it lasts."""
    net = Penalized()
    params = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    grads = torch.func.grad(lambda params: torch.func.functional_call(net, params, ()))(params)
    torch.testing.assert_close(grads, {name: 0.125 * p.sign() for name, p in params.items()})
    assert_penalty(net.regularizer, list(net.parameters()), l1=0.125)


@pytest.mark.parametrize("with_grad", [True, False])
def test_a_functional_call_with_tensors_that_train_nothing(with_grad):
    """As when a model is evaluated with other weights, or many models in one call."""
    net, models = Penalized(), [nn.Linear(3, 2) for _ in range(4)]
    params = {f"layer.{name}": p for name, p in torch.func.stack_module_state(models)[0].items()}
    first = {name: p[0].detach() for name, p in params.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(net, first, ()), 0.125 * sum(p.abs().sum() for p in first.values())
        )
    with torch.set_grad_enabled(with_grad):
        found = torch.func.vmap(lambda params: torch.func.functional_call(net, params, ()))(params)
    expected = [0.125 * sum(p.abs().sum() for p in model.parameters()) for model in models]
    torch.testing.assert_close(found.detach(), torch.stack(expected).detach())
    assert_penalty(net.regularizer, list(net.parameters()), l1=0.125)
    net.layer.bias.requires_grad_(False)  # a parameter that is frozen is left out
    assert_penalty(net.regularizer, [net.layer.weight], l1=0.125)
    for _ in range(2):
        value = torch.func.functional_call(net, {name: p.detach() for name, p in net.named_parameters()}, ())
        torch.testing.assert_close(value, net.regularizer().detach())
    net.layer.bias.requires_grad_(True)
    assert_penalty(net.regularizer, list(net.parameters()), l1=0.125)


def test_a_list_is_kept():
    net = make_net()
    regularizer = Regularizer(net.named_parameters(), l1=0.125)
    old = list(net.parameters())
    new_head(net)
    assert_penalty(regularizer, old, l1=0.125)
    assert names_of(regularizer)[-1] == "3.bias"
