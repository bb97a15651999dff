"""``mcp`` and ``scad``: penalties that do not shrink what is large, in everything that takes a term."""

import math
from fractions import Fraction

import pytest
import torch
from oracle import assert_near, assert_same_bits, gradients
from samples import DTYPES, draw, first_quick, leaves, mixed_list
from torch.autograd import gradcheck, gradgradcheck

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, prox_, reference, regularized, value_and_grad

COUNT = len(mixed_list())
#: Each term with its shape, that shape's default, and what it must be above.
SHAPES = {"mcp": ("mcp_gamma", 3.0, 1), "scad": ("scad_a", 3.7, 2)}
EVERY_TERM = pytest.mark.parametrize("term", SHAPES)


def penalty(term, w, strength, shape):
    """By cases, in float64, as in the papers: Zhang 2010, equation 2.1; Fan and Li 2001, equation 2.8 integrated."""
    a = w.abs()
    if term == "mcp":
        return torch.where(a <= shape * strength, strength * a - w**2 / (2 * shape), shape * strength**2 / 2)
    middle = (2 * shape * strength * a - w**2 - strength**2) / (2 * (shape - 1))
    flat = torch.full_like(a, strength**2 * (shape + 1) / 2)
    return torch.where(a <= strength, strength * a, torch.where(a <= shape * strength, middle, flat))


def slope(term, w, strength, shape):
    a = w.abs()
    if term == "mcp":
        return w.sign() * (strength - a / shape).clamp(min=0)
    falling = ((shape * strength - a) / (shape - 1)).clamp(min=0)
    return w.sign() * torch.where(a <= strength, strength, falling)


def given(term, kind):
    """Strengths of some kind."""
    shape = SHAPES[term][0]
    each = torch.linspace(2.5, 4, COUNT).double()
    return {
        "alone": {term: 0.3},
        "with others": {"l1": 0.1, "l2": 0.2, term: 0.3, shape: 2.5},
        "with norms": {term: 0.3, "l2_norm": 0.4, "group": "row"},
        "beside smooth L1": {term: 0.3, "smooth_l1": 0.1, "beta": 0.5},
        "each its own": {term: [0.2 * (i % 4) for i in range(COUNT)], shape: each.tolist()},
        "tensors": {"l2": 0.1, term: torch.tensor(0.3).double(), shape: each},
        "never flat": {term: 0.3, shape: 1e30},
    }[kind]


KINDS = ["alone", "with others", "with norms", "beside smooth L1", "each its own", "tensors", "never flat"]
PROXIMAL = [kind for kind in KINDS if kind not in ("with norms", "beside smooth L1")]


@EVERY_TERM
@pytest.mark.parametrize("strength", [1e-3, 0.3, 2.0])
def test_values_and_gradients_are_those_of_the_papers(term, strength, device):
    params = mixed_list(device)
    name, shape, _ = SHAPES[term]
    for numbers in ({}, {name: 2.5}):
        a = numbers.get(name, shape)
        value, grads = value_and_grad(params, **{term: strength}, **numbers)
        assert_near(value, Fraction(sum(penalty(term, p.double(), strength, a).sum() for p in params).item()))
        for p, grad in zip(params, grads, strict=True):
            expected = slope(term, p.double(), strength, a).to(grad.dtype)
            eps = torch.finfo(grad.dtype).eps
            torch.testing.assert_close(grad, expected, rtol=4 * eps, atol=2 * eps * strength)


@EVERY_TERM
@pytest.mark.parametrize("kind", KINDS)
def test_functions_agree_with_the_reference(term, kind, device):
    params, strengths = mixed_list(device), given(term, kind)
    value, grads = value_and_grad(params, **strengths)
    expected, expected_grads = reference.value_and_grad(params, **strengths)
    assert_near(value, Fraction(reference.fused_penalty([p.double() for p in params], **strengths).item()))
    assert value.dtype == expected.dtype
    for grad, e in zip(grads, expected_grads, strict=True):
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, e, rtol=4 * eps, atol=eps)
    assert_same_bits(gradients(fused_penalty, params, **strengths), grads)
    fresh = leaves([p.clone() for p in params])
    assert_same_bits([accumulate_grad_(fresh, **strengths), *(p.grad for p in fresh)], [value, *grads])


@EVERY_TERM
def test_it_begins_as_l1_and_ends_as_nothing(term, device):
    name, _, _ = SHAPES[term]
    w = draw((997,), torch.float64, device)
    value, (grad,) = value_and_grad(w, **{term: 0.3, name: 1e300})
    assert_same_bits([grad], value_and_grad(w, l1=0.3)[1])
    assert value.item() == pytest.approx(fused_penalty(w, l1=0.3).item(), rel=1e-14)
    large = torch.where(w >= 0, w + 2, w - 2)
    value, (grad,) = value_and_grad(large, **{term: 0.3, name: 4.0})
    flat = {"mcp": 4 * 0.09 / 2, "scad": 5 * 0.09 / 2}[term]
    assert value.item() == pytest.approx(len(w) * flat, rel=1e-14)
    assert not grad.any()
    assert fused_penalty(w, l2=0.1, **{term: 0.0, name: 4.0}) == fused_penalty(w, l2=0.1)


@EVERY_TERM
@pytest.mark.parametrize("step", [0.1, 1.9, 2.5, 3.0, 4.0, 20.0])
@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.2, 0.3)])
def test_a_proximal_step_is_the_minimum(term, step, l1, l2):
    """Also where the penalty bends more than the square beside it, so that there are two local minima: by a look at
    every point of a grid."""
    name, shape, strength = SHAPES[term][0], 3.0, 0.7
    w = torch.linspace(-5.9, 5.9, 79, dtype=torch.float64)
    x, half, relative = w.clone(), w.float(), w + 1
    numbers = {term: strength, name: shape, "l1": l1, "l2": l2}
    prox_(x, **numbers, step=step)

    def cost(x):
        return (x - w) ** 2 / 2 + step * (penalty(term, x, strength, shape) + l1 * x.abs() + l2 * x**2)

    grid = torch.linspace(-6, 6, 4801, dtype=torch.float64)
    assert (cost(x) <= cost(grid[:, None]).amin(0) + 1e-12).all()
    prox_(half, **numbers, step=step)
    torch.testing.assert_close(half.double(), x, rtol=1e-5, atol=1e-6)
    prox_(relative, **numbers, step=step, toward=torch.ones_like(w))  # a step for each element
    torch.testing.assert_close(relative, x + 1, rtol=1e-13, atol=1e-13)


@EVERY_TERM
def test_a_proximal_step_leaves_large_weights_and_makes_small_ones_zero(term):
    _name, shape, _ = SHAPES[term]
    for step in (0.5, shape, 10.0):
        w = torch.tensor([9.0, -9.0, 0.1, -0.1, 0.0, -0.0], dtype=torch.float64)
        prox_(w, **{term: 0.5}, step=step)
        assert_same_bits([w], [torch.tensor([9.0, -9.0, 0, 0, 0, 0], dtype=torch.float64)])
    w = torch.tensor([1.49, 1.51, 2.0], dtype=torch.float64)
    prox_(w, mcp=0.5, mcp_gamma=3.0, step=3.0)  # the threshold is 0.5 * sqrt(3 * 3)
    assert w.tolist() == [0.0, 1.51, 2.0]


@EVERY_TERM
@pytest.mark.parametrize("kind", PROXIMAL)
def test_proximal_steps_agree_with_the_reference(term, kind, device):
    strengths = given(term, kind)
    for step in (0.7, 5.0):
        params, expected = mixed_list(device), mixed_list(device)
        prox_(params, **strengths, step=step)
        reference.prox_(expected, **strengths, step=step)
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p, e, rtol=16 * torch.finfo(p.dtype).eps, atol=4 * torch.finfo(p.dtype).eps)


@EVERY_TERM
def test_importance_multiplies_the_value_of_an_element(term, device):
    w, importance = draw((997,), torch.float64, device), draw((997,), torch.float64, device, seed=1).abs()
    importance[::7] = 0
    _name, shape, _ = SHAPES[term]
    value, (grad,) = value_and_grad(w, **{term: 0.3}, importance=importance)
    exact = (importance * penalty(term, w, 0.3, shape)).sum()
    assert value.item() == pytest.approx(exact.item(), rel=1e-13)
    torch.testing.assert_close(grad, importance * slope(term, w, 0.3, shape), rtol=1e-14, atol=1e-15)
    x = w.clone()
    prox_(x, **{term: 0.3}, step=0.5, importance=importance)
    assert_same_bits([x[::7]], [w[::7] + 0.0])
    for i in (1, 2, 3):
        own = w[i : i + 1].clone()
        prox_(own, **{term: 0.3}, step=0.5 * importance[i].item())
        torch.testing.assert_close(x[i : i + 1], own, rtol=1e-14, atol=1e-15)


@EVERY_TERM
def test_derivatives_of_any_order_also_in_the_strength(term):
    """Away from the kinks, of w at 0 and where the curve begins and ends."""
    params = leaves(torch.tensor(w, dtype=torch.float64) for w in ([-1.5, 0.2, 0.4, -0.6], [[0.1, -0.7], [3.0, -0.25]]))
    strength = torch.tensor([0.3, 0.34], dtype=torch.float64, requires_grad=True)
    _name, shape, _ = SHAPES[term]
    for more in ({}, {"l1": 0.2, "l2": 0.1}, {"l2_norm": 0.3, "group": "row"}, {"smooth_l1": 0.2, "beta": 0.55}):

        def total(strength, *params, more=more):
            return fused_penalty(params, **{term: strength}, **more)

        assert gradcheck(total, (strength, *params))
        assert gradgradcheck(total, (strength, *params))
        assert gradgradcheck(lambda *params, total=total: total(strength.detach(), *params), params)
    fused_penalty(params, **{term: strength}).backward()
    for i, p in enumerate(params):
        s = strength[i].item()
        exact = (penalty(term, p.detach(), s + 1e-6, shape) - penalty(term, p.detach(), s - 1e-6, shape)).sum() / 2e-6
        assert strength.grad[i].item() == pytest.approx(exact.item(), rel=1e-8)
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    fused_penalty(params, **{term: zero}).backward()
    assert zero.grad == 0  # where the penalty ends at once
    hessian = torch.func.jacrev(torch.func.jacrev(lambda w: fused_penalty(w, **{term: 0.3})))(params[0].detach())
    assert (hessian.diag() <= 0).all()
    assert hessian.any()


@EVERY_TERM
@pytest.mark.parametrize("kind", first_quick("with others", "alone", "with norms", "each its own", "tensors"))
def test_compiled(term, kind):
    strengths, params = given(term, kind), mixed_list()
    torch._dynamo.reset()
    compiled = torch.compile(fused_penalty, fullgraph=True, backend="aot_eager")
    assert compiled(params, **strengths) == fused_penalty(params, **strengths)
    assert_same_bits(gradients(compiled, params, **strengths), gradients(fused_penalty, params, **strengths))


@EVERY_TERM
def test_errors(term):
    w, trained = draw((3,)), torch.tensor(3.5, requires_grad=True)
    name, _, bound = SHAPES[term]
    rule = f"must be finite and > {bound}"
    for strengths, error, message in (
        ({"l1": 0.1, name: 3.5}, ValueError, f"{name} must come with {term}, whose concavity it is, got none"),
        ({term: 0.1, name: bound}, ValueError, f"{name} {rule}, got {bound}"),
        ({term: 0.1, name: math.inf}, ValueError, f"{name} {rule}, got inf"),
        ({term: 0.1, name: [float(bound)]}, ValueError, rf"{name}\[0\] {rule}, got {bound}"),
        ({term: 0.1, name: torch.tensor(float(bound))}, ValueError, f"{name} {rule}, got {bound}"),
        ({term: 0.0, name: -1.0}, ValueError, f"{name} {rule}, got -1.0"),
        ({term: 0.1, name: "1"}, TypeError, f"{name} must be a float, a 0-dim tensor or a sequence"),
        ({term: 0.1, name: trained}, ValueError, f"{name} must be a constant, got a tensor that requires grad"),
        ({term: -0.1}, ValueError, f"{term} must be finite and >= 0, got -0.1"),
    ):
        for function, more in ((fused_penalty, {}), (value_and_grad, {}), (accumulate_grad_, {}), (prox_, {"step": 1})):
            with pytest.raises(error, match=f"^{function.__name__}: {message}"):
                function([w], **strengths, **more)
    for call in (lambda **numbers: Regularizer([w], **numbers), lambda **numbers: regularized(net(), **numbers)):
        with pytest.raises(ValueError, match=f"{name} {rule}, got {bound}"):
            call(**{term: 0.1, name: bound})
    regularizer = Regularizer(net(), **{term: 0.1})
    state = regularizer.state_dict()
    state["groups"][0][name] = float(bound)
    with pytest.raises(ValueError, match=f"^load_state_dict: {name} of '0.weight' {rule}, got {bound}"):
        regularizer.load_state_dict(state)
    regularizer.set_strength(**{name: lambda step: 4.0 - step})
    with pytest.raises(ValueError, match=f"{name} of '0.weight': what the schedule gives at step 3 {rule}, got 1"):
        regularizer.step = 3


@EVERY_TERM
@pytest.mark.parametrize("other", ["l2_norm", "smooth_l1"])
def test_no_proximal_step_beside_terms_that_bend_otherwise(term, other):
    w = draw((3,))
    before = w.clone()
    message = f"{term} and {other} of one parameter have no proximal operator in closed form"
    with pytest.raises(ValueError, match=rf"^prox_: {message}, got both for params\[0\]$"):
        prox_(w, **{term: 0.5, other: 0.5}, step=0.1)
    model = net()
    with pytest.raises(ValueError, match=rf"^attach: {message}, got both for params\['0.weight'\]$"):
        Regularizer(model, **{term: 0.1, other: 0.1}).attach(torch.optim.SGD(model.parameters(), lr=0.5), mode="prox")
    assert_same_bits([w], [before])
    prox_([w, before], **{term: [0.5, 0.0], other: [0.0, 0.5]}, step=0.1)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


@EVERY_TERM
def test_a_regularizer_has_it_as_any_term(term):
    model = net()
    name, _, _ = SHAPES[term]
    regularizer = Regularizer(model, **{term: 0.1}, rules=[("0.*", {name: 4.0}), ("1.bias", {term: 0.0, "l1": 0.2})])
    params = list(model.parameters())
    regularizer.set_strength(**{term: lambda step: 0.1 * (step + 1)}, where="1.weight")
    for step in (0, 1):
        own = 0.1 * (step + 1)
        strengths = {"l1": [0, 0, 0, 0.2], term: [0.1, 0.1, own, 0], name: [4.0, 4.0, SHAPES[term][1], 3.0]}
        assert regularizer() == fused_penalty(params, **strengths)
        report = regularizer.report()
        assert report.total["value"] == pytest.approx(regularizer().item(), rel=1e-6)
        exact = penalty(term, params[2].detach().double(), own, SHAPES[term][1]).sum().item()
        assert report["1.weight"]["value"] == pytest.approx(exact, rel=1e-6)
        regularizer.advance()
    assert report.scalars()[f"regularizer/group 0/{name}"] == 4.0
    assert Regularizer.from_config(Regularizer(model, **{term: 0.3, name: 5.0}).get_config(), model)() == fused_penalty(
        params, **{term: 0.3, name: 5.0}
    )


@EVERY_TERM
@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("ours", [False, True], ids=["of torch", "of fused_reg.optim"])
def test_attached(term, mode, ours):
    from fused_reg import optim

    model, by_hand = net(), net()
    strengths = {term: 0.1, SHAPES[term][0]: 2.5}
    optimizer = (optim if ours else torch.optim).SGD(model.parameters(), lr=0.5)
    own = torch.optim.SGD(by_hand.parameters(), lr=0.5)
    with Regularizer(model, **strengths).attach(optimizer, mode=mode) as attachment:
        for _ in range(3):
            for m, o in ((model, optimizer), (by_hand, own)):
                o.zero_grad()
                m(torch.ones(3)).sum().backward()
            with torch.no_grad():
                value = fused_penalty(by_hand.parameters(), **strengths)
            optimizer.step()
            if mode == "grad":
                accumulate_grad_(by_hand.parameters(), **strengths)
            own.step()
            if mode == "prox":
                prox_(by_hand.parameters(), **strengths, step=0.5)
            if mode == "grad" or ours:
                torch.testing.assert_close(attachment.value, value)
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@EVERY_TERM
def test_in_the_pass_of_an_optimizer_that_holds_others_too(term):
    """Parameters without a term, and a group of the optimizer without any."""
    from fused_reg import optim

    models = [net(), net()]
    name = SHAPES[term][0]
    rules = [("1.weight", {name: 4.0})]
    for model, kind in zip(models, (optim, torch.optim), strict=True):
        first, *others = model.parameters()
        optimizer = kind.SGD([{"params": [first, others[0]]}, {"params": others[1:2]}, {"params": others[2:]}], lr=0.1)
        Regularizer(model, **{term: 0.2}, weights_only=True, rules=rules).attach(optimizer, mode="prox")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(3)).sum().backward()
            optimizer.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # torch's own kernels round otherwise


@EVERY_TERM
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(term, dtype):
    w = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max], dtype=dtype)
    _name, shape, _ = SHAPES[term]
    _, (grad,) = value_and_grad(w, **{term: 0.5})
    assert_same_bits([grad], [torch.tensor([0.0, 0.0, 0.0, 0.0, torch.nan, 0.0], dtype=dtype)])
    flat = {"mcp": shape, "scad": shape + 1}[term] * 0.25 / 2
    assert fused_penalty(w[:2], **{term: 0.5}) == 0
    assert fused_penalty(w[:4], **{term: 0.5}).item() == pytest.approx(2 * flat)
    assert fused_penalty(w, **{term: 0.5}).isnan()
    for step in (1.0, 9.0):
        for toward in (None, torch.zeros_like(w)):
            x, y = w.clone(), w[:-1].clone()
            prox_(x, **{term: 0.5}, step=step, toward=toward)
            assert_same_bits([x], [torch.tensor([0.0, 0.0, *w[2:].tolist()], dtype=dtype)])
            reference.prox_(y, **{term: 0.5}, step=step)
            assert_same_bits([y], [x[:-1]])


@EVERY_TERM
@pytest.mark.parametrize("strength", [5e-324, 1e-310, 1e-200, 1e150, 1e300, 1.7e308])
@pytest.mark.parametrize("size", [0.0, 5e-324, 1e-310, 1e-200, 1.0, 1e150, 1.7e308])
def test_values_near_the_ends_of_float64(term, strength, size):
    """Of elements and strengths however large or small, where the penalty itself is a number."""
    _name, shape, _ = SHAPES[term]
    w = torch.tensor([size, -size, size / 3], dtype=torch.float64)
    s, a = Fraction(strength), Fraction(shape)
    exact = Fraction(0)
    for x in map(abs, map(Fraction, w.tolist())):
        knee, width = (0, a) if term == "mcp" else (s, a - 1)
        m = min(x, a * s)
        exact += s * m - max(m - knee, 0) ** 2 / (2 * width)
    value = fused_penalty(w, **{term: strength}).item()
    if exact > Fraction(1.79e308):
        assert value > 1.78e308
    else:
        assert abs(Fraction(value) - exact) <= exact * Fraction(4e-15) + Fraction(5e-324)


@EVERY_TERM
def test_values_and_proximal_steps_are_those_of_skglm(term):
    """Of an optional package, where the problem is convex."""
    penalties = pytest.importorskip("skglm.penalties")
    shape = SHAPES[term][1]
    theirs = {"mcp": penalties.MCPenalty, "scad": penalties.SCAD}[term](0.7, shape)
    w = 2 * draw((40,), torch.float64)
    assert fused_penalty(w, **{term: 0.7}).item() == pytest.approx(theirs.value(w.numpy()), rel=1e-13)
    for step in (0.3, 1.0, 1.9):
        x = w.clone()
        prox_(x, **{term: 0.7}, step=step)
        assert x.tolist() == pytest.approx([theirs.prox_1d(own, step, 0) for own in w.tolist()], rel=1e-13)
