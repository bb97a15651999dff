"""What an optimizer of ours keeps from step to step, and every change that it has to notice.

Each test makes the change with two optimizers: one that has made steps before, and a new one with copies of its weights
and states. Both must then step alike, bit for bit.
"""

import copy

import pytest
import torch
from optim_cases import PENALTY, assert_same, assert_same_states, given

from fused_reg import _step_plans, optim

NAMES = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"]
MOMENTUM = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True}, "Adam": {"amsgrad": True}}


def made(name="SGD", **options):
    """Of two groups, after two steps."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 17, 3, 33)]
    options = {"lr": 0.125, **MOMENTUM.get(name, {}), **PENALTY, **options}
    optimizer = getattr(optim, name)([{"params": params[:2]}, {"params": params[2:], "l1": 0.25}], **options)
    for i in range(2):
        given(optimizer, i).step()
    return optimizer


def check(optimizer, change, steps=2):
    """The change, and what comes of it."""
    fresh = copy.deepcopy(optimizer)
    given(optimizer, 7)
    given(fresh, 7)
    before = copy.deepcopy(fresh)
    change(optimizer)
    change(fresh)
    for _ in range(steps):
        optimizer.step()
        copied = copy.deepcopy(fresh)  # without plans
        for group, own in zip(copied.param_groups, fresh.param_groups, strict=True):
            for p, q in zip(group["params"], own["params"], strict=True):
                p.grad = q.grad
        fresh = copied
        fresh.step()
    pairs = [(a["params"], b["params"]) for a, b in zip(optimizer.param_groups, fresh.param_groups, strict=True)]
    for ours, theirs in pairs:
        assert_same(ours, theirs, rtol=0, atol=0)
    assert_same_states(optimizer, fresh, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.penalty, fresh.penalty, rtol=0, atol=0)
    for _ in range(steps):
        before.step()
    return before, optimizer


def check_takes_effect(optimizer, change):
    before, after = check(optimizer, change)
    first = before.param_groups[1]["params"][0], after.param_groups[1]["params"][0]
    assert not torch.equal(*first)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *((name, "lr", 0.5) for name in NAMES),
        *((name, "l1", 0.75) for name in NAMES),
        ("SGD", "l1", 0),
        ("SGD", "l2", 0.75),
        ("SGD", "prox", True),
        ("SGD", "prox", "preconditioned"),
        ("SGD", "momentum", 0.25),
        ("SGD", "momentum", 0),
        ("SGD", "dampening", 0.25),
        ("SGD", "weight_decay", 0.25),
        ("SGD", "weight_decay", torch.tensor(0.25)),
        ("SGD", "nesterov", True),
        ("SGD", "maximize", True),
        ("SGD", "l1", torch.tensor(0.75)),
        ("SGD", "lr", torch.tensor(0.5)),
        ("SGD", "lr", torch.tensor([0.5])),
        ("SGD", "lr", torch.tensor(1)),
        ("Adam", "betas", (0.5, 0.75)),
        ("Adam", "eps", 0.5),
        ("Adam", "amsgrad", False),
        ("Adam", "decoupled_weight_decay", True),
        ("AdamW", "weight_decay", 0.25),
        ("RMSprop", "alpha", 0.5),
        ("RMSprop", "centered", False),
        ("RMSprop", "momentum", 0),
        ("Adagrad", "lr_decay", 0.5),
    ],
)
def test_options(name, key, value):
    def change(optimizer):
        optimizer.param_groups[1][key] = value

    optimizer = made(name, **({"weight_decay": 0.5} if key == "decoupled_weight_decay" else {}))
    check_takes_effect(optimizer, change)


@pytest.mark.parametrize("key", ["toward", "importance"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [None, tuple, list])
def test_references(key, before, after):
    def given_as(kind, factor):
        return kind(torch.linspace(0.25, factor, n) for n in (3, 33))

    def change(optimizer):
        optimizer.param_groups[1][key] = after and given_as(after, 2.0)

    optimizer = made()
    if before:
        optimizer.param_groups[1][key] = given_as(list, 0.5)
        given(optimizer).step()
    (check_takes_effect if before or after else check)(optimizer, change)


@pytest.mark.parametrize(
    ("key", "shape"), [("l1", ()), ("l2", ()), ("lr", ()), ("lr", (1,)), ("weight_decay", ()), ("weight_decay", (1,))]
)
def test_tensors_that_change_in_place(key, shape):
    def change(optimizer):
        optimizer.param_groups[1][key].fill_(0.5)

    optimizer = made()
    optimizer.param_groups[1][key] = torch.full(shape, 0.0625)
    given(optimizer).step()
    check_takes_effect(optimizer, change)


def test_betas_that_change_in_place():
    def change(optimizer):
        optimizer.param_groups[1]["betas"][0] = 0.25

    optimizer = made("Adam", amsgrad=False)
    optimizer.param_groups[1]["betas"] = [0.9, 0.99]
    given(optimizer).step()
    check_takes_effect(optimizer, change)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """One is missing, comes back, and is another tensor, of another dtype or layout."""
    optimizer = made(name)
    p = optimizer.param_groups[0]["params"][1]
    kept = p.detach().clone()

    def lose(o):
        o.param_groups[0]["params"][1].grad = None

    check(optimizer, lose)
    assert torch.equal(p, kept)
    check(optimizer, lambda o: None)  # all have one again
    assert not torch.equal(p, kept)

    def exchange(o):
        q = o.param_groups[0]["params"][1]
        q.grad = torch.stack([q.grad, q.grad], dim=-1)[..., 0]

    check(optimizer, exchange)

    for group in optimizer.param_groups:
        for q in group["params"]:
            q.grad = None
    optimizer.step()
    check(optimizer, lambda o: None)  # all have one again


@pytest.mark.parametrize("name", NAMES)
def test_parameters(name):
    def begin(o, p):
        p.grad = torch.ones(4)
        if name == "Adagrad":  # whose constructor makes the states
            o.state[p] = {"step": torch.tensor(0.0), "sum": torch.zeros(4)}

    def exchange(o):
        other = torch.nn.Parameter(torch.ones(7))
        o.state[other] = {key: torch.ones(7) for key in o.state.pop(o.param_groups[0]["params"][0])}
        o.state[other] |= {"step": torch.tensor(2.0)} if name != "SGD" else {}
        o.param_groups[0]["params"][0] = other
        other.grad = torch.ones(7)

    def add(o):
        o.add_param_group({"params": [torch.nn.Parameter(torch.ones(4))]})
        begin(o, o.param_groups[-1]["params"][0])

    def drop(o):
        del o.state[o.param_groups[0]["params"].pop(0)]

    def drop_group(o):
        for p in o.param_groups.pop()["params"]:
            del o.state[p]

    def widen(o):
        o.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(4)))
        begin(o, o.param_groups[0]["params"][-1])

    for change in (exchange, add, drop, widen, drop_group, lambda o: o.param_groups.reverse()):
        check(made(name), change)


@pytest.mark.parametrize("name", NAMES)
def test_data(name):
    """Of a parameter: another memory, another dtype of all."""

    def move(o):
        p = o.param_groups[0]["params"][0]
        p.data = p.data.clone() * 2

    def convert(o):
        for group in o.param_groups:
            for p in group["params"]:
                p.grad, grad = None, p.grad.double()
                p.data = p.data.double()
                p.grad = grad

    for change in (move, convert):
        check(made(name), change)


@pytest.mark.parametrize("name", NAMES)
def test_states(name):
    """Replaced, loaded, or cleared."""
    key = {"SGD": "momentum_buffer", "RMSprop": "square_avg", "Adagrad": "sum"}.get(name, "exp_avg")

    def first(o):
        return o.param_groups[0]["params"][0]

    def replace(o):
        o.state[first(o)][key] = torch.ones(5)

    def replace_all(o):
        o.state[first(o)] = {k: torch.ones_like(x) for k, x in o.state[first(o)].items()}

    def load(o):
        state = copy.deepcopy(o.state_dict())
        state["state"][0][key] += 1
        o.load_state_dict(state)

    def clear(o):
        o.state[first(o)].clear()

    def clear_all(o):
        o.state.clear()

    for change in (replace, replace_all, load) + ((clear, clear_all) if name != "Adagrad" else ()):
        check(made(name), change)


def test_nothing_changes(monkeypatch):
    """Then nothing is looked up again; also where parameters have no gradient. A scheduler changes numbers alone."""
    built = []
    for what in ("_batches", "_numbers"):
        build = getattr(_step_plans, what)
        monkeypatch.setattr(_step_plans, what, lambda *a, what=what, build=build: built.append(what) or build(*a))
    optimizer = made("Adam")
    optimizer.param_groups[0]["params"][0].grad = None
    optimizer.step()
    built.clear()
    optimizer.step()
    optimizer.param_groups[0]["params"][1].grad = torch.ones(17)
    optimizer.step()
    assert built == []
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert built == ["_numbers"] * 2


def launches(optimizer):
    return len(given(optimizer)._plans.of(optimizer, None).launches)


@pytest.mark.parametrize("name", NAMES)
def test_one_launch(name):
    """For groups whose numbers differ, and tensors that are one; the steps of each are as alone."""
    tensor = torch.tensor(0.25)
    groups = [{"lr": 0.5}, {"l1": 0.25}, {"weight_decay": 0.125}, {"l2": 0.5, "lr": 0.25}, {}]
    for lr in (0.125, tensor):
        options = {"lr": lr, **MOMENTUM.get(name, {}), **PENALTY}
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 5 + i)) for i in range(len(groups))]
        own = [{**group, **({"lr": lr} if lr is tensor else {})} for group in groups]
        together = getattr(optim, name)([{"params": [p], **g} for p, g in zip(params, own, strict=True)], **options)
        copies = copy.deepcopy(params)
        alone = [getattr(optim, name)([{"params": [p], **g}], **options) for p, g in zip(copies, own, strict=True)]
        for i in range(3):
            given(together, i)
            for p, q in zip(params, copies, strict=True):
                q.grad = p.grad.clone()
            together.step()
            for optimizer in alone:
                optimizer.step()
        assert launches(together) == 1
        assert_same(params, copies, rtol=0, atol=0)
        torch.testing.assert_close(together.penalty, sum(o.penalty for o in alone))
    together.param_groups[0]["lr"] = torch.tensor(0.5)
    together.param_groups[1]["maximize"] = True
    assert launches(together) == 3


def test_negative_rates():
    """A schedule may end a rounding below 0: a step as torch's, and no weight grows by the penalty."""
    for lr in (-1e-9, torch.tensor(-1e-9)):
        for prox in (False, True, "preconditioned"):
            p = torch.nn.Parameter(torch.ones(3))
            optimizer = optim.Adam([p], lr=0.1, l1=0.5, prox=prox)
            p.grad = torch.zeros(3)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            assert bool((p == 1).all())


def test_penalty_is_that_before_the_step():
    """Whatever becomes of weights without a gradient."""
    optimizer = made()
    first = optimizer.param_groups[0]["params"][0]
    first.grad, before = None, optim.SGD.penalty.fget(copy.deepcopy(optimizer))
    optimizer.step()
    first.data.zero_()
    torch.testing.assert_close(optimizer.penalty, before)


def test_state_that_is_not_there():
    """As torch's: an option that asks for more came too late."""
    optimizer = made("Adam", amsgrad=False)
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        given(optimizer).step()
