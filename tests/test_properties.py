"""Any list, any strengths, any upstream gradient: what hypothesis can think of, against the oracle and the loop."""

import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients, per_parameter
from samples import DTYPES, FULL_DTYPES, leaves

from fused_reg import fused_penalty, value_and_grad

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

SETTINGS = hypothesis.settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.filter_too_much,
        hypothesis.HealthCheck.function_scoped_fixture,  # the device, which no test changes
    ],
)  # fmt: skip


@st.composite
def tensors(draw, dtypes):
    """Of up to three dimensions, any values that a float32 square and sum can hold, contiguous or permuted."""
    shape = draw(st.lists(st.integers(0, 9), max_size=3))
    size = torch.Size(shape).numel()
    values = draw(st.lists(st.floats(-1e9, 1e9, width=32), min_size=size, max_size=size))
    dtype = draw(st.sampled_from(dtypes))
    limit = min(torch.finfo(dtype).max, 1e9)
    t = torch.tensor(values, dtype=torch.float64).reshape(shape).clamp(-limit, limit).to(dtype)
    return t.permute(draw(st.permutations(range(t.ndim))))


def strengths(count):
    one = st.floats(0, 1e6)
    return st.none() | one | st.lists(one, min_size=count, max_size=count)


@st.composite
def calls(draw, dtypes):
    params = draw(st.lists(tensors(dtypes), min_size=1, max_size=6))
    return params, {"l1": draw(strengths(len(params))), "l2": draw(strengths(len(params)))}


def on(device, call):
    params, given = call
    return [p.to(device) for p in params], given


@SETTINGS
@hypothesis.given(calls(DTYPES))
def test_value(device, call):
    params, given = on(device, call)
    assert_value(fused_penalty(params, **given), params, **given)
    assert_value(fused_penalty(leaves(params), **given).detach(), params, **given)


@SETTINGS
@hypothesis.given(calls(FULL_DTYPES), st.floats(width=32, allow_infinity=True, allow_nan=True))
def test_gradient(device, call, upstream):
    params, given = on(device, call)
    plain = given == {"l1": None, "l2": None}
    present = [x for s in given.values() for x in per_parameter(s, len(params))]
    hypothesis.assume(plain or any(present))  # else the loop is the int 0
    expected = loop_gradients(params, upstream, **given)
    assert_same_bits(gradients(fused_penalty, params, upstream, **given), expected)


@SETTINGS
@hypothesis.given(calls(DTYPES), st.randoms(use_true_random=False))
def test_order_of_the_list_moves_gradients_along(device, call, random):
    params, given = on(device, call)
    order = random.sample(range(len(params)), len(params))
    permuted = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in given.items()}
    _, grads = value_and_grad(params, **given)
    value, moved = value_and_grad([params[i] for i in order], **permuted)
    assert_same_bits(moved, [grads[i] for i in order])
    assert_value(value, params, **given)
