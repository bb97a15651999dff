"""``toward`` and ``importance`` as options of `fused_reg.optim`, and ``lazy_rows``."""

import copy
import io
import re

import pytest
import torch
from optim_cases import ONE_EACH, PENALTY, assert_same, assert_same_states, backward, named, net, pair, train
from oracle import assert_same_bits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fused_reg import Regularizer, fused_penalty, optim, reference

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
GIVEN = pytest.mark.parametrize("given", [["toward"], ["importance"], ["toward", "importance"]], ids="-".join)
PROX = pytest.mark.parametrize("prox", [False, True, "preconditioned"])


def references(params, names=("toward", "importance"), seed=5):
    torch.manual_seed(seed)
    return {name: [torch.rand_like(p) for p in params] for name in names}


@EACH
@PROX
@GIVEN
@pytest.mark.filterwarnings("ignore:attach. L2 counts twice")
def test_as_of_a_regularizer_that_is_attached(name, options, prox, given, monkeypatch):
    """The same bits; one pass, so that no other call reads the weights."""
    nets, values = [net(), net()], []
    for model, as_option in zip(nets, (False, True), strict=True):
        own = references(list(model.parameters()), given)
        optimizer = pair(name)[1](
            model.parameters(), **options, **({**PENALTY, "prox": prox, **own} if as_option else {})
        )
        if as_option:
            monkeypatch.setattr(type(optimizer), "_step_in_turn", None)
        else:
            mode = {False: "grad", True: "prox"}.get(prox, prox)
            Regularizer(model, **PENALTY, **own).attach(optimizer, mode)
        before = fused_penalty(model.parameters(), **PENALTY, **own).detach()
        torch.testing.assert_close(optimizer.penalty, before, rtol=1e-14, atol=0)
        train(model, optimizer)
        values.append(optimizer.penalty)
    assert_same(*nets, rtol=0, atol=0)
    assert_same_bits(values[:1], values[1:])


class Odd(nn.Parameter):
    """A parameter that no kernel takes as it is."""


@pytest.mark.parametrize("kind", [nn.Parameter, Odd])
@pytest.mark.parametrize("prox", [False, True])
@GIVEN
def test_as_by_hand(prox, given, kind):
    """Also where the kernels do not take the step, and of what has no gradient: it counts in the penalty."""
    w, rest = kind(torch.linspace(-1, 1, 7).double()), kind(torch.ones(3).double())
    own = references([torch.empty(7).double(), torch.empty(3).double()], given)
    optimizer = optim.SGD([rest, w], lr=0.25, **PENALTY, prox=prox, **{key: xs[::-1] for key, xs in own.items()})
    terms, others = ({**PENALTY, **{key: xs[i] for key, xs in own.items()}} for i in (0, 1))
    expected = torch.linspace(-1, 1, 7).double()
    for _ in range(2):
        w.grad = torch.ones_like(w)
        optimizer.step()
        value, (grad,) = reference.value_and_grad(expected, **terms)
        value = value + reference.fused_penalty(torch.ones(3).double(), **others)
        torch.testing.assert_close(optimizer.penalty.as_subclass(torch.Tensor), value, rtol=1e-14, atol=0)
        expected -= 0.25 * (1 if prox else 1 + grad)
        if prox:
            reference.prox_(expected, step=0.25, **terms)
    assert_same([w.detach().as_subclass(torch.Tensor)], [expected])


def test_lists_of_groups():
    """An option of each group; one that has none is toward zero. Lists are read once, names are of torch."""
    found = []
    for is_grouped in (False, True):
        model = net()
        named_params = list(model.named_parameters())
        start = [p.detach().clone() + 0.1 for p in model.parameters()]
        if is_grouped:
            groups = [
                {
                    "params": iter(named_params[:2]),
                    "toward": iter(start[:2]),
                    "importance": iter([x.abs() for x in start[:2]]),
                },
                {"params": named_params[2:3], "toward": start[2]},
                {"params": named_params[3:]},
            ]
            optimizer = optim.SGD(groups, lr=0.1, **PENALTY)
            assert type(optimizer.param_groups[0]["toward"]) is tuple
        else:
            toward = [*start[:3], torch.zeros(3).double()]
            importance = [*(x.abs() for x in start[:2]), *(torch.ones_like(x) for x in start[2:])]
            optimizer = optim.SGD(model.parameters(), lr=0.1, **PENALTY, toward=toward, importance=importance)
        train(model, optimizer)
        found.append((model, optimizer.penalty))
    assert_same(found[0][0], found[1][0], rtol=1e-13)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-13, atol=0)


def test_start():
    """Copies of the weights as they are when a group is added; what is frozen later and comes later, too."""
    model, late = net(), nn.Parameter(torch.ones(4).double())
    start = [p.detach().clone() for p in model.parameters()]
    params = list(model.parameters())
    optimizer = optim.Adam([{"params": params[:2]}, {"params": params[2:]}], lr=0.05, l2=0.5, toward="start")
    assert optimizer.penalty == 0
    late.data.fill_(3)
    optimizer.add_param_group({"params": late})
    train(model, optimizer)
    assert_same_bits([x for group in optimizer.param_groups for x in group["toward"]], [*start, late.detach()])
    own = fused_penalty(model.parameters(), l2=0.5, toward=start).detach()
    assert own > 0
    train(model, optimizer, [4])
    torch.testing.assert_close(optimizer.penalty, own, rtol=1e-14, atol=0)


@EACH
def test_states(name, options):
    """A training goes on as if it had not been interrupted, toward the weights of its beginning."""
    kind, given = pair(name)[1], {**PENALTY, "toward": "start"}
    whole, first = net(), net()
    importance = references(list(whole.parameters()), ["importance"])
    uninterrupted, before = (kind(m.parameters(), **options, **given, **importance) for m in (whole, first))
    train(whole, uninterrupted, range(4))
    train(first, before, range(2))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": before.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = net()
    second.load_state_dict(saved["model"])
    after = kind(second.parameters(), **options, **given)
    after.load_state_dict(saved["optimizer"])
    saved["optimizer"]["param_groups"][0]["toward"][0].zero_()  # the state is somebody else's
    train(second, after, range(2, 4))
    assert_same(whole, second, rtol=0, atol=0)
    assert_same_states(uninterrupted, after, rtol=0, atol=0)
    assert_same_bits([after.penalty], [uninterrupted.penalty])


def test_states_of_other_dtypes_and_of_torch():
    """References follow the parameters, as states do. What torch's class has saved leaves them as they are."""
    model = net(torch.float32)
    optimizer = optim.Adam(model.parameters(), lr=0.01, **PENALTY, toward="start")
    start = [x.clone() for x in optimizer.param_groups[0]["toward"]]
    train(model, optimizer, [0])
    model.double()
    optimizer.load_state_dict(optimizer.state_dict())
    assert_same_bits(optimizer.param_groups[0]["toward"], [x.double() for x in start])
    train(model, optimizer, [1])
    plain = torch.optim.Adam(model.parameters(), lr=0.01)
    plain.load_state_dict(optimizer.state_dict())
    train(model, plain, [2])
    fresh = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, fresh, [3])
    optimizer.load_state_dict(fresh.state_dict())
    assert_same_bits(optimizer.param_groups[0]["toward"], [x.double() for x in start])
    wrong = copy.deepcopy(optimizer.state_dict())
    wrong["param_groups"][0]["toward"] = wrong["param_groups"][0]["toward"][:2]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"^Adam: param_groups\[0\]: toward must have one tensor per parameter \(4\), got 2"
    ):
        optimizer.load_state_dict(wrong)
    assert_same_bits(optimizer.state_dict()["param_groups"][0]["toward"], before["param_groups"][0]["toward"])


def test_distributed_checkpoint():
    found = []
    for i in range(2):
        model = net()
        for p in model.parameters():
            p.data += i
        optimizer = optim.Adam(model.parameters(), lr=0.1, **PENALTY, toward="start")
        train(model, optimizer, range(1 - i))
        found.append((model, optimizer))
    (a, saving), (b, loading) = found
    set_optimizer_state_dict(b, loading, get_optimizer_state_dict(a, saving))
    assert_same_bits(loading.param_groups[0]["toward"], saving.param_groups[0]["toward"])
    assert_same_states(saving, loading)


def test_schedulers_and_copies():
    model = net()
    optimizer = optim.SGD(model.parameters(), lr=0.1, **PENALTY, toward="start")
    copied = copy.deepcopy((model, optimizer))
    for own, stepped in ((model, optimizer), copied):
        scheduler = torch.optim.lr_scheduler.OneCycleLR(stepped, 0.1, total_steps=8)
        for i in range(3):
            train(own, stepped, [i])
            scheduler.step()
    assert_same(model, copied[0], rtol=0, atol=0)
    assert_same(model, by_hand(), rtol=1e-12)


def by_hand():
    """As these train, toward their start."""
    model = net()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    for i in range(3):
        backward(model, i)
        _, grads = reference.value_and_grad(list(model.parameters()), **PENALTY, toward=start)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad += grad
        optimizer.step()
        scheduler.step()
    return model


w = torch.ones(3)
# what is given -> kind of error, text
WRONG = {
    "word": (
        {"toward": "begin"},
        ValueError,
        "toward must be tensors, one for each parameter, or \"start\", got 'begin'",
    ),
    "word of importance": (
        {"importance": "start"},
        TypeError,
        "importance must be tensors, one for each parameter, got str",
    ),
    "names": ({"toward": {"w": w}}, TypeError, "toward must be tensors, one for each parameter, got dict"),
    "count": ({"toward": [w, w]}, ValueError, "toward must have one tensor per parameter (1), got 2"),
    "no tensor": ({"importance": [1.0]}, TypeError, "importance[0] must be a tensor, got float"),
    "shape": ({"toward": [torch.ones(4)]}, ValueError, "toward[0] must have the shape of params[0] ((3,)), got (4,)"),
    "dtype": ({"toward": [w.double()]}, ValueError, "toward[0] must have the dtype of params[0]"),
    "negative": ({"importance": [-w]}, ValueError, "importance[0] must be finite and >= 0, got -1.0"),
    "flag": ({"lazy_rows": 1}, TypeError, "lazy_rows must be True or False, got 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case):
    given, kind, text = WRONG[case]
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(kind, match=f"^SGD: {re.escape(text)}"):
        optim.SGD([p], lr=0.1, l2=0.1, **given)
    optimizer = optim.SGD([nn.Parameter(w)], lr=0.1, l2=0.1)
    with pytest.raises(kind, match=f"^SGD: {re.escape(text)}"):
        optimizer.add_param_group({"params": [p], **given})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [p]})
    p.grad = w.clone()
    optimizer.param_groups[1].update(given)
    with pytest.raises(kind, match=f"^SGD: {re.escape(text)}"):
        optimizer.step()
    assert (p == 0).all()


def test_lists_for_several_groups():
    groups = [{"params": [nn.Parameter(w)]}, {"params": [nn.Parameter(w)]}]
    text = "^SGD: toward must be an option of each group, where params are groups"
    with pytest.raises(ValueError, match=text):
        optim.SGD(groups, lr=0.1, l2=0.1, toward=[w])
    for params in (nn.Parameter(w), []):  # torch's own words
        with pytest.raises((TypeError, ValueError), match=r"optimizer|params argument"):
            optim.SGD(params, lr=0.1, l2=0.1, toward=[w])


def test_the_weights_themselves_are_refused():
    p = nn.Parameter(w.clone())
    with pytest.raises(ValueError, match=r"^SGD: toward\[0\] must not be params\[0\] itself"):
        optim.SGD([p], lr=0.1, l2=0.1, toward=[p.detach()])


@pytest.mark.filterwarnings("ignore:Sparse invariant")
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
@pytest.mark.parametrize("prox", [False, True])
def test_rows_of_a_batch(name, prox):
    """As a `Regularizer` that is attached to torch's; beside dense parameters, and others that have no gradient."""
    found = []
    for kind in pair(name):
        torch.manual_seed(0)
        table, layer, rest = nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        params = [*layer.parameters(), table.weight, rest]
        own = references(params)
        if kind is pair(name)[0]:
            optimizer = kind(params, lr=0.1)
            regularizer = Regularizer(params, **PENALTY, **own)
            attachment = regularizer.attach(optimizer, "prox" if prox else "grad", lazy_rows=True)
        else:
            optimizer = kind(params, lr=0.1, **PENALTY, prox=prox, lazy_rows=True, **own)
        for batch in ([1, 1, 4], [0], [2, 1, 2]):
            optimizer.zero_grad()
            layer(table(torch.tensor(batch))).square().sum().backward()
            rows = sorted({*batch})
            used = [*layer.parameters(), table.weight[rows], rest]
            lists = {key: [*xs[:2], xs[2][rows], xs[3]] for key, xs in own.items()}
            before = fused_penalty(used, **PENALTY, **lists).detach()
            optimizer.step()
            assert table.weight.grad.is_sparse
            if kind is pair(name)[1]:
                torch.testing.assert_close(optimizer.penalty, before)
            elif not prox:
                torch.testing.assert_close(attachment.value, before)
        found.append(params)
    assert_same(*found, rtol=1e-6, atol=1e-7)


def test_rows_of_a_batch_are_of_some_classes():
    p = nn.Parameter(torch.ones(4, 2))
    for name in ("Adam", "AdamW", "RMSprop"):
        text = f"^{name}: lazy_rows must be False, because torch's {name} takes no sparse gradients"
        with pytest.raises(ValueError, match=text):
            pair(name)[1]([p], lazy_rows=True)
    optimizer = optim.SGD([p], lr=0.5, l1=0.5)
    p.grad = torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 2), (4, 2))
    with pytest.raises(
        TypeError, match=r"must be dense where l1 or l2 is not 0, got .*; lazy_rows=True takes the rows"
    ):
        optimizer.step()
    optimizer.param_groups[0]["lazy_rows"] = True
    p.grad = torch.eye(4, 2).to_sparse()
    with pytest.raises(ValueError, match=r"^SGD: params\[0\].grad must be sparse in rows"):
        optimizer.step()
    assert (p == 1).all()
    p.grad = torch.sparse_coo_tensor([[1, 1]], torch.ones(2, 2), (4, 2))
    optimizer.step()
    assert p[:, 0].tolist() == [1, 1 - 0.5 * 2.5, 1, 1]


@pytest.mark.parametrize("name", ["toward", "importance"])
def test_without_a_strength(name):
    """It is said, not refused: a strength may begin at 0. One group with a strength is enough."""
    p, q = (nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.warns(UserWarning, match=f"SGD: {name} has no effect as long as l1 and l2 are 0 in every group"):
        optimizer = optim.SGD([p], lr=0.1, **{name: [torch.zeros(3)]})
    optimizer.param_groups[0]["l1"] = 0.5
    p.grad = torch.zeros(3)
    optimizer.step()
    for given in ({"l1": 0.1}, {"l2": torch.tensor(0.0)}):
        optim.SGD([p], lr=0.1, **given, **{name: [torch.zeros(3)]})
    optim.SGD([{"params": [p], "l2": 0.1}, {"params": [q]}], toward="start")
