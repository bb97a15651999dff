"""Calls that would have no effect, or count twice: an error, or a warning that says what to do."""

import math
import warnings

import pytest
import torch
from samples import draw
from torch import nn

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, prox_, value_and_grad

FUNCTIONS = {
    "fused_penalty": fused_penalty,
    "value_and_grad": value_and_grad,
    "accumulate_grad_": accumulate_grad_,
    "prox_": lambda *args, **strengths: prox_(*args, **strengths, step=0.1),
}
NAMES = pytest.mark.parametrize("name", FUNCTIONS)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))


def through(params):
    """A generator of a generator."""
    yield from params


@NAMES
@pytest.mark.parametrize(
    "make",
    [
        lambda: net().parameters(),
        lambda: through(net().parameters()),
        lambda: iter(list(net().parameters())),
        lambda: iter(tuple(net().parameters())),
    ],
    ids=["parameters", "generator", "list", "tuple"],
)
def test_a_generator_that_something_else_has_read(name, make):
    params = make()
    FUNCTIONS[name](params, l1=0.1)
    with pytest.raises(
        ValueError, match=rf"^{name}: params must not have been read before, got a \w+ that something else"
    ):
        FUNCTIONS[name](params, l1=0.1)


def begun(params):
    generator = (p for p in list(params)[:1])
    next(generator)
    return generator


EXHAUSTED = {
    "map": lambda params: map(torch.Tensor.detach, params),
    "filter": lambda params: filter(torch.is_tensor, params),
    "zip": lambda params: (p for (p,) in zip(params, strict=True)),
    "generator expression": lambda params: (p for p in params),
}


@NAMES
@pytest.mark.parametrize("kind", EXHAUSTED)
def test_another_iterator_that_gives_nothing(name, kind):
    source = iter(list(net().parameters()))
    list(source)
    with pytest.warns(UserWarning, match=rf"^{name}: params gave no parameter"):
        FUNCTIONS[name](EXHAUSTED[kind](source), l1=0.1)


@NAMES
def test_a_suspended_generator_that_gives_nothing(name):
    with pytest.warns(UserWarning, match=rf"^{name}: params gave no parameter"):
        FUNCTIONS[name](begun(net().parameters()), l1=0.1)
    rest = iter(list(net().parameters())[:1])
    next(rest)
    with pytest.warns(UserWarning, match=rf"^{name}: params gave no parameter"):
        FUNCTIONS[name](rest, l1=0.1)


@NAMES
@pytest.mark.parametrize(
    "make", [list, {}.values, nn.ReLU().parameters, nn.ParameterList, lambda: iter(()), lambda: iter([])]
)
def test_what_is_empty_by_itself_is_zero(name, make):
    value = FUNCTIONS[name](make(), l1=0.1)
    assert name == "prox_" or (value[0] if isinstance(value, tuple) else value) == 0


CONSTANTS = {
    ".data": lambda m: [p.data for p in m.parameters()],
    "detach": lambda m: [p.detach() for p in m.parameters()],
    "state_dict": lambda m: m.state_dict().values(),
    "one tensor": lambda m: m[0].weight.data,
    "frozen": lambda m: m.requires_grad_(False).parameters(),
}


@pytest.mark.parametrize("kind", CONSTANTS)
@pytest.mark.parametrize("strengths", [{"l1": 0.1}, {"l2_norm": 0.1}, {}, {"l1": torch.tensor(0.1)}])
def test_a_penalty_without_a_graph(kind, strengths):
    with pytest.warns(UserWarning, match=r"^fused_penalty: no parameter requires grad") as caught:
        fused_penalty(CONSTANTS[kind](net()), **strengths)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"^accumulate_grad_: no parameter requires grad") as caught:
        accumulate_grad_(CONSTANTS[kind](net()), **strengths)
    assert caught[0].filename == __file__


def test_a_penalty_without_a_graph_warns_once_in_a_loop():
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            fused_penalty(CONSTANTS[".data"](model), l1=0.1)
    assert len(caught) == 1


def test_where_no_graph_is_meant():
    """Under `no_grad` and `inference_mode`, with a trained strength, beside what is trained, in `torch.func`."""
    params = CONSTANTS[".data"](net())
    with torch.no_grad():
        fused_penalty(params, l1=0.1)
    with torch.inference_mode():
        fused_penalty(params, l1=0.1)
    value_and_grad(params, l1=0.1)
    assert fused_penalty(params, l1=torch.tensor(0.1, requires_grad=True)).requires_grad
    assert fused_penalty([*params, nn.Parameter(draw(3))], l1=0.1).requires_grad
    torch.func.vmap(lambda w: fused_penalty([w], l1=0.1))(draw((3, 4)))
    frozen = net().requires_grad_(False)
    assert Regularizer(frozen, l1=0.1)() == 0
    frozen[0].bias.requires_grad_()
    assert Regularizer(frozen, l1=0.1)().requires_grad


@NAMES
@pytest.mark.parametrize("strengths", [{}, {"l1": 0.1}, {"l1": 0.1, "l2": [0.1] * 4}])
def test_rows_without_norms(name, strengths):
    with pytest.raises(ValueError, match=rf'^{name}: group="row" must come with l2_norm'):
        FUNCTIONS[name](net().parameters(), **strengths, group="row")
    FUNCTIONS[name](net().parameters(), **strengths, l2_norm=0.0, group="row")


@NAMES
@pytest.mark.parametrize("kind", ["l1", "l2", "l2_norm"])
@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf])
@pytest.mark.parametrize("trained", [False, True])
def test_a_strength_in_a_cpu_tensor_is_checked(name, kind, value, trained):
    params = list(net().parameters())
    one = torch.tensor(value, dtype=torch.float64, requires_grad=trained)
    many = torch.tensor([0.5, 0.0, value, 0.5], dtype=torch.float64, requires_grad=trained)
    for strength, place in ((one, ""), (many, r"\[2\]"), ([0.5, 0.0, one, 0.5], r"\[2\]")):
        with pytest.raises(ValueError, match=rf"^{name}: {kind}{place} must be finite and >= 0, got -?{abs(value):g}"):
            FUNCTIONS[name](params, **{kind: strength})
    assert all(p.grad is None for p in params)


def test_a_step_in_a_cpu_tensor_is_checked():
    params = list(net().parameters())
    before = [p.detach().clone() for p in params]
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^prox_: step must be finite and >= 0, got"):
            prox_(params, l1=0.1, step=torch.tensor(value))
        with pytest.raises(ValueError, match=r"^prox_: step\[1\] must be finite and >= 0, got"):
            prox_(params, l1=0.1, step=torch.tensor([0.1, value, 0.1, 0.1]))
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_regularizers_tensor_is_checked_at_every_call():
    model, strength = net(), torch.tensor(0.1)
    regularizer = Regularizer(model, l1=strength, rules=[("0.*", {"l1": 0.2})])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer.attach(optimizer)
    regularizer()
    strength.fill_(-0.1)
    with pytest.raises(ValueError, match=r"l1\S* must be finite and >= 0, got -0.1"):
        regularizer()
    model(torch.ones(7)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"l1\S* must be finite and >= 0, got -0.1"):
        optimizer.step()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def attached(mode="grad"):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = Regularizer(model, l1=0.1)
    return model, optimizer, regularizer, regularizer.attach(optimizer, mode)


TWICE = {
    "in a loss": lambda regularizer: (1.0 + regularizer()).backward(),
    "in a loss by autograd.grad": lambda regularizer: torch.autograd.grad(
        regularizer(), [p for _, p in regularizer.named_parameters()]
    ),
    "by accumulate_grad_": lambda regularizer: regularizer.accumulate_grad_(),
    "by prox_": lambda regularizer: regularizer.prox_(0.1),
}


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("way", TWICE)
def test_attached_and_taken_by_hand(way, mode):
    _, _, regularizer, attachment = attached(mode)
    with pytest.warns(UserWarning, match=rf"^Regularizer: the penalty counts twice, {way.split(' by a')[0]}"):
        TWICE[way](regularizer)
    TWICE[way](regularizer)  # once
    attachment.remove()
    _, _, regularizer, attachment = attached(mode)
    attachment.remove()
    TWICE[way](regularizer)


def test_looking_at_the_penalty_beside_an_attachment_is_no_mistake():
    model, optimizer, regularizer, attachment = attached()
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(7)).sum().backward()
        logged = regularizer().item()
        optimizer.step()
        assert attachment.value.item() == logged
    with torch.no_grad():
        regularizer()
    regularizer.report()
    loss = regularizer()
    del optimizer, attachment
    loss.backward()  # of an optimizer that is gone


IN_GRAPH = {
    "result": lambda t: t * 1,
    "clone": lambda t: t.clone(),
    "view of a result": lambda t: (t * 1)[1:],
    "view of a view of a result": lambda t: (t * 1).T[0],
    "chunk of a result": lambda t: (t * 1).chunk(2)[0],
    "cast": lambda t: t.to(torch.float64),
}


@pytest.mark.parametrize("kind", IN_GRAPH)
@pytest.mark.parametrize("arguments", [{"l1": 0.5}, {"l2_norm": 0.5}, {"l2": 0.5}])
def test_prox_refuses_a_tensor_inside_a_graph(kind, arguments):
    """Which would not know of the step: the gradient would be that of a value that is gone."""
    t = nn.Parameter(draw((4, 3)))
    y = IN_GRAPH[kind](t)
    before = y.detach().clone()
    first = nn.Parameter(draw(5))
    start = first.detach().clone()
    with pytest.raises(ValueError, match=r"^prox_: params\[1\] must be a leaf.*no_grad"):
        prox_([first, y], **arguments, step=1.0)
    assert torch.equal(y, before)
    assert torch.equal(first, start)
    with torch.no_grad():  # as torch's own functions
        prox_([first, y], **arguments, step=1.0)
    assert not torch.equal(y, before)


VIEWS_OF_LEAVES = {
    "leaf": lambda t: [t],
    "transposed": lambda t: [t.T],
    "slice": lambda t: [t[1:3]],
    "slice of a slice": lambda t: [t[1:].T[0]],
    "unbind": lambda t: t.unbind(0),
    "chunk": lambda t: t.chunk(2),
    "detach": lambda t: [t.detach()],
    "data": lambda t: [t.data],
}


@pytest.mark.parametrize("kind", VIEWS_OF_LEAVES)
def test_prox_writes_through_views_of_parameters(kind):
    """They are the parameter, and what is computed of it later has the new value and its gradient."""
    t = nn.Parameter(draw((4, 3)))
    expected = t.detach().clone()
    prox_(VIEWS_OF_LEAVES[kind](expected), l1=0.5, step=1.0)
    views = VIEWS_OF_LEAVES[kind](t)
    prox_(views, l1=0.5, step=1.0)
    assert torch.equal(t, expected)
    t.square().sum().backward()
    assert torch.equal(t.grad, 2 * expected)
    tensor = draw(3)
    prox_(tensor * 1, l1=0.5, step=1.0)  # in no graph


@pytest.mark.parametrize("is_input", [True, False])
def test_prox_refuses_what_torch_func_differentiates(is_input):
    def stepped(x):
        y = x if is_input else x * 1
        prox_([y], l1=0.5, step=1.0)
        return y.sum()

    with pytest.raises(ValueError, match=r"^prox_: params\[0\] must be a leaf"):
        torch.func.grad(stepped)(draw(3))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # of Dynamo
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_prox_in_compiled_code(backend):
    """Where the operator runs, nothing is a leaf any more."""

    def stepped(t, view):
        y = t.T if view else t * 1
        prox_([y], l1=0.5, step=1.0)
        return y.square().sum()

    t = nn.Parameter(draw((4, 3)))
    compiled = torch.compile(stepped, backend=backend, fullgraph=True)
    with pytest.raises(ValueError, match=r"^prox_: params\[0\] must be a leaf"):
        torch.compile(stepped, backend=backend)(t, False)
    with pytest.raises((ValueError, torch._dynamo.exc.Unsupported)):  # in these words, or in Dynamo's
        torch.compile(stepped, backend=backend, fullgraph=True)(t, False)
    expected = t.detach().clone()
    prox_(expected, l1=0.5, step=1.0)
    compiled(t, True).backward()
    assert torch.equal(t, expected)
    assert torch.equal(t.grad, 2 * expected)


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
@pytest.mark.parametrize("strengths", [{"l1": 0.1}, {"l2": torch.tensor(0.1)}])
def test_jit_trace_is_refused(strengths):
    w = nn.Parameter(draw((4, 3)))
    with pytest.raises(NotImplementedError, match=r"^fused_penalty: torch.jit.trace is not supported"):
        torch.jit.trace(lambda w: fused_penalty([w], **strengths), (w,))


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
@pytest.mark.parametrize(
    "change", [lambda w: prox_([w], l1=0.1, step=0.1), lambda w: accumulate_grad_([w], l1=0.1)], ids=["prox", "grad"]
)
def test_jit_trace_loses_no_change(change):
    with pytest.raises(NotImplementedError, match=r"^[a-z_]+: torch.jit.trace is not supported"):
        torch.jit.trace(lambda w: (change(w), w * 2)[1], (draw((4, 3)),))
