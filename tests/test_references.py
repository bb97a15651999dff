"""``toward`` and ``importance``: reference weights, and strengths by element, in every function."""

from fractions import Fraction

import pytest
import torch
from capabilities import capabilities, output_with
from oracle import assert_near, assert_same_bits, bits, gradients
from samples import CHUNK, DTYPES, FULL_DTYPES, LAYOUTS, draw, draw_list, first_quick, leaves, mixed_list

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, optim, prox_, reference, value_and_grad

TERMS = {
    "l1": {"l1": 0.3},
    "l2": {"l2": 0.7},
    "l1 and l2": {"l1": 0.1, "l2": 1 / 3},
    "smooth_l1": {"smooth_l1": 0.4, "beta": 0.5},
    "all": {"l1": 0.1, "l2": 0.2, "smooth_l1": 0.3},
}
GIVEN = ("toward", "importance", "both")
EVERY_TERM = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
EVERY_GIVEN = pytest.mark.parametrize("given", GIVEN)


def other(p, seed):
    return draw(p.shape, p.dtype, p.device, seed)


def references(params, given="both"):
    own = {}
    if given != "importance":
        own["toward"] = [other(p, 100 + i) for i, p in enumerate(params)]
    if given != "toward":
        own["importance"] = [other(p, 200 + i).abs() for i, p in enumerate(params)]
    return own


def exact(params, **terms) -> Fraction:
    wide = {k: [x.double() for x in xs] for k, xs in terms.items() if k in ("toward", "importance")}
    return Fraction(reference.fused_penalty([p.double() for p in params], **{**terms, **wide}).item())


def assert_near_reference(actual, expected, params):
    """To some roundings of the compute type: those of the difference, of the products and of their sum."""
    for a, e, p in zip(actual, expected, params, strict=True):
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(a, e.to(a.dtype), rtol=8 * eps, atol=8 * torch.finfo(torch.float32).eps)


@EVERY_TERM
@EVERY_GIVEN
def test_functions_agree_with_the_reference(terms, given, device):
    params = mixed_list(device)
    terms = {**terms, **references(params, given)}
    value, grads = value_and_grad(params, **terms)
    assert_near(value, exact(params, **terms))
    assert_near_reference(grads, reference.value_and_grad(params, **terms)[1], params)
    assert_same_bits(gradients(fused_penalty, params, **terms), grads)
    with torch.no_grad():
        assert_same_bits([fused_penalty(params, **terms)], [value])
    fresh = leaves([p.clone() for p in params])
    assert_same_bits([accumulate_grad_(fresh, **terms), *(p.grad for p in fresh)], [value, *grads])
    assert_near(accumulate_grad_(fresh, scale=2.0, **terms), exact(params, **terms))
    assert_near_reference([p.grad for p in fresh], [3 * g for g in grads], params)
    shrunk, expected = [p.clone() for p in params], [p.clone() for p in params]
    prox_(shrunk, step=0.3, **terms)
    reference.prox_(expected, step=0.3, **terms)
    assert_near_reference(shrunk, expected, params)


@pytest.mark.parametrize("terms", [TERMS["l1"], TERMS["l2"], TERMS["l1 and l2"]])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@EVERY_GIVEN
def test_gradients_have_the_bits_of_the_loop(terms, dtype, given, device):
    """Of that on the CPU, on every device."""
    params, here = draw_list(dtype, device), draw_list(dtype)
    there = {**terms, **references(params, given)}
    terms = {**terms, **references(here, given)}
    assert_same_bits(value_and_grad(params, **there)[1], gradients(reference.loop, here, **terms))
    for upstream in (2.0, 0.37, -1e-30):
        expected = gradients(reference.loop, here, upstream, **terms)
        assert_same_bits(gradients(fused_penalty, params, upstream, **there), expected)


@pytest.mark.parametrize("group", ["tensor", "row", "column"])
def test_norms_are_of_the_differences(group, device):
    params = mixed_list(device)
    terms = {"l1": 0.1, "l2": 0.2, "l2_norm": 0.3, "group": group, **references(params, "toward")}
    value, grads = value_and_grad(params, **terms)
    assert_near(value, exact(params, **terms))
    assert_near_reference(grads, reference.value_and_grad(params, **terms)[1], params)
    assert_same_bits(gradients(fused_penalty, params, **terms), grads)
    shrunk, expected = [p.clone() for p in params], [p.clone() for p in params]
    prox_(shrunk, step=0.5, **terms)
    reference.prox_(expected, step=0.5, **terms)
    assert_near_reference(shrunk, expected, params)


def positive(x):
    """The same view of the magnitudes of its memory, whatever shares that."""
    torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).abs_()
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", first_quick(*DTYPES))
def test_any_layout_of_each(layout, dtype):
    """Of the parameter, of the references, of both."""
    _, make = LAYOUTS[layout]
    p, toward, importance = (make(dtype=dtype, device="cpu", seed=seed) for seed in (1, 2, 3))
    made = p, toward, positive(importance)
    dense = [x.contiguous().clone() for x in made]
    strengths = {"l1": 0.1, "l2": 0.2, "smooth_l1": 0.3}
    _, (grad,) = value_and_grad(dense[0], toward=dense[1], importance=dense[2], **strengths)
    for p, toward, importance in (made, (made[0], *dense[1:]), (dense[0], *made[1:]), (dense[0], made[1], dense[2])):
        given = {**strengths, "toward": [toward], "importance": [importance]}
        value, grads = value_and_grad([p], **given)
        assert_same_bits(grads, [grad])
        assert_near(value, exact([p], **given))
        for group in ("row", "column"):
            norms = {"l1": 0.1, "l2_norm": 0.3, "group": group, "toward": [toward]}
            _, (norms_grad,) = reference.value_and_grad([p], **norms)
            assert_near(value_and_grad([p], **norms)[0], exact([p], **norms))
            assert_near_reference(value_and_grad([p], **norms)[1], [norms_grad], [p])


def test_one_tensor_needs_no_list_and_what_is_given_is_a_constant():
    w, w0, f = (draw(50, seed=i) for i in range(3))
    f = f.abs().requires_grad_()
    w.requires_grad_()
    value = fused_penalty(w, l2=0.5, toward=w0.requires_grad_(), importance=f)
    value.backward()
    assert w0.grad is None
    assert f.grad is None
    assert_same_bits([value], [fused_penalty([w], l2=0.5, toward=[w0], importance=iter([f]))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_proximal_step_ends_exactly_at_the_reference_or_where_it_began(dtype):
    """Where the importance is 0, no bit changes: not those of -0.0 either, but that a zero is +0 afterwards."""
    w, w0 = draw(3000, dtype, seed=1), draw(3000, dtype, seed=2)
    f = torch.ones_like(w)
    f[1::2] = 0
    before = w.clone()
    prox_(w, l1=100.0, step=1.0, toward=w0, importance=f)
    assert bits(w[::2]) == bits(w0[::2] + 0.0)
    assert bits(w[1::2]) == bits(before[1::2] + 0.0)
    w = before.clone()
    prox_(w, l2=10.0, step=0.1, toward=w0, importance=f)
    assert bits(w[1::2]) == bits(before[1::2] + 0.0)
    prox_(w, l2=0.0, l1=0.0, step=0.1, toward=w0)
    assert bits(w[1::2]) == bits(before[1::2] + 0.0)


def test_a_proximal_step_is_the_minimum():
    """Of its definition, by random tries around it."""
    w, w0, f = draw(400, torch.float64), draw(400, torch.float64, seed=1), draw(400, torch.float64, seed=2).abs()
    terms = {"l1": 0.3, "l2": 0.2, "smooth_l1": 0.4, "beta": 0.3, "toward": w0, "importance": f}

    def objective(x):
        return 0.5 * (x - w).square() + 0.5 * torch.stack(
            [reference.fused_penalty(x[i], **{**terms, "toward": w0[i], "importance": f[i]}) for i in range(len(x))]
        )

    x = w.clone()
    prox_(x, step=0.5, **terms)
    best = objective(x)
    for size in (1e-6, 1e-3, 0.1, 1.0):
        for seed in (5, 6):
            assert (objective(x + size * draw(400, torch.float64, seed=seed)) >= best - 1e-14).all()


def test_zero_toward_and_importance_of_one_are_nothing():
    params = mixed_list()
    terms = {"l1": 0.1, "l2": 0.2, "smooth_l1": 0.3}
    nothing = {"toward": [torch.zeros_like(p) for p in params], "importance": [torch.ones_like(p) for p in params]}
    for given in (nothing, {"toward": nothing["toward"]}, {"importance": nothing["importance"]}):
        assert_same_bits(value_and_grad(params, **terms, **given)[1], value_and_grad(params, **terms)[1])
        assert_near(fused_penalty(params, **terms, **given), exact(params, **terms))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_same_bits_with_any_threads(threads):
    params = draw_list(torch.float32, shapes=((300_000,), (64, 3, 3, 3), (211, 300)))
    given = {"l1": 0.1, "l2": 0.2, **references(params)}
    value, grads = value_and_grad(params, **given)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        again, grads_again = value_and_grad(params, **given)
    finally:
        torch.set_num_threads(before)
    assert_same_bits([again, *grads_again], [value, *grads])


_BITS = """
import hashlib, torch
from oracle import bits
from test_references import GIVEN, references, mixed_list
from fused_reg import prox_, value_and_grad
found = hashlib.sha256()
params = mixed_list()
for given in GIVEN:
    terms = dict(l1=0.1, l2=0.2, smooth_l1=0.3, **references(params, given))
    value, grads = value_and_grad(params, **terms)
    shrunk = [p.clone() for p in params]
    prox_(shrunk, step=0.3, **terms)
    for x in (value, *grads, *shrunk):
        found.update(bits(x))
norms = value_and_grad(params, l2_norm=0.1, group="row", **references(params, "toward"))
found.update(bits(norms[0]))
print(found.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    assert len({output_with(asked, _BITS) for asked in capabilities()}) == 1


def test_values_near_the_ends_of_the_range():
    """Sums that a double does not hold, of differences."""
    for size in (1e200, 1e-200):
        w, w0 = size * draw(3000, torch.float64), size * draw(3000, torch.float64, seed=1)
        f = draw(3000, torch.float64, seed=2).abs()
        value = fused_penalty(w, l2=1.0 / size, toward=w0, importance=f)
        expected = (f * ((w - w0) / size).square()).sum() * size
        torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(5, 1, 1), (1, 4, 1), (1, 1, 1), (5, 1, 3)])
@pytest.mark.parametrize("where", ["functions", "optimizer", "regularizer"])
def test_strengths_by_row(shape, where):
    """As those of every element, bit for bit."""
    torch.manual_seed(0)
    w, rows = torch.randn(5, 4, 3), torch.rand(shape)
    found = []
    for importance in (rows, rows.expand(5, 4, 3).clone()):
        p = torch.nn.Parameter(w.clone())
        p.grad = torch.zeros_like(p)
        terms = {"l1": 0.1, "l2": 0.2, "importance": [importance]}
        if where == "functions":
            found.append([accumulate_grad_([p], **terms), p.grad, *value_and_grad([p], **terms)[1]])
            prox_([p], step=0.5, **terms)
        elif where == "optimizer":
            optimizer = optim.SGD([p], lr=0.5, **terms)
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
            found.append([optimizer.penalty])
        else:
            regularizer = Regularizer([p], **terms, save_references=True)
            assert tuple(regularizer.state_dict()["references"]["importance"]["0"].shape) == (5, 4, 3)
            regularizer.load_state_dict(regularizer.state_dict())
            size = regularizer.state_dict()["references"]["importance"]["0"].untyped_storage().nbytes()
            assert size == 4 * importance.numel()
            found.append([regularizer().detach(), regularizer.accumulate_grad_(), p.grad])
        found[-1].append(p.detach())
    assert_same_bits(*found)


def test_strengths_by_row_take_no_memory():
    """Nothing as large as the parameter is allocated on the CPU."""
    p = torch.nn.Parameter(torch.ones(300, 500))
    p.grad = torch.zeros_like(p)
    rows = torch.rand(300, 1)

    def largest(call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        return max([abs(event.cpu_memory_usage) for event in profile.events()], default=0)

    assert largest(lambda: accumulate_grad_([p], l1=0.1, importance=[rows.expand(300, 500).clone()])) >= 4 * p.numel()
    assert largest(lambda: accumulate_grad_([p], l1=0.1, importance=[rows])) < 1e5
    assert largest(lambda: prox_([p], l1=0.1, step=0.1, importance=[rows])) < 1e5


def test_a_negative_strength_of_a_row():
    with pytest.raises(ValueError, match=r"importance\[0\] must be finite and >= 0, got -1.0"):
        fused_penalty(torch.ones(2, 3), l1=0.1, importance=[torch.tensor([[1.0], [-1.0]])])
    with pytest.raises(
        ValueError, match=r"importance\[0\] must have the shape of params\[0\] \(\(2, 3\)\), got \(2,\)"
    ):
        fused_penalty(torch.ones(2, 3), l1=0.1, importance=[torch.ones(2)])
    with pytest.raises(ValueError, match=r"toward\[0\] must have the shape of params\[0\]"):
        fused_penalty(torch.ones(2, 3), l1=0.1, toward=[torch.ones(2, 1)])


w = torch.ones(3)
#: What is given to a call of one parameter of three elements, and what the error says.
WRONG = {
    "count": ({"toward": [w, w]}, ValueError, r"toward must have one tensor per parameter \(1\), got 2"),
    "no tensor": ({"toward": [None]}, TypeError, r"toward\[0\] must be a tensor, got NoneType"),
    "names": (
        {"toward": {"w": w}},
        TypeError,
        "one for each parameter, got dict; a Regularizer takes names",
    ),
    "number": ({"importance": 2.0}, TypeError, "importance must be tensors, one for each parameter, got float"),
    "shape": ({"toward": torch.ones(3, 1)}, ValueError, r"toward\[0\] must have the shape of params\[0\]"),
    "dtype": ({"importance": w.double()}, ValueError, r"importance\[0\] must have the dtype of params\[0\]"),
    "device": ({"importance": w.to("meta")}, ValueError, r"importance\[0\] must have the device of params\[0\]"),
    "sparse": ({"toward": w.to_sparse()}, ValueError, r"toward\[0\] must have the layout of params\[0\]"),
    "negative": ({"importance": -w}, ValueError, r"importance\[0\] must be finite and >= 0, got -1.0"),
    "nan": ({"importance": w * torch.nan}, ValueError, "must be finite and >= 0, got nan"),
    "infinite": ({"importance": w / 0}, ValueError, "must be finite and >= 0, got inf"),
    "norms": ({"importance": w, "l2_norm": 0.1}, ValueError, "importance must come without l2_norm"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("function", [fused_penalty, value_and_grad, accumulate_grad_, prox_])
def test_what_is_wrong_is_said_before_anything_is_written(case, function):
    given, error, said = WRONG[case]
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.ones(3)
    more = {"step": 0.1} if function is prox_ else {}
    with pytest.raises(error, match=f"^{function.__name__}: .*{said}"):
        function([p], l1=0.1, **given, **more)
    assert p.eq(1).all()
    assert p.grad.eq(1).all()


def test_an_importance_is_looked_at_again_when_it_was_written_to():
    w, f = torch.ones(3), torch.ones(3)
    for _ in range(2):
        fused_penalty(w, l2=0.1, importance=f)
        f.sub_(0.25)
    f.sub_(1)
    with pytest.raises(ValueError, match="got -0"):
        fused_penalty(w, l2=0.1, importance=f)


def test_what_is_written_is_not_what_is_read():
    p = torch.ones(8, requires_grad=True)
    with pytest.raises(ValueError, match=r"^fused_penalty: toward\[0\] must not be params\[0\] itself"):
        fused_penalty([p], l2=0.1, toward=[p.detach()])
    p.grad = torch.ones(8)
    with pytest.raises(ValueError, match=r"^accumulate_grad_: toward\[0\] must not share memory with params\[0\].grad"):
        accumulate_grad_([p], l2=0.1, toward=[p.grad])
    memory = torch.ones(12)
    with pytest.raises(ValueError, match=r"^prox_: importance\[0\] must not share memory with params\[0\]"):
        prox_(memory[4:], l2=0.1, step=0.1, importance=memory[:8])
    assert memory.eq(1).all()
    assert p.grad.eq(1).all()


@pytest.mark.parametrize("terms", [TERMS["l1 and l2"], TERMS["all"], {"l2": 0.3, "l2_norm": 0.2, "group": "row"}])
def test_higher_derivatives(terms):
    w, w0, f = (draw((3, 4), torch.float64, seed=seed) for seed in (1, 2, 3))
    w0 += 0.1  # a zero of each is at the same place
    given = {"toward": w0} if "l2_norm" in terms else {"toward": w0, "importance": f.abs() + 0.1}
    w = w.requires_grad_()

    def penalty(x):
        return fused_penalty([x], **terms, **given)

    assert torch.autograd.gradcheck(penalty, w)
    assert torch.autograd.gradgradcheck(penalty, w)
    again = torch.autograd.grad(penalty(w), w, create_graph=True)[0]
    torch.testing.assert_close(again, torch.autograd.grad(penalty(w), w)[0], rtol=1e-14, atol=1e-15)
    plain = w.detach()
    torch.testing.assert_close(torch.func.grad(penalty)(plain), again.detach(), rtol=1e-14, atol=1e-15)
    hessians = [
        torch.func.jacrev(torch.func.jacrev(function))(plain)
        for function in (penalty, lambda x: reference.fused_penalty([x], **terms, **given))
    ]
    torch.testing.assert_close(*hessians, rtol=1e-12, atol=1e-14)


def test_some_of_a_list_have_no_gradient():
    params = draw_list(torch.float64)
    given = {"l1": 0.1, "l2": 0.2, **references(params)}
    trained = [p.clone().requires_grad_(i % 2 == 0) for i, p in enumerate(params)]
    expected = value_and_grad(params, **given)[1]
    for create_graph in (False, True):
        grads = torch.autograd.grad(fused_penalty(trained, **given), trained[::2], create_graph=create_graph)
        for grad, e in zip(grads, expected[::2], strict=True):
            torch.testing.assert_close(grad, e, rtol=1e-14, atol=0)


def test_strengths_that_are_trained_get_what_they_are_factors_of():
    params = draw_list(torch.float64)
    given = references(params)
    l1, l2 = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.3, 0.2))
    value = fused_penalty(params, l1=l1, l2=l2, **given)
    value.backward()
    torch.testing.assert_close(value, reference.fused_penalty(params, 0.3, 0.2, **given), rtol=1e-14, atol=0)
    for strength, terms in ((l1, {"l1": 1.0}), (l2, {"l2": 1.0})):
        torch.testing.assert_close(strength.grad, fused_penalty(params, **terms, **given), rtol=1e-14, atol=0)


def test_a_reference_that_changed_in_between_is_an_error():
    w, w0 = torch.ones(3, requires_grad=True), torch.zeros(3)
    value = fused_penalty(w, l2=0.5, toward=w0)
    w0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_meta_tensors():
    w = torch.ones(3, 4, device="meta")
    value, (grad,) = value_and_grad([w], l2=0.1, toward=[torch.ones_like(w)], importance=[torch.ones_like(w)])
    assert (value.shape, grad.shape, grad.device.type) == ((), (3, 4), "meta")


@pytest.mark.parametrize("x", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_as_in_the_loop(x):
    """Also where the importance is 0."""
    w = torch.tensor([x, x, 1.0, 1.0])
    given = {
        "l1": 0.1,
        "l2": 0.2,
        "toward": torch.tensor([0.5, 0.5, x, 0.5]),
        "importance": torch.tensor([1.0, 0, 2, 3]),
    }
    assert_same_bits(value_and_grad(w, **given)[1], gradients(reference.loop, [w], **given))
    value, expected = fused_penalty(w, **given), reference.fused_penalty(w, **given)
    assert value == expected or (value.isnan() and expected.isnan())


def test_views_that_are_negated():
    w, w0 = torch._neg_view(draw(50)), torch._neg_view(draw(50, seed=1))
    given = {"l1": 0.1, "l2": 0.2}
    expected = value_and_grad(w.resolve_neg(), toward=w0.resolve_neg(), **given)[1]
    assert_same_bits(value_and_grad(w, toward=w0, **given)[1], expected)
    assert_same_bits(value_and_grad(w.resolve_neg(), toward=w0, **given)[1], expected)


@pytest.mark.parametrize("terms", [{"l1": 0.1}, {"l2": 0.3}, {"l2": 0.3, "smooth_l1": 0.1}, {"l1": 0.1, "lower": 0.0}])
def test_a_rate_beyond_the_type_is_nan_whatever_the_terms(terms, device):
    """step * importance, in each kernel."""
    w, importance = torch.full((33,), 0.5, device=device), torch.full((33,), 1e30, device=device)
    importance[1::2] = 1.0
    prox_([w], step=1e38, importance=[importance], **terms)
    assert w[::2].isnan().all()
    assert w[1::2].isfinite().all()


def exactly(params, importance, l1, l2):
    of = zip(
        *(torch.cat([x.detach().double().reshape(-1) for x in xs]).tolist() for xs in (params, importance)), strict=True
    )
    pairs = [(abs(Fraction(w)), Fraction(m)) for w, m in of]
    return sum(m * (Fraction(l1) * w + Fraction(l2) * w * w) for w, m in pairs)


@pytest.mark.parametrize("size", [1, 4, 100, CHUNK, CHUNK + 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "terms", [{"l2": 0.4}, {"l1": 0.1, "l2": 0.4}, {"smooth_l1": 0.5}, {"mcp": 0.5}, {"scad": 0.5}]
)
def test_what_is_masked_has_no_value(terms, dtype, size, device):
    """Also a whole chunk, or all: its sum of 0 says nothing about its weights, which it must not scale."""
    params = [draw(size, dtype, device).requires_grad_(), draw(size, dtype, device, seed=1).requires_grad_()]
    importance = [torch.zeros_like(p) for p in params]
    assert fused_penalty(params, **terms, importance=importance) == 0
    importance[1] = torch.ones_like(params[1])
    expected = fused_penalty(params[1:], **terms)
    value, grads = value_and_grad(params, **terms, importance=importance)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert (grads[0] == 0).all()


@pytest.mark.parametrize("importance", [1e-300, 1e-290, 1e-200, 1e-100, 1.0, 1e100, 1e200, 1e290])
@pytest.mark.parametrize("scale", [1e-200, 1e-160, 1e-100, 1e-20, 1.0, 1e20, 1e100, 1e160, 1e200])
def test_importances_and_weights_of_any_size(scale, importance, device):
    """Neither a square nor a sum of squares may leave the range where the penalty does not."""
    for l1, l2 in ((0.5, 0.0), (0.0, 0.4), (1e-10, 0.4), (0.0, 1e-200), (0.0, 1e200)):
        w = [scale * draw(50, torch.float64, device), torch.full((3,), 1e190, dtype=torch.float64, device=device)]
        m = [importance * draw(50, torch.float64, device, seed=1).abs(), torch.zeros_like(w[1])]
        exact = exactly(w, m, l1, l2)
        if 1e-290 < exact < 1e300:
            w = [torch.cat(w).requires_grad_()]  # in one chunk
            value = fused_penalty(w, l1=l1, l2=l2, importance=[torch.cat(m)])
            assert value.item() == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.parametrize("importance", [1e-300, 1e-280, 1e-10, 1e10, 1e280])
def test_importances_of_any_size_of_other_terms(importance, device):
    w, ones = 3 * draw(1000, torch.float64, device), torch.ones(1000, dtype=torch.float64, device=device)
    for terms in ({"smooth_l1": 0.5}, {"smooth_l1": 0.5, "beta": 1e-3}, {"mcp": 0.5}, {"scad": 0.5}):
        expected = fused_penalty(w.requires_grad_(), **terms).item() * importance
        value = fused_penalty(w, **terms, importance=[importance * ones])
        assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["toward", "importance"])
def test_a_reference_is_not_written(name, device):
    """Another parameter of the call, or its gradient, whole or in part, between others of one matrix or not."""
    of_rows, memory = draw((20, 7), device=device).abs(), draw((300, 2), device=device).abs()
    params = [draw(300, device=device).abs(), of_rows[:, 2], draw(5, device=device).abs()]
    params.append(memory[:, 0])
    for i, other in ((0, params[3]), (3, params[0]), (2, params[0][7:12]), (1, params[3][100:120])):
        own = [p.clone() for p in params]
        own[i] = other
        before = [p.clone() for p in params]
        with pytest.raises(ValueError, match=rf"^prox_: {name}\[{i}\] must not share memory with params\[[03]\]; use"):
            prox_(params, l2=0.1, step=1.0, **{name: own})
        assert_same_bits(params, before)
    own = [p.clone() for p in params]
    own[3] = memory[:, 1]  # beside it
    prox_(params, l2=0.1, step=1.0, **{name: own})
    leaves = [p.clone().requires_grad_() for p in params]
    for p in leaves:
        p.grad = torch.ones_like(p)
    own[2] = leaves[0].grad[:5]
    with pytest.raises(
        ValueError, match=rf"^accumulate_grad_: {name}\[2\] must not share memory with params\[0\].grad"
    ):
        accumulate_grad_(leaves, l2=0.1, **{name: own})
    optimizer = optim.SGD(leaves, lr=0.1, l2=0.1, **{name: [leaves[3].detach(), *own[1:2], own[0][:5], own[3]]})
    with pytest.raises(ValueError, match=rf"{name}\[0\] must not share memory with params\[3\]"):
        optimizer.step()
