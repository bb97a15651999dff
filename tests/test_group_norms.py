"""The value with ``l2_norm``: sums of unsquared norms, of whole tensors and of rows, one rounding away from the truth.

Its gradient is in test_group_norms_gradient.py.
"""

import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import assert_near, assert_same_bits, assert_value, exact_norms, exact_penalty
from samples import (
    CHUNK,
    CONTENTS,
    DTYPES,
    HALF_DTYPES,
    LAYOUTS,
    SHAPES,
    SIZES,
    draw,
    draw_list,
    leaves,
    mixed_list,
)

from fused_reg import fused_penalty, reference, value_and_grad

EVERY_GROUP = pytest.mark.parametrize("group", ["tensor", "row"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)

_DOUBLES = np.random.default_rng(8).uniform(0, 2, len(SHAPES)).tolist()
NORM_STRENGTHS = {
    "norm": {"l2_norm": 0.0123456789},
    "l1 and norm": {"l1": 0.1, "l2_norm": 1 / 3},
    "l2 and norm": {"l2": 0.1, "l2_norm": 1 / 3},
    "all": {"l1": 0.1, "l2": 1 / 3, "l2_norm": 0.7},
    "int": {"l2_norm": 2},
    "per parameter, some zero": {
        "l1": [x * (i % 2) for i, x in enumerate(_DOUBLES)],
        "l2": 0.01,
        "l2_norm": [x * (i % 3 > 0) for i, x in enumerate(_DOUBLES)],
    },
    "tiny and large": {"l1": 12345.678, "l2_norm": 1e-30},
}
EVERY_STRENGTHS = pytest.mark.parametrize("strengths", NORM_STRENGTHS.values(), ids=NORM_STRENGTHS)


def all_values(params, group, **strengths) -> list[torch.Tensor]:
    """The value by every way to it: alone, with norms for a backward, with gradients, and for trained strengths."""
    trained = {k: torch.tensor(s, dtype=torch.float64, requires_grad=True) for k, s in strengths.items()}
    return [
        fused_penalty([p.detach() for p in params], **strengths, group=group),
        fused_penalty(leaves(params), **strengths, group=group).detach(),
        value_and_grad(params, **strengths, group=group)[0],
        fused_penalty(leaves(params), **trained, group=group).detach(),
    ]


def assert_all_values(params, group, **strengths) -> None:
    values = all_values(params, group, **strengths)
    assert_value(values[0], params, **strengths, group=group)
    assert_same_bits(values[1:], values[:1] * 3)


@EVERY_GROUP
@EVERY_STRENGTHS
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_list(dtype, strengths, group, device):
    """``None`` is all dtypes in turn (hard case 18)."""
    assert_all_values(mixed_list(device) if dtype is None else draw_list(dtype, device), group, **strengths)


@EVERY_DTYPE
def test_is_the_loop_of_norms(dtype, device):
    """``l2 * sum(torch.norm(p) for p in params)``, which people write."""
    params = [p for p in draw_list(torch.float64, device) if p.numel()]
    loop = 0.3 * sum(torch.norm(p) for p in params)
    torch.testing.assert_close(fused_penalty(params, l2_norm=0.3), loop, rtol=1e-14, atol=0)
    params = [p.to(dtype) for p in params]
    rows = sum(torch.linalg.vector_norm(p.double().reshape(len(p) if p.ndim else 1, -1), dim=1).sum() for p in params)
    value = fused_penalty(params, l2_norm=1.0, group="row")
    torch.testing.assert_close(value.double(), rows, rtol=1e-7, atol=0)


def test_small_examples(device):
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [5.0, -12.0]], device=device)
    assert fused_penalty(w, l2_norm=1.0, group="row") == 18
    assert fused_penalty(w[0], l2_norm=2.0) == 10
    assert fused_penalty(w[0], l2_norm=1.0, group="row") == 7  # rows of one element: their absolute values
    assert fused_penalty(w[0, 1], l2_norm=1.0, group="row") == 4
    assert fused_penalty([w[0], w[2]], l2_norm=[1.0, 0.5]) == 11.5
    assert fused_penalty(w.reshape(3, 2, 1, 1), l1=0.5, l2=0.25, l2_norm=1.0, group="row") == 12 + 48.5 + 18


@EVERY_DTYPE
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, dtype, device):
    """Hard case 5."""
    w = draw(size, dtype, device)
    for group in ("tensor", "row"):
        assert_all_values([w], group, l1=0.3, l2=0.2, l2_norm=0.7)
        assert_value(fused_penalty(w, l2_norm=0.7, group=group), [w], l2_norm=0.7, group=group)


@EVERY_DTYPE
def test_every_small_size(dtype, device):
    """Hard case 5: every tail of a group; rows that begin anywhere."""
    whole = draw(5 * 140, dtype, device)
    for n in range(1, 140):
        w = whole[: 5 * n].view(5, n)
        assert_value(fused_penalty(w, l2_norm=0.7, group="row"), [w], l2_norm=0.7, group="row")
        assert_value(fused_penalty(w, l2_norm=0.7), [w], l2_norm=0.7)


@EVERY_DTYPE
@pytest.mark.parametrize(
    "row", [1, 2, 63, 64, 65, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK + 7]
)
@pytest.mark.parametrize("rows", [1, 2, 17])
def test_row_sizes(rows, row, dtype, device):
    """Rows much shorter than a chunk, of one, and of several; with other tensors around."""
    params = [draw((3, 5), dtype, device), draw((rows, row), dtype, device, seed=2), draw((2, 1100), dtype, device)]
    assert_all_values(params, "row", l1=0.1, l2_norm=[0.7, 0.3, 0.2])


@EVERY_DTYPE
def test_many_short_rows(dtype, device):
    """More groups than chunks or threads."""
    for shape in ((100_000, 1), (40_000, 3), (1, 50_000), (7, 11, 13)):
        w = draw(shape, dtype, device)
        assert_value(fused_penalty(w, l2_norm=0.7, group="row"), [w], l2_norm=0.7, group="row")


@EVERY_GROUP
def test_ten_thousand_tensors(group, device):
    """Hard cases 4, 6."""
    params = list(draw(20_000, torch.float32, device).split([i % 5 for i in range(10_000)]))
    params[4_999] = draw((300, 1000), torch.float32, device)
    l2_norm = np.random.default_rng(0).random(10_000).tolist()
    assert_all_values(params, group, l1=0.5, l2_norm=l2_norm)


@EVERY_GROUP
@pytest.mark.parametrize(
    ("dtype", "content", "l1"),
    [
        pytest.param(dtype, content, l1, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, dtypes, content, l1, _ in CONTENTS
        for dtype in dtypes
    ],
)
def test_adversarial_content(dtype, content, l1, group, device):
    """Hard case 23: where plain sums of squares lose digits, overflow or vanish. Norms are as large as elements."""
    for n in (5, 50_000):
        w = content(n).to(device, dtype).view(5, -1)
        for params in ([w], [w, w[:3]]):
            assert_all_values(params, group, l2_norm=l1)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e150, 1e-150, 1e-170, 1.7e308, 1e-310, 5e-323])
@pytest.mark.parametrize("shape", [(1, 7), (40, 25), (3, 20_000)])
@EVERY_GROUP
def test_float64_range(group, shape, scale, device):
    """Squares overflow or vanish; the norm does not. Where the norm itself does, the penalty may still fit."""
    w = scale * draw(shape, torch.float64, device).clamp(-1, 1)
    strengths = (1e-5, 2.0**-30, 3.7 if scale < 1e300 else 1e-300, 1e300 if scale < 1 else 1e-308)
    for l2_norm in (x for x in strengths if x * scale > 1e-300):
        assert_all_values([w], group, l2_norm=l2_norm)
        assert_all_values([draw(7, device=device), w, draw(3, device=device)], group, l2_norm=[0.0, l2_norm, 0.0])


@EVERY_GROUP
def test_float64_many_small_squares(group, device):
    """Each w^2 is subnormal or 0, and the norm is exact all the same."""
    for value in (1.0437e-156, 1e-163, 1e-300, 5e-324):
        w = torch.full((2, 50_000), value, dtype=torch.float64, device=device)
        assert_all_values([w], group, l2_norm=1e20)
        w[0] *= 3
        assert_all_values([w], group, l2_norm=1e20)


@pytest.mark.xfail(reason="a group's penalty below 2e-308 has lost digits before it is summed")
def test_float64_many_small_groups(device):
    """Each row's penalty is subnormal, their sum is not."""
    w = torch.full((100_000, 2), 1.0437e-312, dtype=torch.float64, device=device)
    assert_value(fused_penalty(w, l2_norm=1.0, group="row"), [w], l2_norm=1.0, group="row")


@EVERY_GROUP
def test_float64_of_every_magnitude_at_once(group, device):
    """Chunks, rows and tensors that each need another scale, in one list, in one group."""
    exponents = torch.tensor([-1000, 0, 900, -600, 500, 1000, -1000, 40], dtype=torch.float64, device=device)
    w = draw((8, 3 * CHUNK), torch.float64, device) * torch.exp2(exponents)[:, None]
    assert_all_values([w], group, l2_norm=1e-5)
    assert_all_values([w[:1], w[2:3], w[3:4], w[0]], group, l2_norm=[1e250, 1e-250, 1e100, 0.5])
    assert_all_values([w.t().contiguous()[:500]], group, l2_norm=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_GROUP
def test_float32_range(group, dtype, device):
    """Hard case 23: squares of 1e20 and of subnormals."""
    for scale, l2_norm in ((1e20, 3.0), (3e38, 1e-3), (1e-40, 1e5), (1e-45, 1e10), (1e-30, 1.0)):
        w = (scale * draw((5, 400), torch.float64, device).clamp(-1, 1)).to(dtype)
        assert_all_values([w], group, l2_norm=l2_norm)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_does_not_overflow(dtype, device):
    w = 60_000 * draw((5, 40_000), dtype, device).sign() + draw((5, 40_000), dtype, device, seed=1)
    for group in ("tensor", "row"):
        assert_all_values([w], group, l2_norm=1.0)


@pytest.mark.parametrize(("shape", "count"), [((16_384,), 1), ((1000, 20_000), 1), ((1,), 100_000), ((100_000, 4), 1)])
@EVERY_GROUP
def test_float64_roundings_do_not_add_up(group, shape, count, device):
    """Equal summands, whose roundings all point the same way: within a group, over groups, over tensors."""
    w = torch.full(shape, 0.1, dtype=torch.float64, device=device)
    rows = shape[0] if group == "row" else 1
    elements = w.numel() // rows
    root = Fraction(math.isqrt(elements * 10**60)) / 10**30 * Fraction(0.1)
    for l2_norm in (1.0, 0.3, 0.7):
        value = fused_penalty([w] * count, l2_norm=l2_norm, group=group)
        assert_near(value, count * rows * Fraction(l2_norm) * root)


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_DTYPE
@EVERY_GROUP
def test_layouts(group, dtype, layout, device):
    """Hard cases 10, 11: rows are slices along dimension 0, whatever the memory looks like."""
    w = LAYOUTS[layout][1](dtype=dtype, device=device)
    for params in ([w], [draw((5, 2), dtype, device), w, draw(3, dtype, device, seed=1)]):
        assert_all_values(params, group, l1=0.1, l2_norm=0.3)


@EVERY_DTYPE
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@EVERY_GROUP
def test_nan_and_infinity_propagate(group, special, dtype, device):
    """Hard case 23."""
    for shape in ((1, 1), (4, 5), (2, 20_000)):
        for at in {0, shape[0] * shape[1] // 2, shape[0] * shape[1] - 1}:
            w = draw(shape, dtype, device)
            w.view(-1)[at] = special
            for strengths in ({"l2_norm": 0.5}, {"l1": 0.25, "l2": 0.125, "l2_norm": 0.5}):
                for value in all_values([draw(3, dtype, device), w], group, **strengths):
                    assert value.isnan() if math.isnan(special) else value == math.inf


@pytest.mark.parametrize("special", [math.nan, math.inf])
@EVERY_GROUP
def test_strength_zero_drops_the_term(group, special, device):
    w = torch.tensor([1.0, special], device=device)
    one = torch.ones(2, 1, device=device)
    for zero in (0.0, torch.tensor(0.0, device=device)):
        for value in (fused_penalty(w, l2_norm=zero, group=group), value_and_grad(w, l2_norm=zero, group=group)[0]):
            assert value == 0
        assert fused_penalty([one], l1=0.5, l2_norm=zero, group=group) == 1
    for each in ([0.0, 0.5], torch.tensor([0.0, 0.5], device=device)):
        assert fused_penalty([w, one[0]], l2_norm=each, group=group) == 0.5


@EVERY_GROUP
def test_zeros_and_empty_tensors(group, device):
    """Hard cases 1, 4, 24."""
    assert fused_penalty([], l2_norm=0.5, group=group) == 0
    assert value_and_grad(iter(()), l2_norm=[], group=group)[1] == ()
    empty = [torch.empty(shape, device=device) for shape in ((0,), (0, 4), (3, 0), (2, 0, 5))]
    for params in (empty, empty[:1], [*empty, torch.zeros(3, 2, device=device)]):
        for value in all_values(params, group, l1=0.25, l2_norm=0.5):
            assert value == 0
    w = draw((3, 4), device=device)
    assert_same_bits(
        [fused_penalty([empty[0], w, empty[2]], l2_norm=0.5, group=group)], [fused_penalty(w, l2_norm=0.5, group=group)]
    )


@EVERY_GROUP
def test_generators_and_other_lists(group, device):
    """Hard case 2."""
    params = draw_list(torch.float32, device)
    expected = fused_penalty(params, l1=0.1, l2_norm=0.3, group=group)
    for kind in (iter, tuple, lambda ps: (p for p in ps), lambda ps: dict(enumerate(ps)).values()):
        assert_same_bits([fused_penalty(kind(params), l1=0.1, l2_norm=0.3, group=group)], [expected])
    module = torch.nn.ParameterList(params)
    assert_same_bits([fused_penalty(module, l1=0.1, l2_norm=0.3, group=group).detach()], [expected])


@EVERY_GROUP
def test_same_tensor_twice_and_overlapping_views(group, device):
    """Hard cases 8, 9: counted as often as they are there."""
    w = draw((20, 30), device=device)
    assert_all_values([w, w, w[3:15], w.t()], group, l2_norm=[0.1, 0.2, 0.3, 0.4])


@EVERY_GROUP
def test_tensor_strengths(group, device):
    """Hard case 26."""
    params = mixed_list(device)
    each = [0.125 * (i % 5) for i in range(len(params))]
    expected = fused_penalty(params, l1=0.5, l2_norm=each, group=group)
    for place in {torch.device("cpu"), device}:
        for dtype in DTYPES:
            tensor = torch.tensor(each, dtype=dtype, device=place)
            assert_same_bits([fused_penalty(params, l1=0.5, l2_norm=tensor, group=group)], [expected])
        parts = list(torch.tensor(each, device=place))
        assert_same_bits([fused_penalty(params, l1=0.5, l2_norm=parts, group=group)], [expected])


@EVERY_DTYPE
@EVERY_GROUP
def test_agrees_with_the_shipped_reference(group, dtype, device):
    """And the reference with the oracle, which does not know it."""
    params = draw_list(dtype, device)
    strengths = NORM_STRENGTHS["per parameter, some zero"]
    assert_value(reference.fused_penalty(params, **strengths, group=group), params, **strengths, group=group)
    assert_value(fused_penalty(params, **strengths, group=group), params, **strengths, group=group)


def test_wrong_group():
    for group in ("rows", None, 0, "", ["row"], "block", ("row", 0), ("row", True), ("tensor", 2), ("row",)):
        known = '"tensor", "row", "column", or a pair of "row", "column" or "block" and n >= 1'
        text = f"fused_penalty: group must be {known}, got {group!r}"
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            fused_penalty([torch.ones(3)], l2_norm=0.1, group=group)


def test_oracle_knows_norms():
    """What this file rests on."""
    w = torch.tensor([[3e200, 4e200], [5e-324, 0.0]], dtype=torch.float64)
    assert abs(exact_norms(w, "tensor") / Fraction(5e200) - 1) < Fraction(1, 10**15)
    assert abs(exact_norms(w, "row") / Fraction(5e200) - 1) < Fraction(1, 10**15)
    assert exact_norms(w[1:], "row") == Fraction(5e-324)
    assert exact_penalty([torch.ones(4)], l1=1.0, l2=2.0, l2_norm=0.5, group="row") == 14
    assert exact_penalty([torch.ones(4)], l2_norm=0.5) == 1
