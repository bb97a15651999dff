"""The list of parameters: what it may be, and what it may hold (hard cases 1-9)."""

import re
import types

import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import CHUNK, DTYPES, FULL_DTYPES, draw, draw_list, leaves

import fused_reg
from fused_reg import fused_penalty, reference, value_and_grad

FUNCTIONS = pytest.mark.parametrize("function", [fused_penalty, value_and_grad])


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


@pytest.mark.parametrize("strengths", [{}, {"l1": 1.0}, {"l1": [], "l2": []}, {"l2": torch.tensor(0.5)}])
@pytest.mark.parametrize("make", [list, tuple, lambda: iter(()), torch.nn.ParameterList, dict.fromkeys([]).values])
def test_empty(make, strengths):
    """Hard case 1."""
    value = fused_penalty(make(), **strengths)
    assert_same_bits([value], [torch.zeros(())])
    assert value.device.type == "cpu"
    assert not value.requires_grad
    value, grads = value_and_grad(make(), **strengths)
    assert_same_bits([value], [torch.zeros(())])
    assert grads == ()


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        iter,
        lambda params: (p for p in params),
        lambda params: dict(enumerate(params)).values(),
        lambda params: torch.nn.ParameterDict({f"p{i:02}": p for i, p in enumerate(params)}).values(),
        torch.nn.ParameterList,
        lambda params: types.MappingProxyType(dict.fromkeys(params)),
    ],
    ids=["list", "tuple", "iterator", "generator", "values", "ParameterDict", "ParameterList", "keys"],
)
def test_iterables(make, device):
    """Hard case 2: each is read once."""
    params = [torch.nn.Parameter(p) for p in draw_list(torch.float32, device)]
    strengths = {"l1": 0.1, "l2": [0.1 * i for i in range(len(params))]}
    expected, expected_grads = value_and_grad(params, **strengths)
    value, grads = value_and_grad(make(params), **strengths)
    assert_same_bits([value, *grads], [expected, *expected_grads])
    penalty = fused_penalty(make(params), **strengths)
    assert_same_bits([penalty, *torch.autograd.grad(penalty, params)], [expected, *expected_grads])


def test_modules_parameters(device):
    """Hard case 2: `parameters()`, and what it holds after a parameter was tied to another."""
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(7, 5)).to(device)
    model[2].weight = model[0].weight
    value = fused_penalty(model.parameters(), l1=0.1, l2=0.2)
    assert_value(value, [model[0].weight, model[0].bias, model[2].bias], 0.1, 0.2)


@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (0, 3)])
def test_one_tensor(shape, device):
    """Hard case 2: a tensor is one parameter, not its rows."""
    w = draw(shape, device=device)
    value, grads = value_and_grad(w, l1=[0.1], l2=torch.tensor([0.2]))
    assert len(grads) == 1
    assert_same_bits([value, *grads], [(expected := value_and_grad([w], 0.1, 0.2))[0], *expected[1]])
    assert_same_bits([fused_penalty(torch.nn.Parameter(w), l1=0.1, l2=0.2)], [value])


@FUNCTIONS
@pytest.mark.parametrize(
    ("wrong", "described"),
    [
        (None, "NoneType"),
        (1.5, "float"),
        ([torch.ones(2)], "list"),
        ("weight", "str; pass `.values()` of a dictionary"),
        (("weight", torch.ones(2)), "a (name, tensor) pair; drop the names, as `.parameters()` does"),
        (torch.nn.Linear(2, 2), "the module Linear; pass its `.parameters()`"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_non_tensors_inside(wrong, described, function, device):
    """Hard case 3: after the error the next call works."""
    w = draw(3, device=device)
    with raises(TypeError, f"{function.__name__}: params[1] must be a tensor, got {described}"):
        function([w, wrong, w], l1=0.5)
    assert_value(fused_penalty([w], l1=0.5), [w], l1=0.5)


@FUNCTIONS
def test_not_a_list(function):
    """Hard case 3."""
    name = function.__name__
    with raises(TypeError, f"{name}: params must be tensors, got the module Linear; pass its `.parameters()`"):
        function(torch.nn.Linear(2, 2))
    for wrong, kind in ((3, "int"), (None, "NoneType"), (0.5, "float")):
        with raises(TypeError, f"{name}: params must be a tensor or an iterable of tensors, got {kind}"):
            function(wrong)
    with raises(
        TypeError,
        f"{name}: params[0] must be a tensor, got a (name, tensor) pair; drop the names, as `.parameters()` does",
    ):
        function(torch.nn.Linear(2, 2).named_parameters())
    with raises(TypeError, f"{name}: params[0] must be a tensor, got str; pass `.values()` of a dictionary"):
        function(torch.nn.Linear(2, 2).state_dict())


@FUNCTIONS
@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, KeyboardInterrupt])
def test_exception_of_the_iterable_comes_out(error, function):
    """What the user's own generator raises is not reworded."""

    def broken():
        yield torch.ones(2)
        raise error("mine")

    with pytest.raises(error, match="mine"):
        function(broken(), l1=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("empty_at", [(0,), (1,), (4,), (0, 1, 4, 5, 6), (2, 3)])
def test_empty_tensors_among_others(empty_at, dtype, device):
    """Hard case 4: first, in the middle, last."""
    full = [draw(n, dtype, device, seed=n) for n in (5, CHUNK + 1, 300)]
    params = []
    for i in range(max(empty_at) + 4):
        params.append(torch.empty((0, i), dtype=dtype, device=device) if i in empty_at or not full else full.pop())
    l1 = [0.1 * (i + 1) for i in range(len(params))]
    value, grads = value_and_grad(params, l1=l1, l2=0.5)
    assert_value(value, params, l1, 0.5)
    for p, grad, strength in zip(params, grads, l1, strict=True):
        assert_same_bits([grad], value_and_grad([p], l1=strength, l2=0.5)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 3, 10_000])
def test_all_empty(count, dtype, device):
    """Hard case 4: 0, and empty gradients."""
    params = [torch.empty((0, i), dtype=dtype, device=device, requires_grad=True) for i in range(count)]
    value = fused_penalty(params, l1=0.5, l2=0.25)
    expected = torch.zeros((), dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    assert_same_bits([value], [expected])
    value.backward()
    assert all(p.grad.shape == p.shape and p.grad.dtype == dtype for p in params)


def test_ten_thousand_tensors(device):
    """Hard case 6: the gradient of each."""
    params = list(draw(20_000, device=device).split([i % 5 for i in range(10_000)]))
    params[7_777] = draw(200_001, device=device, seed=1)
    l1 = [0.001 * (i % 1000) for i in range(10_000)]
    grads = value_and_grad(params, l1=l1, l2=0.3)[1]
    expected = loop_gradients(params, l1=l1, l2=0.3)
    assert_same_bits(grads, expected)
    assert_same_bits(gradients(fused_penalty, params, 1.0, l1=l1, l2=0.3), expected)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("strengths", [{"l1": 0.1}, {"l2": 1 / 3}, {"l1": 0.1, "l2": 1 / 3}], ids=["l1", "l2", "both"])
def test_same_tensor_twice(strengths, upstream, dtype, device):
    """Hard case 8: it counts twice. With both terms the loop adds its four parts in another order: 1 ulp."""
    w, other = draw(1000, dtype, device), draw(50, dtype, device, seed=1)

    def twice(function):
        first, second = leaves([w, other])
        out = function([first, second, first], **strengths)
        return out, torch.autograd.grad(out, [first, second], torch.full((), upstream, dtype=out.dtype, device=device))

    value, grads = twice(fused_penalty)
    _, expected = twice(reference.loop)
    assert_value(value.detach(), [w, other, w], **strengths)
    if len(strengths) == 1:
        assert_same_bits(grads, expected)
    else:
        torch.testing.assert_close(grads, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_overlapping_views(upstream, dtype, device):
    """Hard case 9: of one storage, each with its own strengths."""
    w = draw((40, 30), dtype, device)
    strengths = {"l1": [0.1, 0.2, 0.3], "l2": [0.7, 0.0, 1 / 3]}

    def views(function):
        (leaf,) = leaves([w])
        params = [leaf[:25], leaf[20:].t(), leaf.reshape(-1)[100:1000:7]]
        out = function(params, **strengths)
        (grad,) = torch.autograd.grad(out, leaf, torch.full((), upstream, dtype=out.dtype, device=device))
        return [p.detach() for p in params], out.detach(), grad

    params, value, grad = views(fused_penalty)
    assert_value(value, params, **strengths)
    expected = views(reference.loop)[2]
    # The engine adds the views' gradients in the order in which they become ready.
    torch.testing.assert_close(
        grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-7 if dtype.itemsize == 4 else 1e-16
    )
    assert_same_bits(value_and_grad(params, **strengths)[1], loop_gradients(params, **strengths))


def test_signature_and_names():
    functions = ["accumulate_grad_", "fused_penalty", "largest_strength", "prox_", "regularized", "value_and_grad"]
    assert sorted(fused_reg.__all__) == sorted([*functions, "NORMS", "Regularizer", "optim", "reference", "schedules"])
    w = torch.ones(2)
    assert fused_penalty(w, 3.0, 5.0) == fused_penalty(w, l2=5.0, l1=3.0) == 16
    assert value_and_grad(w, 3.0, 5.0)[0] == 16
