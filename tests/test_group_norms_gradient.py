"""The gradient of ``l2_norm``, ``w / ||w||`` and 0 where the norm is 0, in autograd and beside it."""

import math

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, gradients, per_parameter, ulp
from samples import CHUNK, DTYPES, FULL_DTYPES, LAYOUTS, UPSTREAMS, draw, draw_list, leaves, mixed_list
from torch.autograd import gradcheck, gradgradcheck

from fused_reg import fused_penalty, reference, value_and_grad

EVERY_GROUP = pytest.mark.parametrize("group", ["tensor", "row"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
ALL = {"l1": 0.1, "l2": 1 / 3, "l2_norm": 0.7}
TERMS = {"norm": {"l2_norm": 0.7}, "l1": {"l1": 0.1, "l2_norm": 0.7}, "l2": {"l2": 0.2, "l2_norm": 0.7}, "all": ALL}


def exact_gradient(w, group, l1, l2, l2_norm, upstream=1.0):
    """In float64, and the size of its parts, to which roundings are relative."""
    w = w.detach().cpu().double()
    rows = len(w) if group == "row" and w.ndim > 0 else 1
    exponent = math.frexp(float(w.abs().max()))[1] if w.numel() else 0
    scaled = torch.as_tensor(np.ldexp(w.numpy(), -exponent))
    squares = scaled.square().reshape(rows, -1).tolist() if w.numel() else [[]] * rows
    norms = torch.tensor([math.sqrt(math.fsum(row)) for row in squares], dtype=torch.float64)
    norms = norms.reshape(-1, *[1] * (w.ndim - 1)) if w.ndim > 0 else norms.reshape(())
    parts = l1 * w.sign(), 2 * l2 * w, torch.where(norms == 0, 0, l2_norm * scaled / norms)
    return upstream * sum(parts), abs(upstream) * sum(part.abs() for part in parts)


def assert_near(grads, params, group, upstream=1.0, once=True, **strengths) -> None:
    """``once``: rounded once to the parameter's dtype, as promised for half precision; else each part and the sum."""
    columns = [per_parameter(strengths.get(name), len(params)) for name in ("l1", "l2", "l2_norm")]
    for grad, p, *of_one in zip(grads, params, *columns, strict=True):
        assert (grad.dtype, grad.shape) == (p.dtype, p.shape)
        exact, size = exact_gradient(p, group, *of_one, upstream)
        compute = torch.float64 if p.dtype == torch.float64 else torch.float32
        rounding = ulp(exact, p.dtype) / 2 if once else 1.5 * ulp(size, p.dtype)
        allowed = rounding + 4 * torch.finfo(compute).eps * size
        error = (grad.detach().cpu().double() - exact).abs()
        assert (error <= allowed).all(), error.max()


CREATE_GRAPH = 2  # of these ways, the one that adds the parts in the parameter's dtype


def all_gradients(params, group, upstream=1.0, **strengths) -> list:
    """By every way to it."""
    some = leaves(params)
    output = fused_penalty(some, **strengths, group=group)
    given = torch.full_like(output, upstream)
    ways = [
        torch.autograd.grad(output, some, given, retain_graph=True),
        torch.autograd.grad(output, some, given, retain_graph=True),
        torch.autograd.grad(output, some, given, create_graph=True),
    ]
    if upstream == 1:
        ways.append(value_and_grad(params, **strengths, group=group)[1])
    (output * upstream).backward()
    ways.append([p.grad for p in some])
    return ways


@EVERY_GROUP
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("terms", TERMS)
def test_list(terms, dtype, group, device):
    """``None`` is all dtypes in turn (hard case 18)."""
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    ways = all_gradients(params, group, **TERMS[terms])
    for i, grads in enumerate(ways):
        assert_near(grads, params, group, once=i != CREATE_GRAPH, **TERMS[terms])
    for i in (1, 3, 4):  # the second, value_and_grad's, backward's
        assert_same_bits(ways[i], ways[0])


@EVERY_GROUP
@EVERY_DTYPE
@pytest.mark.parametrize("upstream", [u for u in UPSTREAMS if math.isfinite(u)])
def test_upstream(upstream, dtype, group, device):
    """Hard case 27."""
    params = draw_list(dtype, device)
    for i, grads in enumerate(all_gradients(params, group, upstream, **ALL)):
        if abs(upstream) < 1000 or dtype != torch.float16:
            assert_near(grads, params, group, upstream, once=i != CREATE_GRAPH, **ALL)


@EVERY_GROUP
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", [math.inf, -math.inf, math.nan])
def test_upstream_that_is_not_finite(upstream, dtype, group, device):
    """Hard case 27: as the loop, where neither the element nor its norm is 0."""
    params = [draw(n, dtype, device).abs() + 0.1 for n in ((3,), (4, 5), (2, 300))]
    expected = gradients(reference.loop, [p.cpu() for p in params], upstream, **ALL, group=group)
    assert_same_bits(gradients(fused_penalty, params, upstream, **ALL, group=group), expected)


@EVERY_GROUP
def test_per_parameter_strengths(group, device):
    params = mixed_list(device)
    each = {name: [0.1 * ((i + j) % 4) for i in range(len(params))] for j, name in enumerate(ALL)}
    for i, grads in enumerate(all_gradients(params, group, **each)):
        assert_near(grads, params, group, once=i != CREATE_GRAPH, **each)
    for place in {torch.device("cpu"), device}:
        tensor = torch.tensor(each["l2_norm"], dtype=torch.float64, device=place)
        for i, grads in enumerate(all_gradients(params, group, **{**each, "l2_norm": tensor})):
            assert_near(grads, params, group, once=i != CREATE_GRAPH, **each)


@EVERY_GROUP
def test_every_parameter_has_the_gradient_it_has_alone(group, device):
    """Hard case 18: to the bit, wherever it stands."""
    params = mixed_list(device)
    grads = gradients(fused_penalty, params, 0.375, **ALL, group=group)
    for p, grad in zip(params, grads, strict=True):
        assert_same_bits([grad], gradients(fused_penalty, [p], 0.375, **ALL, group=group))


@EVERY_GROUP
@EVERY_DTYPE
@pytest.mark.parametrize("shape", [(CHUNK + 1,), (3, CHUNK), (2, 3 * CHUNK + 7), (1000, 17), (65, 1023), (5000, 1)])
def test_sizes(shape, dtype, group, device):
    params = [draw(shape, dtype, device), draw((3, 5), dtype, device)]
    assert_near(value_and_grad(params, l2_norm=0.7, group=group)[1], params, group, l2_norm=0.7)


@EVERY_GROUP
def test_some_parameters_are_frozen(group, device):
    """Their norms count in the value, and move no other's along."""
    params = mixed_list(device)
    expected = gradients(fused_penalty, params, 0.37, **ALL, group=group)
    for step in (2, 3):
        some = [p.detach().requires_grad_(i % step == 0) for i, p in enumerate(params)]
        (0.37 * fused_penalty(some, **ALL, group=group)).backward()
        for i, (p, want) in enumerate(zip(some, expected, strict=True)):
            assert p.grad is None if i % step else assert_same_bits([p.grad], [want]) is None


@EVERY_DTYPE
@EVERY_GROUP
def test_zero_groups(group, dtype, device):
    """Hard case 24: gradient 0, not NaN; in a zero tensor, in a zero row among others, of any length."""
    zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape in ((), (5,), (3, 4), (2, CHUNK + 1))]
    for grads in all_gradients(zeros, group, **ALL):
        assert not any(g.any() for g in grads)
    w = draw((6, 40), dtype, device)
    w[1] = w[4] = 0
    w[4, 7] = -0.0
    for upstream in (1.0, 0.37):
        for (grad,) in all_gradients([w], group, upstream, l2_norm=0.7):
            assert not grad[1].any()
            assert not grad[4].any()
            assert_near([grad], [w], group, upstream, l2_norm=0.7)


@EVERY_GROUP
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_nan_and_infinity(special, dtype, group, device):
    """Hard case 23: as the loop: NaN in the whole group; of an infinite norm NaN at the infinite element, 0 beside."""
    w = draw((4, 5), dtype, device) + 2
    w[2, 3] = special
    expected = gradients(reference.loop, [w.cpu()], l2_norm=0.5, group=group)
    (grad,) = gradients(fused_penalty, [w], l2_norm=0.5, group=group)
    torch.testing.assert_close(grad.cpu(), expected[0], equal_nan=True)
    assert grad[2, 3].isnan()
    assert group == "tensor" or grad[[0, 1, 3]].ne(0).all()


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_strength_zero_drops_the_term(special, device):
    """A strength of 0 in a tensor or beside others: ``0.0 * inf`` does not enter the gradient either."""
    w, one = torch.tensor([1.0, special], device=device), torch.ones(2, device=device)
    for zero in (torch.tensor(0.0, device=device), [0.0, 0.5], torch.tensor([0.0, 0.5], device=device)):
        _, (grad, _) = value_and_grad([w, one], l2_norm=zero)
        assert grad.tolist() == [0, 0]


@EVERY_GROUP
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float64, s) for s in (1e200, 1e-200, 1e300, 1e-300)]
    + [(torch.float32, s) for s in (1e30, 1.7e38, 1e-30, 1e-40, 3e-45)]
    + [(torch.bfloat16, s) for s in (1e30, 1e-38)]
    + [(torch.float16, s) for s in (6e4, 6e-5, 1e-7)],
)
def test_range(dtype, scale, group, device):
    """The direction of a vector of any size: neither 0 nor infinite on the way."""
    w = (scale * draw((5, 40), torch.float64, device).clamp(-1, 1)).to(dtype)
    (grad,) = value_and_grad(w, l2_norm=0.7, group=group)[1]
    assert_near([grad], [w], group, l2_norm=0.7)
    norms = grad.double().norm(dim=1 if group == "row" else None)
    torch.testing.assert_close(norms, torch.full_like(norms, 0.7), rtol=1e-2, atol=0)


@EVERY_GROUP
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERY_DTYPE
def test_layouts(dtype, layout, group, device):
    """Hard cases 10, 11: the gradient of every logical element, in the parameter's strides where these are dense."""
    dense, make = LAYOUTS[layout]
    params = [draw((5, 2), dtype, device), make(dtype=dtype, device=device)]
    for i, grads in enumerate(all_gradients(params, group, **ALL)):
        assert_near(grads, params, group, once=i != CREATE_GRAPH, **ALL)
    for grads in (gradients(fused_penalty, params, **ALL, group=group), value_and_grad(params, **ALL, group=group)[1]):
        assert not dense or grads[1].stride() == params[1].stride()


@EVERY_GROUP
@pytest.mark.parametrize("scale", [1e-310, 5e-323])
def test_norms_below_the_normal_range(scale, group, device):
    """Such a norm has lost digits, and so has the direction; it keeps its length about."""
    w = scale * draw((5, 40), torch.float64, device).clamp(-1, 1)
    (grad,) = value_and_grad(w, l2_norm=0.7, group=group)[1]
    torch.testing.assert_close(grad.cpu(), exact_gradient(w, group, 0.0, 0.0, 0.7)[0], rtol=5e-2, atol=0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 3e38), (torch.float64, 1.7e308)])
def test_twice_the_element_overflows(dtype, scale, device):
    w = (scale * draw((5, 40), torch.float64, device).clamp(-1, 1)).to(dtype)
    (grad,) = value_and_grad(w, l2_norm=0.7)[1]
    assert grad.isfinite().all()


def smooth_list(device):
    """float64, no element near 0."""
    params = [draw(shape, torch.float64, device, i) for i, shape in enumerate([(), (5,), (0,), (3, 4), (2, 1, 3)])]
    return leaves([p.sign() * (p.abs() + 0.3) + 0.4 * (p == 0) for p in params])


@EVERY_GROUP
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradcheck(check, group, device):
    """Hard case 28: in the parameters and in strengths that require grad."""
    params = smooth_list(device)
    each = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64, device=device, requires_grad=True)
    one = torch.tensor(0.6, dtype=torch.float64, device=device, requires_grad=True)
    assert check(lambda *p: fused_penalty(p, **ALL, group=group), params)
    assert check(lambda *p: fused_penalty(p, l2_norm=0.7, group=group).square(), params)
    assert check(lambda s, *p: fused_penalty(p, l1=0.1, l2_norm=s, group=group), (one, *params))
    assert check(lambda s, t, *p: fused_penalty(p, l1=t, l2_norm=s, group=group).exp(), (each, one, *params))
    detached = [p.detach() for p in params]
    assert check(lambda s: fused_penalty(detached, l2=0.1, l2_norm=s, group=group), (each,))


@EVERY_GROUP
@EVERY_DTYPE
def test_hessian_vector_product(dtype, group, device):
    """Of a norm: ``(v - u <u, v>) / ||w||`` with ``u = w / ||w||``, which vanishes along w; 0 in a zero group."""
    w, v = draw((4, 30), dtype, device), draw((4, 30), dtype, device, seed=1)
    w[2] = 0
    (leaf,) = leaves([w])
    (grad,) = torch.autograd.grad(fused_penalty(leaf, l2_norm=0.7, l2=0.2, group=group), leaf, create_graph=True)
    (product,) = torch.autograd.grad(grad, leaf, v, retain_graph=True)
    (along,) = torch.autograd.grad(grad, leaf, w)
    x, y = w.double(), v.double()
    if group == "tensor":
        x, y = x.reshape(1, -1), y.reshape(1, -1)
    norm = x.norm(dim=1, keepdim=True)
    u = x / norm.clamp(min=1e-300)
    curved = torch.where(norm == 0, 0, 0.7 * (y - u * (u * y).sum(dim=1, keepdim=True)) / norm.clamp(min=1e-300))
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(product.double(), (curved + 0.4 * y).reshape(4, 30), rtol=0, atol=tolerance)
    torch.testing.assert_close(along.double(), 0.4 * w.double(), rtol=0, atol=tolerance)


@EVERY_GROUP
def test_gradient_of_the_strengths(group, device):
    """Hard case 26: the sums of norms."""
    params = mixed_list(device)
    each = torch.rand(len(params), device=device, requires_grad=True)
    (3 * fused_penalty(leaves(params), l1=0.1, l2_norm=each, group=group)).backward()
    sums = [fused_penalty(p.double(), l2_norm=3.0, group=group) for p in params]
    torch.testing.assert_close(each.grad.double(), torch.stack(sums), rtol=2e-7, atol=0)


@EVERY_GROUP
def test_retain_graph_and_in_place_changes(group, device):
    """Hard cases 28, 29, 32."""
    params = leaves(draw_list(torch.float32, device))
    penalty = fused_penalty(params, **ALL, group=group)
    penalty.backward(retain_graph=True)
    first = [p.grad for p in params]
    copies = [g.clone() for g in first]
    for p in params:
        p.grad = None
    penalty.backward(retain_graph=True)
    assert_same_bits([p.grad for p in params], copies)
    assert all(p.numel() == 0 or p.grad.data_ptr() != g.data_ptr() for p, g in zip(params, first, strict=True))
    with torch.no_grad():
        params[9].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


@EVERY_GROUP
def test_torch_func(group, device):
    """Hard case 31."""
    params = tuple(p.detach() for p in smooth_list(device))

    def function(*p):
        return fused_penalty(p, **ALL, group=group)

    expected = gradients(fused_penalty, params, **ALL, group=group)
    everywhere = tuple(range(len(params)))
    torch.testing.assert_close(torch.func.grad(function, argnums=everywhere)(*params), expected)
    value, pullback = torch.func.vjp(function, *params)
    torch.testing.assert_close(value, function(*params))
    torch.testing.assert_close(pullback(torch.full_like(value, 2.0)), tuple(2 * e for e in expected))
    w = draw((3, 4, 5), torch.float64, device) + 3
    batched = torch.func.vmap(lambda t: fused_penalty(t, **ALL, group=group))(w)
    torch.testing.assert_close(batched, torch.stack([fused_penalty(t, **ALL, group=group) for t in w]))
    per_example = torch.func.vmap(torch.func.grad(lambda t: fused_penalty(t, **ALL, group=group)))(w)
    torch.testing.assert_close(per_example, torch.stack([value_and_grad(t, **ALL, group=group)[1][0] for t in w]))
    strength = torch.tensor(0.3, dtype=torch.float64, device=device)
    slope = torch.func.grad(lambda s: fused_penalty(params, l2_norm=s, group=group))(strength)
    torch.testing.assert_close(slope, fused_penalty(params, l2_norm=1.0, group=group))


@EVERY_GROUP
def test_same_tensor_twice_and_overlapping_views(group, device):
    """Hard cases 8, 9."""
    memory = (draw((6, 8), torch.float64, device) + 3).requires_grad_()
    for function in (fused_penalty, reference.loop):
        memory.grad = None
        function(
            [memory, memory, memory[1:4], memory.t()], l1=0.1, l2_norm=[0.1, 0.2, 0.3, 0.4], group=group
        ).backward()
        expected, memory.grad = memory.grad, None
        if function is fused_penalty:
            ours = expected
    torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)
