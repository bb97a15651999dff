"""`fused_reg.optim` in the place of `torch.optim`."""

import copy
import inspect
import io
import math
import pickle
import re

import pytest
import torch
from optim_cases import CASES, ONE_EACH, PENALTY, assert_same, assert_same_states, given, named, net, pair, train

from fused_reg import fused_penalty, optim, prox_

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
ALL = pytest.mark.parametrize(("name", "options"), named(CASES))


@ALL
def test_without_penalty(name, options):
    a, b = net(), net()
    theirs, ours = pair(name)[0](a.parameters(), **options), pair(name)[1](b.parameters(), **options)
    train(a, theirs)
    train(b, ours)
    assert_same(a, b)
    assert_same_states(theirs, ours)
    assert ours.penalty == 0


@ALL
def test_coupled(name, options):
    """As torch's with the penalty in the loss; where that is maximized, it is subtracted there."""
    a, b = net(), net()
    theirs = pair(name)[0](a.parameters(), **options)
    ours = pair(name)[1](b.parameters(), **options, **PENALTY)
    sign = -1 if options.get("maximize") else 1
    train(a, theirs, penalty={key: sign * x for key, x in PENALTY.items()})
    train(b, ours)
    assert_same(a, b)
    assert_same_states(theirs, ours)


@ALL
def test_decoupled(name, options):
    """As the step without a penalty, bit for bit, and `prox_` behind it."""
    a, b, options = net(), net(), {k: x for k, x in options.items() if k != "lr_decay"}
    plain, ours = pair(name)[1](a.parameters(), **options), pair(name)[1](b.parameters(), **options, l1=0.1, prox=True)
    rates = torch.optim.lr_scheduler.ExponentialLR(plain, 0.5), torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    for i in range(3):
        train(a, plain, [i])
        prox_(a.parameters(), 0.1, step=plain.param_groups[0]["lr"])
        train(b, ours, [i])
        for rate in rates:
            rate.step()
    assert_same(a, b, rtol=0, atol=0)
    assert_same_states(plain, ours, rtol=0, atol=0)


@EACH
def test_penalty(name, options):
    """Before the step; of all that the optimizer holds, with and without a gradient."""
    model = net()
    weights, biases = [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() == 1]
    optimizer = pair(name)[1]([{"params": weights, **PENALTY}, {"params": biases, "l1": 0.5}], **options)

    def now():
        with torch.no_grad():
            return fused_penalty(weights, **PENALTY) + fused_penalty(biases, 0.5)

    torch.testing.assert_close(optimizer.penalty, now())
    given(optimizer)
    weights[0].grad = biases[1].grad = None
    before, kept = now(), [weights[0].detach().clone(), biases[1].detach().clone()]
    optimizer.step()
    torch.testing.assert_close(optimizer.penalty, before)
    assert optimizer.penalty.shape == ()
    assert not optimizer.penalty.requires_grad
    assert_same([weights[0], biases[1]], kept, rtol=0, atol=0)
    assert (now() < before) or (before < now())


@EACH
def test_keys(name, options):
    theirs, ours = (kind(net().parameters(), **options) for kind in pair(name))
    own = ["l1", "l2", "prox", "toward", "importance", "lazy_rows"]
    assert set(ours.param_groups[0]) == {*theirs.param_groups[0], *own}
    assert set(ours.defaults) == {*theirs.defaults, *own}
    assert isinstance(ours, pair(name)[0])
    written = list(inspect.signature(pair(name)[1]).parameters.values())
    assert written[: -len(own)] == list(inspect.signature(pair(name)[0]).parameters.values())
    assert [p.name for p in written[-len(own) :]] == own
    assert repr(ours).startswith(f"{name} (")
    assert "l1: 0.0" in repr(ours)
    assert "Args:" in pair(name)[1].__doc__


@EACH
def test_state_dicts(name, options):
    """Load both ways, through a file, in the middle of a training run."""
    a, b = net(), net()
    theirs, ours = pair(name)[0](a.parameters(), **options), pair(name)[1](b.parameters(), **options)
    train(a, theirs)
    train(b, ours)
    file = io.BytesIO()
    torch.save([theirs.state_dict(), ours.state_dict()], file)
    file.seek(0)
    of_theirs, of_ours = torch.load(file)
    c, d = copy.deepcopy(b), copy.deepcopy(a)
    theirs, ours = pair(name)[0](c.parameters(), **options), pair(name)[1](d.parameters(), **options, l1=1e-99)
    theirs.load_state_dict(of_ours)
    ours.load_state_dict(of_theirs)
    assert (ours.param_groups[0]["l1"], ours.param_groups[0]["prox"]) == (1e-99, False)
    train(c, theirs, range(4, 6))
    train(d, ours, range(4, 6))
    assert_same(c, d)
    assert_same_states(theirs, ours)
    ours.load_state_dict(of_ours)
    assert ours.param_groups[0]["l1"] == 0


@pytest.mark.parametrize("wrong", [{"l1": math.nan}, {"l2": -1.0}, {"l1": torch.tensor(math.inf)}, {"prox": "both"}])
def test_wrong_state_dicts(wrong):
    """Nothing has changed when it is said."""
    model = net()
    optimizer = optim.Adam(model.parameters(), l1=0.1)
    train(model, optimizer)
    before, state = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    state["param_groups"][0] = {**state["param_groups"][0], "lr": 7.0, **wrong}
    with pytest.raises(ValueError, match=rf"Adam: param_groups\[0\]: {next(iter(wrong))} must be"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["l1"] == 0.1
    torch.testing.assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)


def test_older_state_dicts():
    """Of a torch whose groups had fewer keys, whose steps were numbers, and without buffers."""
    model = net()
    optimizer = optim.Adam(model.parameters(), l1=0.1)
    train(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    for held in state["state"].values():
        held["step"] = int(held["step"])
    for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay", "l1"):
        del state["param_groups"][0][key]
    optimizer.load_state_dict(state)
    train(model, optimizer, [5])
    assert next(iter(optimizer.state.values()))["step"] == 5
    assert optimizer.param_groups[0]["l1"] == 0.1
    optimizer = optim.SGD(model.parameters(), momentum=0.9)
    state = optimizer.state_dict()
    state["state"] = {0: {"momentum_buffer": None}}
    optimizer.load_state_dict(state)
    train(model, optimizer, [0])
    assert_same(
        [optimizer.state[p]["momentum_buffer"] for p in model.parameters()], [p.grad for p in model.parameters()]
    )


@EACH
def test_copies(name, options):
    """deepcopy and pickle go on as the original."""
    model = net()
    optimizer = pair(name)[1](model.parameters(), **options, **PENALTY)
    train(model, optimizer)
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        other_model, other = copied((model, optimizer))
        train(other_model, other, [4])
        expected_model, expected = copy.deepcopy((model, optimizer))
        train(expected_model, expected, [4])
        assert_same(other_model, expected_model, rtol=0, atol=0)
        other.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
        assert other.param_groups[1]["l1"] == PENALTY["l1"]
    if hasattr(optimizer, "share_memory"):
        optimizer.share_memory()
        assert optimizer.state[model[0].weight]["sum"].is_shared()
        train(model, optimizer, [4])
        assert_same(model, expected_model, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["constructor", "group", "added", "later"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"l1": -1.0}, ValueError, "SGD: l1 must be finite and >= 0, got -1.0"),
        ({"l2": math.nan}, ValueError, "SGD: l2 must be finite and >= 0, got nan"),
        ({"l1": "1"}, TypeError, "SGD: l1 must be a float or a 0-dim tensor, got str"),
        ({"l1": [0.1]}, TypeError, "SGD: l1 must be a float or a 0-dim tensor, got list"),
        (
            {"l2": torch.ones(1)},
            ValueError,
            "SGD: l2 must be a float or a 0-dim floating point tensor, got torch.float32",
        ),
        ({"l2": torch.tensor(-1.0)}, ValueError, "SGD: l2 must be finite and >= 0, got -1.0"),
        ({"prox": 1}, ValueError, 'SGD: prox must be False, True or "preconditioned", got 1'),
        ({"prox": "preconditioned", "momentum": 1.0}, ValueError, "SGD: momentum must be < 1"),
        ({"differentiable": True}, ValueError, "SGD: differentiable must be False, got True"),
    ],
)
def test_wrong_options(where, wrong, error, message):
    """An error, before any weight has changed."""
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([{"params": [a]}, {"params": [b]}])
    group = {"params": [torch.nn.Parameter(torch.ones(3))], **wrong}
    if where == "later":
        optimizer.param_groups[1].update(wrong)
        given(optimizer)
    act = {
        "constructor": lambda: optim.SGD([a], **wrong),
        "group": lambda: optim.SGD([group]),
        "added": lambda: optimizer.add_param_group(group),
        "later": optimizer.step,
    }
    with pytest.raises(error, match="^" + re.escape(message)):
        act[where]()
    assert len(optimizer.param_groups) == 2
    assert bool((a == 1).all())


def test_as_torch_refuses():
    w = [torch.nn.Parameter(torch.ones(3))]
    for wrong in ({"lr": -1.0}, {"momentum": -1.0}, {"nesterov": True}):
        with pytest.raises(ValueError, match=r"Invalid|requires"):
            optim.SGD(w, **wrong)
    with pytest.raises(RuntimeError, match="cannot be"):
        optim.Adam(w, foreach=True, fused=True)
    with pytest.raises(TypeError, match="must be a dict"):
        optim.Adam(w).add_param_group([w])
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.Adam([])


def test_groups_are_those_given():
    """As with torch, the dictionary itself, and names."""
    first = {"params": [("w", torch.nn.Parameter(torch.ones(3)))], "l1": 1.0}
    optimizer = optim.SGD([first], l2=2.0)
    assert optimizer.param_groups[0] is first
    assert (first["l1"], first["l2"], first["prox"], first["param_names"]) == (1.0, 2.0, False, ["w"])


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"capturable": True}])
def test_flags(flags):
    a, b = net(), net()
    theirs, ours = torch.optim.Adam(a.parameters()), optim.Adam(b.parameters(), **flags)
    train(a, theirs)
    train(b, ours)
    assert_same(a, b)
    assert getattr(ours, "_step_supports_amp_scaling", False) == ("fused" in flags)


@EACH
def test_dtypes(name, options):
    """All in one group; half types step in float32 and keep their dtype in the states."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    mixed = [torch.linspace(-1, 1, 5 + 8 * i, dtype=d).requires_grad_() for i, d in enumerate(dtypes)]
    apart = [p.detach().clone().requires_grad_() for p in mixed]
    one = given(pair(name)[1](mixed, **options, **PENALTY))
    each = [pair(name)[1]([p], **options, **PENALTY) for p in apart]
    for p, q in zip(mixed, apart, strict=True):
        q.grad = p.grad
    one.step()
    for optimizer in each:
        optimizer.step()
    assert_same(mixed, apart, rtol=0, atol=0)
    for p in mixed:
        states = [x for key, x in one.state[p].items() if key != "step"]
        assert len(states) > 0
        assert all(x.dtype == p.dtype for x in states)
    torch.testing.assert_close(one.penalty, sum(o.penalty for o in each), check_dtype=False)


def layouts(x):
    """The same numbers: as they are, transposed, with gaps, not aligned, expanded in another's memory."""
    yield x.clone()
    yield x.t().contiguous().t()
    yield torch.stack([x, x], dim=-1)[..., 0]
    yield torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].reshape(x.shape)


@EACH
def test_layouts(name, options):
    """Strides of parameter, gradient and state that differ, and gaps, change no number."""
    x, g = torch.randn(9, 33), torch.randn(9, 33)
    results = []
    for p in layouts(x):
        for grad in layouts(g):
            w = p.clone(memory_format=torch.preserve_format) if p.is_contiguous() else p
            w = w.detach().requires_grad_()
            start = w.detach().clone()
            w.grad = grad
            optimizer = pair(name)[1]([w], **options, **PENALTY)
            optimizer.step()
            optimizer.step()
            results.append(w.detach().clone())
            with torch.no_grad():
                w.copy_(start)  # the next gradient's
    assert_same(results, [results[0]] * len(results), rtol=0, atol=0)
