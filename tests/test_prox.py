"""The proximal step by what defines it: zero is a subgradient of ``1/2 ||x - w||^2 + step * penalty(x)`` at the answer.

No formula of the answer is used here. The tests of its memory, and of wrong input, are in test_prox_memory.py.
"""

import itertools
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, per_parameter
from samples import CHUNK, DTYPES, FULL_DTYPES, SHAPES, draw, draw_list, mixed_list

from fused_reg import prox_, reference

EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}
SMALLEST = {dtype: torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in DTYPES}

NAMES = ("l1", "l2", "l2_norm")
TERMS = [terms for count in range(4) for terms in itertools.combinations(NAMES, count)]
VALUES = {"l1": 0.4, "l2": 0.3, "l2_norm": 1.1}
EVERY_TERMS = pytest.mark.parametrize("terms", TERMS, ids="+".join)
EVERY_GROUP = pytest.mark.parametrize("group", ["tensor", "row"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


def rows_of(t: torch.Tensor, group: str) -> torch.Tensor:
    """[groups, elements of each] float64."""
    rows = len(t) if group == "row" and t.ndim > 0 else 1
    return t.detach().cpu().double().reshape(rows, t.numel() // max(rows, 1))


def assert_optimal(x, w, l1, l2, l2_norm, step, group, dtype=None) -> None:
    """Zero lies in ``x - w + step * (l1 * d|x| + 2 * l2 * x + l2_norm * d||x_g||)``, up to the rounding of x and of a
    few operations in its dtype.
    """
    assert (x.dtype, x.shape) == (w.dtype, w.shape)
    if x.numel() == 0:
        return
    dtype = dtype or x.dtype
    x, w = rows_of(x, group), rows_of(w, group)
    norm = x.norm(dim=1, keepdim=True)
    is_zero_group = norm == 0
    ball = step * l2_norm
    # A subgradient of the norm: x / ||x||; at a zero group any vector of the unit ball (below).
    direction = x / torch.where(is_zero_group, 1, norm)
    rest = w - x - step * 2 * l2 * x - ball * direction  # must be step * l1 * (a subgradient of |x|)
    interval = (rest.abs() - step * l1).clamp(min=0)
    distance = torch.where(x == 0, interval, (rest - step * l1 * x.sign()).abs())
    rounding = 4 * EPS[dtype] * (w.abs() + step * l1 + ball * direction.abs() + 2 * step * l2 * x.abs())
    tiny = SMALLEST[dtype] * (1 + 2 * step * l2 + ball / torch.where(is_zero_group, 1, norm))
    assert (distance <= rounding + tiny)[~is_zero_group.expand_as(x)].all()
    # A zero group: what the interval of l1 leaves over fits the ball of l2_norm.
    excess = interval.norm(dim=1, keepdim=True) - ball
    allowed = rounding.norm(dim=1, keepdim=True) + 4 * EPS[dtype] * ball + tiny * math.sqrt(x.shape[1])
    assert (excess <= allowed)[is_zero_group].all()


def stepped(params, *, group="tensor", **arguments) -> list[torch.Tensor]:
    """What prox_ makes of copies."""
    copies = [p.clone() for p in params]
    arguments |= {"group": group} if "l2_norm" in arguments else {}
    assert prox_(copies, **arguments) is None
    return copies


def assert_all_optimal(answers, params, step, group="tensor", **strengths) -> None:
    if not strengths:
        strengths = {"l2": 1.0}
    columns = [per_parameter(s, len(params)) for s in (*(strengths.get(name) for name in NAMES), step)]
    for x, w, l1, l2, l2_norm, eta in zip(answers, params, *columns, strict=True):
        assert_optimal(x, w, l1, l2, l2_norm, eta, group)


@EVERY_TERMS
@EVERY_GROUP
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("step", [0.05, 0.9, 3.0])
def test_optimal(step, dtype, group, terms, device):
    """Every combination of terms, on the small model's list; ``None`` is all dtypes in turn."""
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    strengths = {name: VALUES[name] for name in terms}
    answers = stepped(params, **strengths, group=group, step=step)
    assert_all_optimal(answers, params, step, group, **strengths)
    zeros, of_before = (sum(int((t == 0).sum()) for t in ts) for ts in (answers, params))
    thresholds = "l1" in terms or ("l2_norm" in terms and (group == "row" or step > 0.1))
    assert zeros > of_before if thresholds else zeros == of_before


@EVERY_GROUP
@EVERY_DTYPE
def test_random_problems(dtype, group, device):
    """Scales, strengths and steps over many powers of ten, one of each per parameter."""
    rng = np.random.default_rng(3)
    largest = 3 if dtype == torch.float16 else 8
    for seed in range(15):
        shapes = [(), (1,), (40,), (3, 50), (30, 5), (2, 3, 4), (0, 3)]
        scales = 10.0 ** rng.uniform(-2, largest - 1, len(shapes))
        params = [
            (float(scale) * draw(shape, torch.float64, device, seed)).to(dtype)
            for scale, shape in zip(scales, shapes, strict=True)
        ]
        step = 10.0 ** rng.uniform(-4, 2, len(shapes))
        strengths = {
            "l1": (scales / step * 10.0 ** rng.uniform(-2, 1, len(shapes))).tolist(),
            "l2": (10.0 ** rng.uniform(-4, 1, len(shapes)) / step).tolist(),
            "l2_norm": (scales / step * 10.0 ** rng.uniform(-2, 1, len(shapes))).tolist(),
        }
        for name in (*NAMES, ""):
            given = {k: [x * (k != name) for x in v] for k, v in strengths.items()}
            answers = stepped(params, **given, group=group, step=step.tolist())
            assert_all_optimal(answers, params, step.tolist(), group, **given)


@EVERY_GROUP
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(CHUNK - 1,), (2 * CHUNK + 1,), (1000, 17), (3, CHUNK + 5), (40, 1024), (5000, 1)])
def test_sizes(shape, dtype, group, device):
    """Groups of one element, of one chunk and of several."""
    w = draw(shape, dtype, device)
    l2_norm = 0.5 * math.sqrt(w.numel() / (shape[0] if group == "row" else 1))  # near the norm: some rows vanish
    (x,) = stepped([w], l1=0.1, l2=0.2, l2_norm=l2_norm, group=group, step=1.5)
    assert_optimal(x, w, 0.1, 0.2, l2_norm, 1.5, group)


@EVERY_GROUP
def test_tensor_strengths_and_steps(group, device):
    """Hard case 26: 0-dim and 1-D, of any dtype, on the CPU or with the parameters: as the floats they hold."""
    params = mixed_list(device)
    count = len(params)
    each = {name: [0.125 * (i % 5) * (1 + (name == "l2_norm")) for i in range(count)] for name in (*NAMES, "step")}
    expected = stepped(params, group=group, **each)
    for place in {torch.device("cpu"), device}:
        for dtype in DTYPES:
            tensors = {k: torch.tensor(v, dtype=dtype, device=place) for k, v in each.items()}
            assert_same_bits(stepped(params, group=group, **tensors), expected)
        unbound = {k: list(torch.tensor(v, device=place)) for k, v in each.items()}
        assert_same_bits(stepped(params, group=group, **unbound), expected)
        one = {k: torch.tensor(0.75, device=place) for k in each}
        same = stepped(params, group=group, l1=0.75, l2=0.75, l2_norm=0.75, step=0.75)
        assert_same_bits(stepped(params, group=group, **one), same)
        assert_same_bits(stepped(params, group=group, **{**one, "l1": 0.75, "step": [0.75] * count}), same)
    trained = torch.tensor(0.75, requires_grad=True, device=device)
    assert_same_bits(stepped(params, group=group, l1=trained, l2=0.75, l2_norm=0.75, step=trained), same)
    numpy = {k: np.array(v) for k, v in each.items()}
    assert_same_bits(stepped(params, group=group, **numpy), expected)


@EVERY_DTYPE
@EVERY_GROUP
def test_agrees_with_the_shipped_reference(group, dtype, device):
    """Which computes in float64: apart by a few roundings, and on the same side of every threshold."""
    params = draw_list(dtype, device)
    each = {name: [0.1 * (i % 4) for i in range(len(params))] for name in NAMES}
    answers, expected = stepped(params, **each, group=group, step=0.9), [p.clone() for p in params]
    reference.prox_(expected, **each, group=group, step=0.9)
    for x, e, w in zip(answers, expected, params, strict=True):
        error = (x.double() - e.double()).abs()
        assert (error <= 4 * EPS[dtype] * (w.double().abs() + 1)).all()
        assert torch.equal(x == 0, e == 0)


@EVERY_DTYPE
def test_exact_zeros(dtype, device):
    """All that the threshold reaches, the threshold itself included; and nothing above it."""
    w = torch.tensor([0.5, -0.5, 0.25, -0.75, 1.0, -1.5, 0.0], dtype=dtype, device=device)
    (x,) = stepped([w], l1=1.0, step=0.5)
    assert x.tolist() == [0, 0, 0, -0.25, 0.5, -1.0, 0]
    (x,) = stepped([w], l1=2.0, l2=0.5, step=0.25)
    assert x.tolist()[:3] == [0, 0, 0]
    above = torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.tensor(1.0, dtype=dtype)).to(device)
    (x,) = stepped([above], l1=1.0, step=0.5)
    assert x > 0


@EVERY_DTYPE
def test_whole_groups_are_exactly_zero(dtype, device):
    rows = torch.tensor([[3.0, 4.0], [0.5, 0.0], [-3.0, 4.0], [0.25, -0.25], [0.0, 0.0]], dtype=dtype, device=device)
    (x,) = stepped([rows], l2_norm=5.0, group="row", step=0.5)
    assert x.tolist() == [[1.5, 2.0], [0, 0], [-1.5, 2.0], [0, 0], [0, 0]]
    (x,) = stepped([rows], l2_norm=10.0, group="row", step=0.5)  # the norm itself
    assert not x.any()
    whole = torch.tensor([3.0, 4.0], dtype=dtype, device=device)
    small = torch.tensor([0.5, 1.0], dtype=dtype, device=device)
    assert [x.tolist() for x in stepped([whole, small], l2_norm=2.5, step=1.0)] == [[1.5, 2.0], [0, 0]]


@EVERY_DTYPE
@EVERY_GROUP
def test_zeros_stay_zeros_without_a_sign(group, dtype, device):
    w = torch.tensor([[0.0, -0.0, 0.5], [-0.0, 0.0, -0.0]], dtype=dtype, device=device)
    for terms in TERMS[1:]:
        (x,) = stepped([w], **dict.fromkeys(terms, 0.1), group=group, step=0.5)
        assert (x[w == 0] == 0).all()
        assert x[0, 2] > 0
    (x,) = stepped([w], l1=10.0, group=group, step=0.5)
    assert not x.any()
    assert not x.signbit().any()


@EVERY_DTYPE
@EVERY_GROUP
@EVERY_TERMS
def test_step_zero_and_strength_zero(terms, group, dtype, device):
    """The proximal operator of 0 is the identity; of a whole list and of some parameters in it."""
    params = [p + 0.0 for p in draw_list(dtype, device)]  # -0.0 aside
    given = {name: VALUES[name] for name in terms}
    tensor = torch.zeros((), device=device)
    for zero in (0.0, tensor):
        assert_same_bits(stepped(params, **given, group=group, step=zero), params)
        assert_same_bits(stepped(params, **dict.fromkeys(terms or NAMES, zero), group=group, step=0.9), params)
    alternate = [0.9 * (i % 2) for i in range(len(params))]
    once = stepped(params, **given, group=group, step=alternate)
    assert_same_bits(once[::2], params[::2])
    all_stepped = stepped(params, **given, group=group, step=0.9)
    assert_same_bits(once[1::2], all_stepped[1::2])


@EVERY_DTYPE
def test_nan_stays_nan(dtype, device):
    """And under ``l2_norm`` makes its group NaN, as its norm is; no other group."""
    w = torch.tensor([[math.nan, 1.0], [2.0, -0.25]], dtype=dtype, device=device)
    for given in ({"l1": 0.5}, {"l2": 0.5}, {"l1": 0.5, "l2": 0.25}, {}, {"l1": 1e9}):
        (x,) = stepped([w], **given, step=1.0)
        assert x.isnan().tolist() == [[True, False], [False, False]]
    for given in ({"l2_norm": 0.5}, {"l1": 0.5, "l2_norm": 0.25}, {"l1": 1e9, "l2_norm": 1e9}):
        (x,) = stepped([w], **given, group="row", step=1.0)
        assert x.isnan().tolist() == [[True, True], [False, False]]
        x, other = stepped([w, w[1]], **given, step=1.0)
        assert x.isnan().all()
        assert not other.isnan().any()
    (x,) = stepped([w], l1=0.5, l2_norm=0.25, group="row", step=0.0)
    assert x.isnan()[0, 0]


@EVERY_DTYPE
@pytest.mark.parametrize("function", [prox_, reference.prox_])
@pytest.mark.parametrize(
    "given", [{}, {"l1": 0.5}, {"l2": 0.75}, {"l2_norm": 0.5, "group": "row"}, {"l2": 1e300}], ids=str
)
def test_zeros_are_positive(given, function, dtype, device):
    """Those that were there, those at the threshold, and those that the last rounding makes."""
    values = torch.tensor([-0.0, 0.0, -0.5, -0.25, -SMALLEST[dtype], SMALLEST[dtype]], dtype=torch.float64)
    for count in (1, 25):
        w = values.repeat(count).to(device, dtype)[:, None].contiguous()
        function(w, **given, step=1.0)
        assert not (w.signbit() & (w == 0)).any()


@EVERY_DTYPE
@EVERY_GROUP
def test_infinity(group, dtype, device):
    """Stays where it is; beside it, a group's threshold is nothing."""
    w = torch.tensor([[math.inf, 1.0, -0.25], [-math.inf, 2.0, 0.0]], dtype=dtype, device=device)
    for given in ({"l1": 0.5}, {"l1": 0.5, "l2_norm": 0.5}):
        (x,) = stepped([w], **given, group=group, step=1.0)
        assert x.tolist() == [[math.inf, 0.5, 0.0], [-math.inf, 1.5, 0.0]]
    (x,) = stepped([w], l2=0.5, group=group, step=1.0)
    assert x.tolist() == [[math.inf, 0.5, -0.125], [-math.inf, 1.0, 0.0]]


@EVERY_DTYPE
@pytest.mark.parametrize("step", [1.0, 1e10, 1e300])
@pytest.mark.parametrize("strength", [1e6, 1e38, 1e300])
def test_huge_thresholds(strength, step, dtype, device):
    """Beyond the dtype, beyond float32, beyond float64: everything is zero, nothing NaN."""
    w = draw((9, 30), dtype, device)
    assert not stepped([w], l1=strength, step=step)[0].any()
    for group in ("tensor", "row"):
        assert not stepped([w], l2_norm=strength, group=group, step=step)[0].any()
        assert not stepped([w], **dict.fromkeys(NAMES, strength), group=group, step=step)[0].any()
    assert (stepped([w], l2=strength, step=step)[0].abs() <= w.abs() * 1e-6).all()


@pytest.mark.parametrize(
    "step",
    [2.0**1020, 2.0**-1021, 2.0**1023],
)
@pytest.mark.parametrize("term", ["l1", "l2"])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_huge_step_of_a_small_strength(dtype, term, step, device):
    """Only their product counts, in float64: not twice the step, nor the strength in the parameters' dtype."""
    w = draw(50, dtype, device)
    assert_same_bits(stepped([w], **{term: 0.5 / step}, step=step), stepped([w], **{term: 0.5}, step=1.0))


@pytest.mark.parametrize("exponent", [660, -660, 1000, -1000])
@EVERY_GROUP
def test_float64_range(group, exponent, device):
    """Norms whose squares do not fit a double: the answer scales with the problem, to the bit."""
    w, scale = draw((5, 40), torch.float64, device), 2.0**exponent
    expected = stepped([w], l1=0.1, l2_norm=3.0, group=group, step=0.5)
    scaled = stepped([w * scale], l1=0.1 * scale, l2_norm=3.0 * scale, group=group, step=0.5)
    assert_same_bits([x / scale for x in scaled], expected)
    assert 0 < (expected[0] == 0).sum() < 150


@EVERY_GROUP
def test_float64_subnormals(group, device):
    w, smallest = draw((5, 40), torch.float64, device), SMALLEST[torch.float64]
    w = (w * 1000).round() * smallest
    (x,) = stepped([w], l2_norm=3000 * smallest, group=group, step=0.5)
    assert 0 < x.abs().max() < w.abs().max()
    exact = stepped([w / smallest], l2_norm=3000.0, group=group, step=0.5)[0]
    assert ((x / smallest - exact).abs() <= 1).all()


def test_rows_of_a_scalar_and_of_empty_tensors(device):
    """A 0-dim tensor is one row; an empty one has none."""
    shapes = [s for s in SHAPES if math.prod(s) == 0 or s == ()]
    params = draw_list(torch.float32, device, shapes)
    for group in ("tensor", "row"):
        answers = stepped(params, l1=0.1, l2_norm=0.2, group=group, step=1.0)
        assert_all_optimal(answers, params, 1.0, group, l1=0.1, l2_norm=0.2)


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@EVERY_GROUP
def test_thread_counts(group, dtype, device, threads):
    """Hard case 33: the same bits."""
    shapes = ((300_001,), (0,), (17,), (123, 456), (CHUNK,), (700, 77))
    params = mixed_list(device, shapes) if dtype is None else draw_list(dtype, device, shapes)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(stepped(params, l1=0.1, l2=0.3, l2_norm=5.0, group=group, step=0.7))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@EVERY_DTYPE
def test_a_strength_that_is_nan_does_not_make_zeros(dtype, device):
    """A broken strength must not pass for a threshold that everything is below: on a GPU it makes NaN, which the CPU
    refuses."""
    nan = torch.tensor(torch.nan, device=device)
    for given in ({"l1": nan}, {"l2": nan}, {"l2_norm": nan}, {"l1": 0.1, "step": nan}):
        w = draw(40, dtype, device)
        with nullcontext() if w.is_cuda else pytest.raises(ValueError, match="must be finite and >= 0, got nan"):
            prox_(w, **{"step": 0.1} | given)
        assert w.isnan().all() if w.is_cuda else (w != 0).any()
