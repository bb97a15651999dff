"""The gradient: the loop's bits for float32 and float64, one rounding for bfloat16 and float16 (docs, Numerics)."""

import math

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, gradients, loop_gradients, per_parameter, ulp
from samples import (
    CONTENTS,
    DTYPES,
    FULL_DTYPES,
    HALF_DTYPES,
    SIZES,
    STRENGTHS,
    UPSTREAMS,
    draw,
    draw_list,
    leaves,
    mixed_list,
)

from fused_reg import fused_penalty, reference, value_and_grad

TERMS = {"l1": {"l1": 0.1}, "l2": {"l2": 1 / 3}, "both": {"l1": 0.1, "l2": 1 / 3}}
TERM_CASES = pytest.mark.parametrize("strengths", TERMS.values(), ids=TERMS)


def assert_loop_gradient(params, upstream=None, **strengths) -> None:
    expected = loop_gradients(params, upstream, **strengths)
    assert_same_bits(gradients(fused_penalty, params, upstream, **strengths), expected)
    if upstream is None:
        assert_same_bits(value_and_grad(params, **strengths)[1], expected)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
def test_list(strengths, dtype, device):
    assert_loop_gradient(draw_list(dtype, device), **strengths)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", UPSTREAMS)
@TERM_CASES
def test_upstream(strengths, upstream, dtype, device):
    """Hard case 27."""
    assert_loop_gradient(draw_list(dtype, device), upstream, **strengths)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_random_strengths_and_upstream(dtype, device):
    """Doubles of any exponent, whose products round."""
    rng = np.random.default_rng(5)
    w = draw(1000, dtype, device)
    for _ in range(100):
        l1, l2, upstream = (10.0 ** rng.uniform(-12, 4, 3)).tolist()
        assert_loop_gradient([w], upstream, l1=l1, l2=l2)
        assert_loop_gradient([w], -upstream, l1=l1)
        assert_loop_gradient([w], upstream, l2=l2)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, device):
    """Hard case 5."""
    assert_loop_gradient([draw(size, dtype, device)], l1=0.1, l2=1 / 3)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_every_small_size(dtype, device):
    """Hard case 5: every tail, every term."""
    whole = draw(300, dtype, device)
    for strengths in TERMS.values():
        expected = loop_gradients([whole], **strengths)[0]
        for n in range(300):
            assert_same_bits(value_and_grad(whole[:n], **strengths)[1], [expected[:n]])


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("name", [name for name, dtypes, *_ in CONTENTS if torch.float32 in dtypes])
def test_adversarial_content(name, dtype, device):
    """Hard case 23: subnormals are kept, large squares are not met."""
    content, l1, l2 = next(rest for n, _, *rest in CONTENTS if n == name)
    assert_loop_gradient([content(2000).to(device, dtype)], l1=l1, l2=l2)
    assert_loop_gradient([content(2000).to(device, dtype)], 1e-3, l2=l2)


SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, -1e-310, 1e-40, -1e-40, 1.7e308, -3e38, 1.0, -2.0)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", UPSTREAMS)
@TERM_CASES
def test_special_values(strengths, upstream, dtype, device):
    """Hard case 23: NaN, infinities, zeros of both signs and subnormals, as torch treats them."""
    w = torch.tensor(SPECIAL * 3, dtype=torch.float64, device=device).to(dtype)
    assert_loop_gradient([w], upstream, **strengths)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subgradient_at_zero_is_positive_zero(dtype, device):
    w = torch.tensor([0.0, -0.0], dtype=dtype, device=device)
    _, (grad,) = value_and_grad(w, l1=0.5)
    assert grad.tolist() == [0, 0]
    assert not grad.signbit().any()


@pytest.mark.parametrize("upstream", UPSTREAMS)
def test_mixed_dtypes(upstream, device):
    """Hard case 18: every parameter has the gradient it has alone, also with an upstream gradient in float64."""
    params = mixed_list(device)
    strengths = STRENGTHS["per parameter"]
    grads = gradients(fused_penalty, params, upstream, **strengths)
    assert [g.dtype for g in grads] == [p.dtype for p in params]
    for i, p in enumerate(params):
        one = {name: values[i] for name, values in strengths.items()}
        assert_same_bits([grads[i]], gradients(fused_penalty, [p], upstream, **one))
    kept = [i for i, p in enumerate(params) if p.dtype in FULL_DTYPES]
    full = [params[i] for i in kept]
    expected = loop_gradients(full, upstream, **{name: [v[i] for i in kept] for name, v in strengths.items()})
    assert_same_bits([grads[i] for i in kept], expected)


def assert_rounded_once(grads, params, upstream=1.0, l1=None, l2=None) -> None:
    """Within half an ulp, and the roundings of float32, of the true gradient; and never worse than the loop."""
    l1, l2 = per_parameter(l1, len(params)), per_parameter(l2, len(params))
    for grad, p, a, b in zip(grads, params, l1, l2, strict=True):
        w = p.detach().cpu().double()
        first, second = upstream * a * w.sgn(), upstream * b * 2 * w
        allowed = ulp(first + second, p.dtype) / 2 + 2.0**-22 * (first.abs() + second.abs()) + 1e-44
        # Beyond, the gradient is infinite; so is 2w in float32 and in the loop, whatever it is multiplied by.
        fits = ((first + second).abs() < torch.finfo(p.dtype).max) & (2 * w).float().isfinite()
        error = (grad.cpu().double() - (first + second)).abs()
        assert (error <= allowed)[fits].all()
        loop = loop_gradients([p], upstream, l1=a, l2=b)[0].cpu().double() if a or b else first
        loop_error = (loop - (first + second)).abs()
        assert not ((error > loop_error + allowed * 2.0**-10) & fits).any()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
@pytest.mark.parametrize("upstream", [1.0, -0.37, 96.0])
def test_half_precision(upstream, strengths, dtype, device):
    params = draw_list(dtype, device)
    given = strengths or {"l2": 1.0}
    assert_rounded_once(gradients(fused_penalty, params, upstream, **strengths), params, upstream, **given)
    if upstream == 1:
        assert_rounded_once(value_and_grad(params, **strengths)[1], params, **given)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_every_value(dtype, device):
    """All 65,536 of them, with factors that leave ties, odd digits, subnormal and infinite results."""
    w = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    kinds = w.isnan(), w == math.inf, w == -math.inf
    finite = w[w.isfinite()]
    for l1, l2 in ((None, 0.5), (None, 0.375), (None, 1 / 3), (0.7, 1e-3), (1e-3, 0.3), (3e-6, None)):
        _, (grad,) = value_and_grad(finite, l1, l2)
        assert_rounded_once([grad], [finite], l1=l1, l2=l2)
        in_float32 = loop_gradients([finite.float()], l1=l1 or 0.0, l2=l2 or 0.0)[0]
        assert_same_bits([grad], [in_float32.to(dtype)])  # ties to even, as torch rounds
        _, (grad,) = value_and_grad(w, l1, l2)
        nan, positive, negative = (grad[kind] for kind in kinds)
        assert nan.isnan().all() if l2 else (nan == 0).all()
        limit = math.inf if l2 else torch.tensor(l1).to(dtype).item()
        assert (positive == limit).all()
        assert (negative == -limit).all()


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_keeps_both_terms(dtype, device):
    """The terms are added before the one rounding: apart, each of these would vanish in the other's half ulp."""
    w = torch.tensor([1.0, -1.0], dtype=dtype, device=device)
    eps = torch.finfo(dtype).eps
    _, (grad,) = value_and_grad(w, l1=1.0, l2=0.3 * eps)
    assert grad.tolist() == [1 + eps, -1 - eps]


@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan, 0.0])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_special_upstream(dtype, upstream, device):
    """Hard case 27: as the loop in float32, then rounded."""
    w = draw(500, dtype, device)
    for strengths in TERMS.values():
        expected = loop_gradients([w.float()], upstream, **strengths)[0].to(dtype)
        assert_same_bits(gradients(fused_penalty, [w], upstream, **strengths), [expected])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_is_the_float32_loop_rounded(dtype, device):
    """To the bit, which implies the half ulp."""
    params = draw_list(dtype, device)
    strengths = STRENGTHS["per parameter"]
    expected = loop_gradients([p.float() for p in params], 0.37, **strengths)
    assert_same_bits(gradients(fused_penalty, params, 0.37, **strengths), [e.to(dtype) for e in expected])


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_upstream_from_a_composed_loss(dtype, device):
    """Hard case 27: a float64 factor behind a float32 value, an expanded gradient, a loss that divides."""
    params = draw_list(dtype, device)

    def losses(penalty):
        yield penalty.double() * 0.37
        yield (penalty.expand(3) * torch.tensor([0.1, -2.0, 7.3], device=device)).sum()
        yield penalty / 7
        yield (3 + penalty).log()
        yield penalty.reshape(1, 1).expand(4, 5).mean()
        yield penalty

    for fused, loop in zip(
        losses(fused_penalty(fused_leaves := leaves(params), l1=0.1, l2=1 / 3)),
        losses(_rounded_as(fused_penalty(params, l1=0.1, l2=1 / 3), loop_leaves := leaves(params))),
        strict=True,
    ):
        actual = torch.autograd.grad(fused, fused_leaves, retain_graph=True)
        assert_same_bits(actual, torch.autograd.grad(loop, loop_leaves, retain_graph=True))


def _rounded_as(value, params):
    """The loop, with the value of the fused penalty: their difference must not reach the upstream gradient."""
    loop = reference.loop(params, l1=0.1, l2=1 / 3)
    return loop + (value - loop).detach()


@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_upstream_in_memory_of_any_layout(upstream, device):
    w = draw(100, device=device)
    expected = loop_gradients([w], upstream, l1=0.1, l2=0.3)
    strided = torch.tensor([9.0, upstream, 9.0], device=device)[1]
    for gradient in (strided, torch.full((), upstream, device=device).expand(()), strided[None].expand(4)[2]):
        (leaf,) = leaves([w])
        fused_penalty(leaf, l1=0.1, l2=0.3).backward(gradient)
        assert_same_bits([leaf.grad], expected)


@pytest.mark.parametrize("size", [1 << 21])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_large(dtype, size, device):
    """Every element of a tensor that several threads share."""
    params = [draw(size, dtype, device), draw(12_345, dtype, device), draw(size // 3, dtype, device, seed=2)]
    assert_loop_gradient(params, l1=0.1, l2=1 / 3)
    assert_loop_gradient(params, 0.37, l1=[0.1, 0.2, 0.3], l2=[1 / 3, 0.7, 0.0])
