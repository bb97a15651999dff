"""The value: one rounding away from the truth, at any size and for any content (docs, Numerics)."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import assert_near, assert_value, exact_penalty
from samples import CONTENTS, DTYPES, HALF_DTYPES, SIZES, STRENGTHS, draw, draw_list, leaves, mixed_list

import fused_reg
from fused_reg import fused_penalty, reference, value_and_grad


def all_values(params, **strengths) -> list[torch.Tensor]:
    """The value by every way to it: sums alone, sums and gradient, and term by term for higher derivatives."""
    l1, l2 = strengths.get("l1"), strengths.get("l2")
    differentiable = {}
    for name, strength in (("l1", l1), ("l2", 1.0 if l1 is None and l2 is None else l2)):
        if strength is not None:
            differentiable[name] = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    return [
        fused_penalty([p.detach() for p in params], **strengths),
        fused_penalty(leaves(params), **strengths),
        value_and_grad(params, **strengths)[0],
        fused_penalty(leaves(params), **differentiable).detach(),
    ]


def assert_all_values(params, **strengths) -> None:
    values = all_values(params, **strengths)
    assert_value(values[0], params, **strengths)
    exact = exact_penalty(params, **strengths)
    for value in values[1:]:
        assert value.dtype == values[0].dtype
        assert_near(value, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
def test_list(strengths, dtype, device):
    assert_all_values(draw_list(dtype, device), **strengths)


@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
def test_mixed_dtypes(strengths, device):
    """Hard case 18: the promoted value."""
    params = mixed_list(device)
    assert_all_values(params, **strengths)
    assert_all_values(params[2:4], **{k: v[2:4] if isinstance(v, list) else v for k, v in strengths.items()})


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_small_size(dtype, device):
    """Hard case 5: every tail."""
    for n in range(530):
        w = draw(n, dtype, device)
        assert_value(fused_penalty(w, l1=0.3), [w], l1=0.3)
        assert_value(fused_penalty(w, l2=0.7), [w], l2=0.7)
        assert_value(value_and_grad(w, l1=0.3, l2=0.7)[0], [w], l1=0.3, l2=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, device):
    """Hard case 5: around the sizes at which the kernels turn."""
    assert_all_values([draw(size, dtype, device)], l1=0.3, l2=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_dim(dtype, device):
    """Hard case 5."""
    assert_all_values([draw((), dtype, device)], l1=0.3, l2=0.7)


@pytest.mark.parametrize(
    ("dtype", "content", "l1", "l2"),
    [
        pytest.param(dtype, content, l1, l2, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, dtypes, content, l1, l2 in CONTENTS
        for dtype in dtypes
    ],
)
def test_adversarial_content(dtype, content, l1, l2, device):
    """Hard case 23: where plain sums lose digits, overflow or vanish."""
    for n in (5, 50_003):
        w = content(n).to(device, dtype)
        assert_value(fused_penalty(w, l1=l1), [w], l1=l1)
        assert_value(fused_penalty(w, l2=l2), [w], l2=l2)
        assert_all_values([w, w[: n // 3]], l1=l1, l2=l2)


EXTREMES = (
    (1e200, None, 1e-300),
    (1e-200, None, 1e300),
    (1e200, 1e100, None),
    (1e300, 1e-300, None),
    (1e-300, 1e300, None),
    (1e200, 1e-250, 1e-300),
    (1.7e308, 1e-10, None),
    (1.7e308, None, 5e-324),
    (1e154, None, 1e-6),
    (5e-324, None, 1.7e308),
    (5e-324, 1.7e308, None),
    (1e-160, 1e10, 1e300),
    (1e150, 5e-324, 1e-310),
    (1e5, 1e-310, None),
    (1e300, 5e-324, 5e-324),
)


@pytest.mark.parametrize(("scale", "l1", "l2"), EXTREMES)
@pytest.mark.parametrize("size", [1, 1000, 40_000])
def test_float64_fits(size, scale, l1, l2, device):
    """Finite and exact where |w| or w^2 alone overflows or vanishes, and the penalty does not."""
    w = scale * draw(size, torch.float64, device).clamp(-1, 1)
    for params in ([w], [w, 1e-30 * draw(7, device=device)]):
        assert_value(fused_penalty(params, l1=l1, l2=l2), params, l1, l2)
        assert_value(value_and_grad(params, l1=l1, l2=l2)[0], params, l1, l2)


@pytest.mark.parametrize(("scale", "l1", "l2"), EXTREMES)
def test_float64_fits_with_trained_strengths(scale, l1, l2, device):
    """The same, where the strengths require grad."""
    w = scale * draw(1000, torch.float64, device).clamp(-1, 1)
    given = {"l1": l1, "l2": l2}
    tensors = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in given.items() if v is not None}
    assert_value(fused_penalty(w, **tensors).detach(), [w], l1, l2)


def test_float64_many_small_squares(device):
    """Each w^2 is subnormal, their sum is not."""
    w = torch.full((100_000,), 1.0437e-156, dtype=torch.float64, device=device)
    assert_value(fused_penalty(w, l2=1.0), [w], l2=1.0)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_does_not_overflow(dtype, device):
    """The loop's sum is infinite or stuck; float32 holds the value."""
    w = 60_000 * draw(200_000, dtype, device).sign() + draw(200_000, dtype, device, seed=1)
    assert_all_values([w], l1=1.0)
    assert_all_values([w], l2=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_square_overflows_float32_and_the_penalty_fits(dtype, device):
    """Hard case 23."""
    w = 1e20 * draw(1000, dtype, device)
    assert_all_values([w], l2=1e-10)
    assert_all_values([w], l1=0.5, l2=1e-5)
    assert fused_penalty(w, l2=1.0) == math.inf


def test_strengths_outside_of_float32(device):
    """Hard case 25: strengths are multiplied in float64."""
    w = 1e35 * draw(1000, device=device)
    assert_all_values([w], l2=1e-50)
    w = 1e-38 * draw(1000, device=device)
    assert_all_values([w], l1=1e50)


@pytest.mark.long
def test_hundred_million(device):
    w = torch.from_numpy(np.random.default_rng(1).random(100_000_000, dtype=np.float32)).to(device)
    assert_value(fused_penalty(w, l1=1e-3, l2=1e-2), [w], 1e-3, 1e-2)
    w.fill_(0.1)
    assert fused_penalty(w, l1=1e-3) == fused_penalty(w[:1], l1=1e5)


@pytest.mark.parametrize(("size", "count"), [(16_384, 1), (20_000_000, 1), (1, 100_000)])
def test_float64_roundings_do_not_add_up(size, count, device):
    """Equal summands, whose roundings all point the same way: within a chunk, over chunks, over tensors."""
    w = torch.full((size,), 0.1, dtype=torch.float64, device=device)
    for l1 in (1.0, 0.3, 0.7):
        assert_near(fused_penalty([w] * count, l1=l1), count * size * Fraction(l1) * Fraction(0.1))
    squares = count * size * Fraction(0.1) ** 2
    assert_near(fused_penalty([w] * count, l2=1.0), squares)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_hundred_million_every_dtype(dtype, device):
    w = torch.from_numpy(np.random.default_rng(1).random(100_000_000, dtype=np.float32)).to(device, dtype)
    value, _ = value_and_grad(w, l1=1e-3, l2=1e-2)
    assert_value(value, [w], 1e-3, 1e-2)


@pytest.mark.slow
def test_above_two_to_the_31(device):
    """Hard case 7: one tensor above 2^31 elements, with its tail and its last gradient right."""
    size = 2**31 + 12_345
    w = torch.zeros(size, dtype=torch.bfloat16, device=device)
    marks = torch.tensor([0, 1, 2**20, 2**30, 2**31 - 1, 2**31, 2**31 + 1, size - 2, size - 1], device=device)
    w[marks] = draw(len(marks), torch.bfloat16, device, seed=3)
    expected = [w[marks]]
    assert_value(fused_penalty(w, l1=0.5, l2=0.25), expected, 0.5, 0.25)
    value, (grad,) = value_and_grad(w, l1=0.5, l2=0.25)
    assert_value(value, expected, 0.5, 0.25)
    assert torch.equal(grad[marks], value_and_grad(w[marks], l1=0.5, l2=0.25)[1][0])
    assert grad.count_nonzero() == w.count_nonzero()
    # The total above 2^32, over the same memory.
    assert_value(fused_penalty([w, w, w[:9]], l1=0.5), [*expected, *expected, w[:9]], 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_propagate(special, dtype, device):
    """Hard case 23."""
    for n in (1, 20, 40_000):
        for at in {0, n // 2, n - 1}:
            w = draw(n, dtype, device)
            w[at] = special
            expected = math.nan if math.isnan(special) else math.inf
            for strengths in ({"l1": 0.5}, {"l2": 0.5}, {"l1": 0.5, "l2": 0.25}):
                for value in all_values([draw(3, dtype, device), w], **strengths):
                    assert value.isnan() if math.isnan(expected) else value == expected


@pytest.mark.parametrize("special", [math.nan, math.inf])
@pytest.mark.parametrize("strengths", [{"l1": 0.0}, {"l2": 0.0}, {"l1": 0.0, "l2": 0.0}])
def test_strength_zero_drops_the_term(strengths, special, device):
    """``0.0 * inf`` and ``0.0 * nan`` do not enter."""
    w = torch.tensor([1.0, special], device=device)
    value, (grad,) = value_and_grad(w, **strengths)
    assert value == 0
    assert grad.tolist() == [0, 0]
    tensors = {name: torch.tensor(0.0, device=device) for name in strengths}
    assert fused_penalty(w, **tensors) == 0
    one, finite = torch.ones(1, device=device), torch.tensor(2.0, device=device)
    assert fused_penalty([w, one], l1=[0.0, 0.5], l2=torch.tensor([0.0, 0.25])) == 0.75
    assert fused_penalty([finite, one], **strengths) == 0


@pytest.mark.parametrize("name", ["l1", "l2", "l2_norm", "smooth_l1", "mcp", "scad"])
@pytest.mark.parametrize("strength", [0.0, [0.0, 0.0]], ids=["one", "each"])
def test_a_list_without_a_term(name, strength):
    """The value is 0, and so are the gradients: of the kernels, of the reference, and of the loop."""
    for module in (fused_reg, reference):
        params = leaves([torch.tensor([1.0, math.nan]), torch.ones(2, 3, dtype=torch.float64)])
        value, grads = module.value_and_grad(params, **{name: strength})
        values = [value, module.accumulate_grad_(params, **{name: strength})]
        found = [grads, [p.grad for p in params]]
        for function in (module.fused_penalty, *((reference.loop,) if module is reference else ())):
            values.append(function(params, **{name: strength}))
            found.append(torch.autograd.grad(values[-1], params))
        for value, grads in zip(values, found, strict=True):
            assert (value, value.dtype) == (0, torch.float64)
            assert [g.dtype for g in grads] == [p.dtype for p in params]
            assert not any(g.any() for g in grads)


def test_plain_call_is_the_sum_of_squares(device):
    params = draw_list(torch.float32, device)
    assert_value(fused_penalty(params), params, l2=1.0)
    assert torch.equal(fused_penalty(params), fused_penalty(params, l2=1.0))
    assert not torch.equal(fused_penalty(params), fused_penalty(params, l1=1.0))


def test_ten_thousand_tensors(device):
    """Hard case 6: many tiny tensors, with one huge among them; and counts around powers of two."""
    params = list(draw(20_000, torch.float32, device).split([i % 5 for i in range(10_000)]))
    params[4_999] = draw(300_000, torch.float32, device)
    l2 = np.random.default_rng(0).random(10_000).tolist()
    assert_all_values(params, l1=0.5, l2=l2)
    for count in (127, 128, 129, 255, 256, 257, 1023, 1024, 1025):
        assert_value(fused_penalty(params[-count:], l1=0.5, l2=l2[-count:]), params[-count:], 0.5, l2[-count:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_shipped_reference(dtype, device):
    """And the reference with the oracle, which does not know it."""
    params = draw_list(dtype, device)
    strengths = STRENGTHS["per parameter"]
    assert_value(reference.fused_penalty(params, **strengths), params, **strengths)
    assert_value(reference.fused_penalty(params), params)
    value, grads = reference.value_and_grad(params, **strengths)
    torch.testing.assert_close(value, fused_reg.value_and_grad(params, **strengths)[0])
    for p, grad, l1, l2 in zip(params, grads, strengths["l1"], strengths["l2"], strict=True):
        torch.testing.assert_close(grad, (l1 * p.double().sgn() + 2 * l2 * p.double()).to(dtype), rtol=0, atol=0)
