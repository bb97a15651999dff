"""``toward`` and ``importance`` of a `Regularizer`: by name, kept, saved, attached, and in the pass of an optimizer."""

import copy
import io

import pytest
import torch
from optim_cases import ONE_EACH, assert_same, backward, named, net, pair, train
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer, fused_penalty, optim, prox_, reference
from fused_reg.distributed import parts


def moved(model):
    """The same model a step away; and what it was."""
    start = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p))
    return start


def importances(model, only=""):
    return {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)).to(p)
        for i, (name, p) in enumerate(model.named_parameters())
        if only in name
    }


def in_full(model, importance):
    return [importance.get(name, torch.ones_like(p)) for name, p in model.named_parameters()]


def test_start_is_what_the_weights_were():
    model = net()
    regularizer = Regularizer(model, l1=0.1, l2=0.2, toward="start")
    assert regularizer() == 0
    start = moved(model)
    value = regularizer()
    torch.testing.assert_close(value, reference.fused_penalty(model.parameters(), 0.1, 0.2, toward=start))
    value.backward()
    expected = reference.value_and_grad(model.parameters(), 0.1, 0.2, toward=start)[1]
    assert_same([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize("kind", ["dict", "list", "state dict"])
def test_by_names_or_in_order(kind):
    model = net()
    start = moved(model)
    toward = start if kind == "list" else dict(zip(dict(model.named_parameters()), start, strict=True))
    if kind == "state dict":
        model[0].register_buffer("running_mean", torch.ones(3))
        toward["0.running_mean"] = torch.ones(3)  # a state dict has more than parameters
    importance = importances(model, "weight")
    regularizer = Regularizer(model, l2=0.2, toward=toward, importance=importance)
    expected = fused_penalty(model.parameters(), l2=0.2, toward=start, importance=in_full(model, importance))
    torch.testing.assert_close(regularizer(), expected, rtol=1e-14, atol=0)
    report = regularizer.report()
    torch.testing.assert_close(report.rows[-1]["value"], expected.item(), rtol=1e-14, atol=0)
    config = regularizer.get_config()
    importance.clear()  # what was given is no longer looked at, nor what the configuration is made of
    assert Regularizer.from_config(config, model)() == regularizer()
    config["toward"].clear()
    assert Regularizer.from_config(regularizer.get_config(), model)() == regularizer()


def test_rules_choose_and_norms_are_of_differences():
    model = net()
    regularizer = Regularizer(
        model, rules=[("*.weight", {"l2_norm": 0.3, "group": "row"}), ("0.bias", {"l1": 0.1})], toward="start"
    )
    start = moved(model)
    params = list(model.parameters())
    expected = fused_penalty(params[::2], l2_norm=0.3, group="row", toward=start[::2])
    expected = expected + fused_penalty(params[1], l1=0.1, toward=start[1])
    torch.testing.assert_close(regularizer(), expected, rtol=1e-14, atol=0)
    regularizer.prox_(0.5)
    others = net()
    moved(others)
    copies = list(others.parameters())
    prox_(copies[::2], l2_norm=0.3, group="row", step=0.5, toward=start[::2])
    prox_(copies[1], l1=0.1, step=0.5, toward=start[1])
    assert_same_bits(params, copies)


def test_a_layer_that_is_replaced_begins_anew():
    model = net()
    regularizer = Regularizer(model, l2=0.2, toward="start")
    start = moved(model)
    model[2] = nn.Linear(20, 5).double()
    with pytest.warns(UserWarning, match="it follows its module"):
        value = regularizer()
    first = list(model.parameters())[:2]
    torch.testing.assert_close(value, fused_penalty(first, l2=0.2, toward=start[:2]), rtol=1e-14, atol=0)


BIAS = torch.ones(20).double()
WRONG = {
    "word": ({"toward": "begin"}, ValueError, "toward must be tensors, a state dict or \"start\", got 'begin'"),
    "another word": ({"importance": "start"}, TypeError, "must be a state dict or a list of tensors, got str"),
    "number": ({"importance": 1.0}, TypeError, "importance must be a state dict or a list of tensors, got float"),
    "lacks": (
        {"toward": {"0.weight": torch.ones(20, 10).double()}},
        ValueError,
        "toward must have a tensor for '0.bias'",
    ),
    "nobody": ({"importance": {"0.wieght": torch.ones(1)}}, ValueError, "must name parameters, got '0.wieght'"),
    "count": ({"toward": [torch.ones(1)]}, ValueError, r"toward must have one tensor per parameter \(4\), got 1"),
    "shape": (
        {"importance": {"0.bias": torch.ones(3).double()}},
        ValueError,
        r"importance\['0.bias'\] must have the shape",
    ),
    "dtype": ({"importance": {"0.bias": BIAS.float()}}, ValueError, r"importance\['0.bias'\] must have the dtype"),
    "negative": (
        {"importance": {"0.bias": -torch.ones(20).double()}},
        ValueError,
        r"'0.bias'\] must be finite and >= 0",
    ),
    "flag": ({"save_references": "yes"}, TypeError, "save_references must be None, True or False, got 'yes'"),
    "nothing to save": ({"save_references": True}, ValueError, "must come with toward or importance, got none$"),
    **{
        f"empty {name}": (
            {name: {}, **given},
            ValueError,
            f"{name} must have a tensor, got an empty dict; leave it out",
        )
        for name, given in (("toward", {}), ("importance", {}), ("group_weights", {"l2_norm": 0.1}))
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong(case):
    given, error, said = WRONG[case]
    with pytest.raises(error, match=f"^Regularizer: .*{said}"):
        Regularizer(net(), l2=0.1, **given)


def test_nothing_is_saved_of_no_references():
    """It is what happens."""
    assert "references" not in Regularizer(net(), l2=0.1, save_references=False).state_dict()


def test_norms_have_no_importance():
    model = net()
    with pytest.raises(ValueError, match=r"l2_norm of '0.weight' must come without importance"):
        Regularizer(model, l2_norm=0.1, importance=importances(model))


def test_parameters_themselves_are_no_reference():
    model = net()
    with pytest.raises(ValueError, match=r"toward\['0.weight'\] must not be params\['0.weight'\] itself"):
        Regularizer(model, l2=0.1, toward=model.state_dict())


def test_states():
    """Those of "start" are saved unless they shall not be, and others only if they shall."""
    model = net()
    regularizer = Regularizer(model, l2=0.2, toward="start", importance=importances(model))
    start = moved(model)
    file = io.BytesIO()
    torch.save(regularizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = net()
    resumed.load_state_dict(model.state_dict())
    other = Regularizer(resumed, l2=0.2, toward="start", importance={n: 2 * x for n, x in importances(model).items()})
    other.load_state_dict(state)
    assert other() == regularizer()
    moved(resumed)
    assert other() != regularizer()
    saved = state["references"]["toward"]
    assert_same_bits(list(saved.values()), start)
    for given in ({"toward": "start", "save_references": False}, {"toward": start}, {"importance": importances(model)}):
        assert set(Regularizer(model, l2=0.2, **given).state_dict()) == {"step", "groups"}
    kept = Regularizer(model, l2=0.2, toward=start, save_references=True)
    assert set(kept.state_dict()["references"]["toward"]) == set(saved)
    kept.load_state_dict({"step": 3, "groups": kept.state_dict()["groups"]})  # of one without
    assert_same_bits([kept()], [fused_penalty(model.parameters(), l2=0.2, toward=start)])
    given = start[0].clone()
    zeros = {"toward": {name: 0 * x for name, x in saved.items()}, "importance": {}}
    kept.load_state_dict(kept.state_dict() | {"references": zeros})
    zeros["toward"]["0.weight"].add_(1)  # the state is somebody else's
    assert_same_bits([start[0], kept()], [given, fused_penalty(model.parameters(), l2=0.2)])


def test_states_of_others():
    model = net()
    regularizer = Regularizer(model, l2=0.2, toward="start")
    before = regularizer.state_dict()
    plain = Regularizer(model, l2=0.2)
    with pytest.raises(ValueError, match="load_state_dict: references must be of the same parameters, but toward has"):
        plain.load_state_dict(before)
    with pytest.raises(ValueError, match=r"but toward lacks '0[.]weight'"):
        regularizer.load_state_dict(before | {"step": 7, "references": {"toward": {}, "importance": {}}})
    wrong = {n: x[:1] for n, x in before["references"]["toward"].items()}
    with pytest.raises(ValueError, match=r"load_state_dict: references: toward\['0.weight'\] must have the shape"):
        regularizer.load_state_dict(before | {"step": 7, "references": {"toward": wrong, "importance": {}}})
    assert regularizer.step == 0


def test_copies_keep_them():
    model = net()
    regularizer = Regularizer(model, l2=0.2, toward="start")
    moved(model)
    both = copy.deepcopy({"model": model, "regularizer": regularizer})
    assert both["regularizer"]() == regularizer()


MODES = ["grad", "prox"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
def test_attached(name, options, mode):
    """To torch's optimizer as by hand, and to ours in its own pass as to torch's."""
    theirs, ours = pair(name)
    trained = []
    for cls in (None, theirs, ours):
        model = net()
        start = moved(model)
        importance = in_full(model, importances(model, "weight"))
        terms = {"l1": 0.02, "l2": 0.3, "smooth_l1": 0.1, "toward": start, "importance": importance}
        optimizer = (cls or theirs)(model.parameters(), **options)
        if cls is not None:
            strengths = {k: x for k, x in terms.items() if k not in ("toward", "importance")}
            given = {"toward": start, "importance": importances(model, "weight")}
            attachment = Regularizer(model, **strengths, **given).attach(optimizer, mode)
            train(model, optimizer)
            assert attachment.value > 0
        for i in range(4 if cls is None else 0):
            backward(model, i)
            if mode == "grad":
                grads = reference.value_and_grad(list(model.parameters()), **terms)[1]
                for p, grad in zip(model.parameters(), grads, strict=True):
                    p.grad += grad
            optimizer.step()
            if mode == "prox":
                reference.prox_(list(model.parameters()), step=options["lr"], **terms)
        trained.append(model)
    assert_same(trained[1], trained[0])
    assert_same(trained[2], trained[0])


@pytest.mark.parametrize("terms", [{"l2": 0.3}, {"l1": 0.01, "l2_norm": 0.02}], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_norms_in_the_pass_of_an_optimizer(terms, mode):
    trained = []
    for cls in pair("Adam"):
        model = net()
        regularizer = Regularizer(model, **terms, toward="start")
        start = moved(model)
        optimizer = cls(model.parameters(), lr=0.01)
        attachment = regularizer.attach(optimizer, mode)
        before = fused_penalty(model.parameters(), **terms, toward=start)
        backward(model, 0)
        optimizer.step()
        if mode == "grad" or cls is pair("Adam")[1]:
            torch.testing.assert_close(attachment.value, before.detach(), rtol=1e-14, atol=0)
        trained.append(model)
    assert_same(*trained)


def test_by_element():
    """Training with the rate of each element comes to rest at the minimum of loss and penalty."""
    w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0]).double())
    w0, f = torch.tensor([0.5, 0.5, 0.5, 0.5]).double(), torch.tensor([1.0, 2.0, 0.5, 0.0]).double()
    goal = torch.tensor([2.0, -1.0, 0.6, 4.0]).double()
    regularizer = Regularizer([("w", w)], l1=0.3, l2=0.1, toward=[w0], importance=[f])
    optimizer = pair("Adam")[1]([w], lr=0.05)
    regularizer.attach(optimizer, mode="preconditioned")
    for i in range(3000):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.998**i
        optimizer.zero_grad()
        (0.5 * (w - goal).square().sum()).backward()
        optimizer.step()
    expected = goal.clone()
    reference.prox_(expected, l1=0.3, l2=0.1, step=1.0, toward=w0, importance=f)
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-3)
    assert w[2] == w0[2]  # exactly
    assert (expected == w0).tolist() == [False, False, True, False]


def test_the_pass_of_an_optimizer_is_one(monkeypatch):
    """No other call reads the weights: neither torch's step nor the penalty's own."""
    model = net()
    regularizer = Regularizer(model, l2=0.2, toward="start", importance=importances(model))
    optimizer = pair("SGD")[1](model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    backward(model, 0)
    for name in ("_step_in_turn", "_step_of_torch"):
        monkeypatch.setattr(type(optimizer), name, None)
    monkeypatch.setattr(parts, "accumulate_grad_", None)
    optimizer.step()


def tied():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    return model


def with_another(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()} | {"7.weight": torch.ones(3)}


def two_of_one(kind):
    return lambda model: {kind: {"a.weight": torch.ones(3, 3), "b.weight": 2 * torch.ones(3, 3)}}


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (net, lambda m: {"toward": with_another(m)}, "toward must name parameters, or buffers .* got '7.weight'"),
        (net, lambda m: {"importance": {"0.wieght": torch.ones(1)}}, "importance must name parameters, got '0.wieght'"),
        (
            lambda: list(net().named_parameters()),
            lambda m: {"toward": dict(m) | {"7.weight": torch.ones(3)}},
            "toward must name parameters, or buffers .* got '7.weight'",
        ),
        (
            net,
            lambda m: {"exclude": "0.*", "importance": {"0.weight": torch.ones(1)}},
            "importance must name a parameter with a penalty, got '0.weight'",
        ),
        (
            net,
            lambda m: {"rules": [("0.*", {"l2": 0.0})], "importance": importances(m, "0.weight")},
            "importance must name a parameter with a penalty, got '0.weight'",
        ),
        (tied, two_of_one("toward"), "toward of 'a.weight', a tied parameter, must be one tensor, .* 'b.weight'"),
        (
            tied,
            two_of_one("importance"),
            "importance of 'a.weight', a tied parameter, must be one tensor, .* 'b.weight'",
        ),
    ],
)
def test_what_is_given_and_has_no_effect(make, given, message):
    model = make()
    with pytest.raises(ValueError, match=f"^Regularizer: {message}"):
        Regularizer(model, l2=0.1, **given(model))


def test_a_tied_parameter_may_have_one_tensor_by_two_names():
    model = tied()
    for toward in (model.state_dict(), {name: x.clone() for name, x in model.state_dict().items()}):
        toward = {name: 1.0 * x for name, x in toward.items()}
        assert Regularizer(model, l2=0.1, toward=toward)() == 0


def test_another_parameter_is_no_reference():
    a, b = (nn.Parameter(torch.full((3,), x)) for x in (1.0, 2.0))
    with pytest.raises(ValueError, match=r"toward\['0'\] must not share memory with params\['1'\], whose"):
        Regularizer([a, b], l2=0.1, toward=[b.detach(), a.detach()])
    b.requires_grad_(False)
    assert Regularizer([a], l2=0.5, toward=[b.detach()])() == 1.5


@pytest.mark.parametrize("name", ["toward", "importance"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, optim.SGD, optim.Adam])
def test_memory_that_a_step_writes_is_no_reference(optimizer, name):
    """In part, or of another group: found out before anything is written."""
    memory = torch.ones(30)
    w, v = nn.Parameter(torch.ones(10)), nn.Parameter(memory[:10])
    with pytest.raises(ValueError, match=rf"{name}\['v'\] must not share memory with params\['v'\], whose changes"):
        Regularizer([("w", w), ("v", v)], l1=0.1, **{name: {"w": torch.ones(10), "v": memory[5:15]}})
    beside = {"w": memory[10:20], "v": memory[20:]}
    regularizer = Regularizer([("w", w), ("v", v)], l1=0.1, **{name: beside})
    regularizer.attach(optimizer([w, v], lr=0.1), mode="prox").remove()
    if optimizer is not torch.optim.SGD:
        groups = [{"params": [w], "l1": 0.1}, {"params": [v], "l1": 0.1, name: [memory[9:19]]}]
        own = optimizer(groups, lr=1.0)
        w.grad, v.grad = torch.ones(10), torch.ones(10)
        before = w.detach().clone()
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"{name}\[0\] must not share memory with params\[0\]"):
                own.step()
        assert_same_bits([w], [before])


class _Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("weight", torch.ones(1))
        self.register_buffer("later", torch.ones(1), persistent=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it is to compile
@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel],
    ids=["plain", "data parallel", "compiled", "averaged"],
)
def test_buffers_of_a_state_dict(wrap):
    """By whole names, without the parts of wrappers or with them."""
    model = wrap(nn.Sequential(_Scaled(), nn.BatchNorm1d(2)))
    inner = {name: x.clone() for name, x in nn.Sequential(_Scaled(), nn.BatchNorm1d(2)).state_dict().items()}
    for given in (inner, {name: x.clone() for name, x in model.state_dict().items()}, inner | {"0._extra_state": None}):
        Regularizer(model, l2=0.1, toward=given)
    for name in ("body.weight", "0.layer.wieght", "running_mean", "9._extra_state"):
        with pytest.raises(ValueError, match=f"toward must name parameters, or buffers of the module, got '{name}'"):
            Regularizer(model, l2=0.1, toward=inner | {name: torch.ones(1)})


def test_a_module_is_no_state_dict():
    with pytest.raises(TypeError, match=r"toward must be a state dict .*, got Sequential; pass its `state_dict\(\)`"):
        Regularizer(net(), l2=0.1, toward=net())
