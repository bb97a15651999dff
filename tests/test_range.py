"""Hard case 51: near the ends of the range of float64, by every way to a number."""

import math
from fractions import Fraction

import pytest
import torch
from oracle import assert_value, exact_penalty
from samples import draw, leaves, numbers
from test_group_norms_gradient import exact_gradient
from torch import nn

from fused_reg import Regularizer, _ops, accumulate_grad_, fused_penalty, value_and_grad
from fused_reg.distributed.collectives import hypot

EVERY_GROUP = pytest.mark.parametrize("group", ["tensor", "row"])

# The size of the weights, and strengths of which neither the penalty nor a gradient leaves the range.
ENDS = (
    (1e200, {"l2": 1e-150}),
    (1e-200, {"l2": 1e150}),
    (1e-160, {"l2": 1.0}),
    (1.7e308, {"l1": 1e-10}),
    (1.7e308, {"l2": 5e-324}),
    (1e-308, {"l1": 1e300}),
    (1e5, {"l1": 1e-310}),
    (1e160, {"l2": 1e-310}),
    (1e300, {"l1": 5e-324}),
    (1e308, {"l2_norm": 1e-10}),
    (1e-308, {"l2_norm": 2.0}),
    (1e200, {"l1": 1e-100, "l2": 1e-300, "l2_norm": 1e50}),
    (1e-200, {"l1": 1e100, "l2": 1e300, "l2_norm": 1e-50}),
)
EVERY_END = pytest.mark.parametrize(("scale", "strengths"), ENDS)


def weights(scale, device) -> list[torch.Tensor]:
    return [scale * draw(shape, torch.float64, device).clamp(-1, 1) for shape in ((40, 25), (3, 5000), ())]


def trained(strengths) -> dict[str, torch.Tensor]:
    return {kind: torch.tensor(s, dtype=torch.float64, requires_grad=True) for kind, s in strengths.items()}


@EVERY_GROUP
@EVERY_END
def test_values(scale, strengths, group, device):
    params = weights(scale, device)
    some = leaves(params)
    of = {"group": group} if "l2_norm" in strengths else {}
    for value in (
        fused_penalty(params, **strengths, **of),
        fused_penalty(some, **strengths, **of).detach(),
        fused_penalty(params, **trained(strengths), **of).detach(),
        value_and_grad(params, **strengths, **of)[0],
        accumulate_grad_(some, **strengths, **of),
    ):
        assert_value(value, params, **strengths, group=group)


@EVERY_GROUP
@EVERY_END
def test_reports(scale, strengths, group, device):
    params = [nn.Parameter(p) for p in weights(scale, device)]
    group = group if "l2_norm" in strengths else "tensor"
    *rows, total = Regularizer(params, **strengths, group=group).report().rows[1:]
    for p, row in zip([*params, params], [*rows, total], strict=True):
        some = [p] if isinstance(p, nn.Parameter) else p
        exact = exact_penalty(some, **strengths, group=group)
        assert abs(Fraction(row["value"]) - exact) <= Fraction(2, 10**14) * exact + Fraction(1, 2**1070)
        squares = exact_penalty(some, l2=1.0) / Fraction(scale) ** 2
        assert row["norm"] == pytest.approx(math.sqrt(squares) * scale, rel=1e-14, abs=1e-320)


# The size of the weights, and the strength.
NORMS = [(1e200, 0.7), (1e-200, 0.7), (1e307, 1e-200), (1e307, 1e-307), (1e-306, 0.7), (2.3e-307, 1e290), (1, 1e-307)]


def all_gradients(w, group, strength) -> list[torch.Tensor]:
    (leaf,) = leaves([w])
    value = fused_penalty(leaf, l2_norm=strength, group=group)
    accumulate_grad_(leaf, l2_norm=strength, group=group)
    given = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    return [
        leaf.grad,
        value_and_grad(w, l2_norm=strength, group=group)[1][0],
        *torch.autograd.grad(value, leaf, retain_graph=True),
        *torch.autograd.grad(value, leaf, create_graph=True),
        torch.autograd.grad(fused_penalty(leaf, l2_norm=given, group=group), leaf)[0],
        torch.func.grad(lambda x: fused_penalty(x, l2_norm=strength, group=group))(w),
    ]


@EVERY_GROUP
@pytest.mark.parametrize(
    ("dtype", "scale", "strength"),
    [(torch.float64, *pair) for pair in NORMS] + [(torch.float32, 3e38, 1e-20), (torch.float32, 1e-36, 1e30)],
)
def test_directions(dtype, scale, strength, group, device):
    """``l2_norm * w / ||w||``, to the rounding of the parameter's dtype."""
    w = (scale * draw((5, 40), torch.float64, device).clamp(-1, 1)).to(dtype)
    exact = exact_gradient(w, group, 0.0, 0.0, strength)[0]
    for grad in all_gradients(w, group, strength):
        eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        error = (grad.detach().cpu().double() - exact).abs()
        assert (error <= 4 * eps * exact.abs() + 2 * eps * smallest).all(), error.max()


@EVERY_GROUP
def test_a_norm_that_has_no_reciprocal(group, device):
    w = torch.tensor([[1e-308, 0.0], [0.0, 0.0]], dtype=torch.float64, device=device)
    for grad in all_gradients(w, group, 2.0):
        assert grad.tolist() == [[pytest.approx(2.0, rel=1e-15), 0.0], [0.0, 0.0]]


@EVERY_GROUP
@pytest.mark.parametrize(("size", "strength"), [(1e-290, 1e-10), (1e290, 1e300)])
def test_curvature(size, strength, group, device):
    """The second derivative is as large as strength / norm."""
    w, v = (draw((4, 30), torch.float64, device, seed=seed).clamp(-1, 1) for seed in (0, 1))
    products = []
    for scale, s in ((size, strength), (1.0, 1.0)):
        (leaf,) = leaves([scale * w])
        (grad,) = torch.autograd.grad(fused_penalty(leaf, l2_norm=s, group=group), leaf, create_graph=True)
        products.append(torch.autograd.grad(grad, leaf, v)[0] / (s / scale))
    torch.testing.assert_close(*products, rtol=1e-12, atol=1e-13)


def test_gradients_of_strengths(device):
    """The sums themselves, also where they are below the normal range."""
    for scale in (1e-160, 1e-155, 1e-100, 1e150):
        params = weights(scale, device)
        given = trained({"l1": 1e-3, "l2": 1e-3, "l2_norm": 1e-3})
        fused_penalty(params, **given).backward()
        for kind, strength in given.items():
            exact = float(exact_penalty(params, **{kind: 1.0}))
            assert strength.grad.item() == pytest.approx(exact, rel=1e-14, abs=5e-323)
    params = weights(1e-160, device)
    for p, (_, squares, *_) in zip(params, _ops.sums(params, False, *numbers()).tolist(), strict=True):
        assert squares == pytest.approx(float(exact_penalty([p], l2=1.0)), rel=0, abs=5e-324)


def test_a_term_that_is_absent_does_not_overflow_in_second_derivatives(device):
    """Of a function of the penalty, in weights of which twice the element is infinite."""
    for dtype, large, l1 in ((torch.float16, 4e4, 1e-3), (torch.float64, 1.2e308, 1e-200)):
        w = torch.tensor([large, -large, 0.25], dtype=dtype, device=device, requires_grad=True)
        upstream = torch.tensor(
            3.0, dtype=w.dtype if dtype is torch.float64 else None, device=device, requires_grad=True
        )
        (grad,) = torch.autograd.grad(fused_penalty(w, l1=l1), w, upstream, create_graph=True)
        (slope,) = torch.autograd.grad(grad, upstream, torch.ones_like(grad))
        assert slope.item() == pytest.approx(l1)


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1.0, 1e200, 1.2e308])
def test_hypot(size):
    """The norm of norms, down the columns; beside columns of another size."""
    norms = torch.tensor([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]], dtype=torch.float64) / 4
    norms[:, 0] = (norms[:, 0] * size).clamp(min=5e-324)
    first, *others = hypot(norms).tolist()
    assert first == pytest.approx(math.hypot(*norms[:, 0].tolist()), rel=1e-15)
    assert others == [pytest.approx(0.125, rel=1e-15), 0.0]
    for special in (math.inf, math.nan):
        x = hypot(torch.tensor([[1.0], [special]], dtype=torch.float64)).item()
        assert x == special or (math.isnan(special) and math.isnan(x))
