"""Strengths: what they may be, and which parameter each belongs to (hard cases 25, 26)."""

import decimal
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import draw, draw_list, leaves

from fused_reg import fused_penalty, value_and_grad

FUNCTIONS = pytest.mark.parametrize("function", [fused_penalty, value_and_grad])
NAMES = pytest.mark.parametrize("name", ["l1", "l2"])
COUNT = 11  # parameters of draw_list


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def assert_refused(function, name, error, strength, rule):  # before any operator is called: no device matters
    """And nothing is written, and the next call works."""
    params = leaves([draw(3), draw(4)])
    for strengths in ({name: strength}, {"l1": 0.1, "l2": 0.1} | {name: strength}):
        with raises(error, f"{function.__name__}: {name}{rule}"):
            function(params, **strengths)
    assert all(p.grad is None for p in params)
    assert_value(fused_penalty(params, l1=0.1).detach(), params, l1=0.1)


@FUNCTIONS
@NAMES
@pytest.mark.parametrize("value", [-1, -1e-300, -math.inf, math.nan, math.inf, np.float32("nan"), -np.float64(2)])
def test_not_finite_or_negative(value, name, function):
    """Hard case 25."""
    assert_refused(function, name, ValueError, value, f" must be finite and >= 0, got {value}")
    assert_refused(function, name, ValueError, [0.5, value], f"[1] must be finite and >= 0, got {value}")


@FUNCTIONS
@NAMES
def test_int_beyond_float(name, function):
    """Hard case 25."""
    assert_refused(function, name, ValueError, 10**400, f" must be finite and >= 0, got {10**400}")


@FUNCTIONS
@NAMES
@pytest.mark.parametrize("value", [True, False, "0.1", b"0.1", 1j, {0: 0.1}, {0.1, 0.2}, decimal.Decimal(1), np.True_])
def test_not_a_number(value, name, function):
    """Hard case 25: also an item, where a sequence of strengths is expected."""
    kind = type(value).__name__
    rule = f" must be a float, a 0-dim tensor or a sequence with one per parameter, got {kind}"
    assert_refused(function, name, TypeError, value, rule)
    for i in (0, 1):
        items = [0.5, 0.5]
        items[i] = value
        assert_refused(function, name, TypeError, items, f"[{i}] must be a float or a 0-dim tensor, got {kind}")


@FUNCTIONS
@NAMES
def test_none_inside(name, function):
    """Hard case 25."""
    rule = "[1] must be a float or a 0-dim tensor, got NoneType"
    assert_refused(function, name, TypeError, [0.5, None], rule)


@FUNCTIONS
@NAMES
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("make", [list, tuple, np.array])
def test_wrong_length(make, count, name, function):
    """Hard case 26."""
    rule = f" must have one strength per parameter (2), got {count}"
    assert_refused(function, name, ValueError, make([0.5] * count), rule)


@FUNCTIONS
@NAMES
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (1, 1), (2, 1), (1, 2)])
def test_wrong_shape(shape, name, function):
    """Hard case 26."""
    hint = "; use `.reshape(())`" if math.prod(shape) == 1 else ""
    rule = f" must be 0-dim or have one strength per parameter (2), got shape {shape}{hint}"
    assert_refused(function, name, ValueError, torch.ones(shape), rule)
    rule = f"[0] must be 0-dim, got shape {shape}{hint}"
    assert_refused(function, name, ValueError, [torch.ones(shape), 0.5], rule)


@FUNCTIONS
@NAMES
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_wrong_dtype(dtype, name, function):
    """Hard case 26."""
    assert_refused(function, name, TypeError, torch.ones((), dtype=dtype), f" must be floating point, got {dtype}")
    wrong = [0.5, torch.ones((), dtype=dtype)]
    assert_refused(function, name, TypeError, wrong, f"[1] must be floating point, got {dtype}")


@NAMES
@pytest.mark.parametrize(
    "value",
    [3, np.float64(0.1), np.float32(0.1), np.float16(0.1), np.int64(3), np.uint8(3), Fraction(1, 3), 10**30, 1e-300],
    ids=lambda x: type(x).__name__,
)
def test_numbers(value, name, device):
    """Hard case 25: NumPy scalars and ints are accepted, for all and in a sequence."""
    params = [draw(9, torch.float64, device), draw((4, 5), torch.float64, device, seed=1)]
    plain = float(value)
    expected, expected_grads = value_and_grad(params, **{name: plain})
    for strength in (value, [value, value], (plain, value), np.array([value, value], dtype=np.float64)):
        assert_same_bits([fused_penalty(params, **{name: strength})], [expected])
        assert_same_bits(value_and_grad(params, **{name: strength})[1], expected_grads)
    assert_value(expected, params, **{name: plain})


@NAMES
def test_range_is_a_sequence(name, device):
    params = draw_list(torch.float32, device)
    strengths = {name: [float(i) for i in range(COUNT)]}
    expected = value_and_grad(params, **strengths)
    assert_same_bits(value_and_grad(params, **{name: range(COUNT)})[1], expected[1])
    assert_value(fused_penalty(params, **{name: range(COUNT)}), params, **strengths)


def test_small_strength_is_not_flushed(device):
    """Hard case 25: 1e-50 is multiplied in float64, whatever the parameters' dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        w = 1e35 * draw(100, dtype, device)
        assert_value(fused_penalty(w, l2=1e-50), [w], l2=1e-50)
    w = draw(100, torch.float64, device)
    assert_value(fused_penalty(w, l1=1e-50, l2=1e-300), [w], 1e-50, 1e-300)
    assert_same_bits(value_and_grad(w, l1=1e-50)[1], loop_gradients([w], l1=1e-50))


TENSOR_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
def test_zero_dim_tensors(dtype, requires_grad, device):
    """Hard case 26: of any float dtype, on the CPU and on the parameters' device."""
    params = draw_list(torch.float32, device)
    for where in {"cpu", str(device)}:
        l1 = torch.tensor(0.15625, dtype=dtype, device=where, requires_grad=requires_grad)
        l2 = torch.tensor(0.34375, dtype=dtype, device=where, requires_grad=requires_grad)
        plain = {"l1": l1.item(), "l2": l2.item()}
        expected = value_and_grad(params, **plain)
        assert_value(fused_penalty(params, l1=l1, l2=l2).detach(), params, **plain)
        assert_same_bits(value_and_grad(params, l1=l1, l2=l2)[1], expected[1])
        for upstream in (1.0, 0.37):
            actual = gradients(fused_penalty, params, upstream, l1=l1, l2=l2)
            assert_same_bits(actual, gradients(fused_penalty, params, upstream, **plain))
            mixed = gradients(fused_penalty, params, upstream, l1=l1, l2=plain["l2"])
            assert_same_bits(mixed, actual)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", TENSOR_DTYPES)
def test_one_per_parameter_as_a_tensor(dtype, requires_grad, device):
    """Hard case 26: a 1-D tensor, of any strides; and a sequence of floats and 0-dim tensors."""
    params = draw_list(torch.float32, device)
    l1 = (torch.arange(2 * COUNT, device=device) / 8).to(dtype)[::2].requires_grad_(requires_grad)
    plain = l1.tolist()
    expected = value_and_grad(params, l1=plain, l2=0.375)
    forms = (l1, list(l1), tuple(l1), [s if i % 2 else plain[i] for i, s in enumerate(l1)])
    for form in forms:
        assert_value(fused_penalty(params, l1=form, l2=0.375).detach(), params, plain, 0.375)
        assert_same_bits(value_and_grad(params, l1=form, l2=0.375)[1], expected[1])
        actual = gradients(fused_penalty, params, 0.37, l1=form, l2=0.375)
        assert_same_bits(actual, loop_gradients(params, 0.37, l1=plain, l2=0.375))


def test_gradient_of_tensor_strengths_matches_the_loops(device):
    """The loop with tensors for strengths, where all is float32."""
    params = [draw(n, device=device, seed=n) for n in (5, 1000, 17)]
    l1 = torch.tensor([0.1, 0.2, 0.3], device=device)
    l2 = torch.tensor(1 / 3, device=device)
    for upstream in (1.0, 0.37):
        actual = gradients(fused_penalty, params, upstream, l1=l1, l2=l2)
        assert_same_bits(actual, loop_gradients(params, upstream, l1=l1, l2=l2))


def test_tensor_strength_may_change_between_calls(device):
    """Its value is read at each call, and the graph of a call keeps its own."""
    w = draw(50, device=device)
    strength = torch.tensor(0.5, device=device)
    for value in (0.5, 0.25, 0.0, 3.0):
        strength.fill_(value)
        assert_same_bits([fused_penalty(w, l1=strength)], [fused_penalty(w, l1=value)])


def test_tensor_strength_changed_before_backward(device):
    """Torch's own error, as for a parameter: the gradient would be neither the old nor the new one."""
    (leaf,) = leaves([draw(50, device=device)])
    strength = torch.tensor(0.5, device=device)
    penalty = fused_penalty(leaf, l1=strength)
    strength.fill_(0.25)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_strengths_belong_to_their_parameter(device):
    """One-hot strengths single out each parameter in turn."""
    params = draw_list(torch.float64, device)
    for i, p in enumerate(params):
        one_hot = [float(i == j) for j in range(COUNT)]
        for name in ("l1", "l2"):
            assert_value(fused_penalty(params, **{name: one_hot}), [p], **{name: 1.0})
            grads = value_and_grad(params, **{name: one_hot})[1]
            assert_same_bits([grads[i]], value_and_grad([p], **{name: 1.0})[1])
            assert not any(g.any() for j, g in enumerate(grads) if j != i)


@pytest.mark.parametrize("strengths", [{"l1": 0.0}, {"l2": 0}, {"l1": 0.0, "l2": 0.0}, {"l1": [0.0] * COUNT}])
def test_all_zero(strengths, device):
    """A strength that is given and 0 is not "no strength": the penalty is 0, differentiably."""
    params = leaves(draw_list(torch.float32, device))
    penalty = fused_penalty(params, **strengths)
    assert penalty == 0
    penalty.backward()
    assert_same_bits([p.grad for p in params], [torch.zeros_like(p) for p in params])


@pytest.mark.parametrize("function", [fused_penalty, value_and_grad])
def test_meta_strength_of_real_parameters(function, device):
    """Hard case 26: it has no value, and no memory may be returned unwritten."""
    w = torch.ones(3, device=device)
    rule = f"strengths must be on the CPU or on the parameters' device ({w.device}), got meta"
    with raises(ValueError, f"{function.__name__}: {rule}"):
        function([w], l1=torch.tensor(1.0, device="meta"))
