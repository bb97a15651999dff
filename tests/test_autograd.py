"""The penalty in autograd: derivatives of any order, graphs kept and broken, modes (hard cases 27-30)."""

import gc
import time
import weakref

import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import FULL_DTYPES, draw, draw_list, leaves, mixed_list
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fused_reg import fused_penalty, reference, value_and_grad

BOTH = {"l1": 0.1, "l2": 1 / 3}


def smooth_list(device):
    """float64, none of it near 0, where the absolute value has no derivative."""
    params = [draw(shape, torch.float64, device, i) for i, shape in enumerate([(), (5,), (0,), (3, 4), (2, 1, 3)])]
    return leaves([p.sign() * (p.abs() + 0.3) + 0.4 * (p == 0) for p in params])


def strengths_that_require_grad(device):
    def tensor(values):
        return torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)

    return {
        "0-dim": (tensor(0.3), tensor(0.7)),
        "1-D": (tensor([0.1, 0.2, 0.3, 0.4, 0.5]), tensor([0.5, 1e-3, 0.25, 0.7, 0.9])),
        "0-dim and 1-D": (tensor(0.3), tensor([0.5, 0.1, 0.25, 0.7, 0.9])),
    }


@pytest.mark.parametrize("strengths", [{"l1": 0.3}, {"l2": 0.7}, {"l1": [0.1, 0.2, 0.3, 0.4, 0.5], "l2": 0.7}], ids=str)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradcheck(check, strengths, device):
    """Hard case 28."""
    params = smooth_list(device)
    assert check(lambda *p: fused_penalty(p, **strengths), params)
    assert check(lambda *p: fused_penalty(p, **strengths).square(), params)


@pytest.mark.parametrize("kind", ["0-dim", "1-D", "0-dim and 1-D"])
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gradcheck_in_the_strengths(check, kind, device):
    """Hard case 28."""
    l1, l2 = strengths_that_require_grad(device)[kind]
    params = smooth_list(device)
    assert check(lambda a, b, *p: fused_penalty(p, l1=a, l2=b), (l1, l2, *params))
    assert check(lambda a, *p: fused_penalty(p, l1=a, l2=0.7).exp(), (l1, *params))
    assert check(lambda b, *p: fused_penalty(p, l1=0.7, l2=b), (l2, *[p.detach() for p in params]))


def test_gradcheck_in_a_sequence_of_floats_and_tensors(device):
    """Hard cases 26, 28."""
    params = smooth_list(device)
    some = [torch.tensor(x, dtype=torch.float64, device=device, requires_grad=True) for x in (0.3, 0.6)]

    def function(a, b, *p):
        return fused_penalty(p, l1=[0.1, a, 0.2, b, 0.4], l2=[b, 0.0, 0.5, a, 0.3])

    assert gradcheck(function, (*some, *params))
    assert gradgradcheck(function, (*some, *params))


def test_third_derivative(device):
    """Hard case 28: of l2 w^2, twice in w and once in l2, is 2; of (l2 w^2)^2, three times in w, is 24 l2^2 w."""
    (w,) = leaves([draw(6, torch.float64, device)])
    l2 = torch.tensor(0.7, dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(fused_penalty(w, l1=0.3, l2=l2), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w, create_graph=True)
    torch.testing.assert_close(second, torch.full_like(w, 2 * 0.7))
    (third,) = torch.autograd.grad(second.sum(), l2)
    assert third == 12

    x = w[2:3].detach().requires_grad_()
    derivative = fused_penalty(x, l2=0.7).square()
    for _ in range(3):
        (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
    torch.testing.assert_close(derivative, 24 * 0.7**2 * x)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_second_derivative_is_two_l2(dtype, device):
    """Hard case 28: the L1 part has none."""
    params = leaves(draw_list(dtype, device))
    l2 = [0.25 * (i + 1) for i in range(len(params))]
    grads = torch.autograd.grad(fused_penalty(params, l1=0.3, l2=l2), params, create_graph=True)
    assert_same_bits(grads, value_and_grad(params, l1=0.3, l2=l2)[1])
    vectors = [draw(p.shape, dtype, device, seed=40 + i) for i, p in enumerate(params)]
    products = torch.autograd.grad(grads, params, vectors)
    assert_same_bits(products, [2 * s * v for s, v in zip(l2, vectors, strict=True)])


@pytest.mark.parametrize("upstream", [1.0, 0.37, -2.0])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_create_graph_keeps_the_bits(dtype, upstream, device):
    """Hard case 27: the gradient that can be differentiated is the gradient."""
    params = leaves(draw_list(dtype, device))
    expected = loop_gradients(params, upstream, **BOTH)
    penalty = fused_penalty(params, **BOTH)
    gradient = torch.full_like(penalty, upstream)
    assert_same_bits(torch.autograd.grad(penalty, params, gradient, create_graph=True), expected)


@pytest.mark.parametrize("upstream", [1.0, 0.37, -2.0, 1 / 7])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("trained", ["l1", "l2"])
def test_trained_strength_beside_a_float_keeps_the_bits(trained, dtype, upstream, device):
    """Hard case 27: one strength is trained, in the dtype of the parameters; the other is a float, as in the loop."""
    params = [draw(n, dtype, device, seed=n) for n in (5, 1000)]
    for value in (0.1, 0.3, 1e-4 / 3, 2.7):
        strengths = {"l1": value, "l2": value}
        strengths[trained] = torch.tensor(value, dtype=dtype, device=device, requires_grad=True)
        actual = gradients(fused_penalty, params, upstream, **strengths)
        assert_same_bits(actual, loop_gradients(params, upstream, **strengths))


def test_gradient_of_the_strengths(device):
    """Hard case 26: the sums of the terms, times the upstream gradient, in the strengths' own dtype and place."""
    params = leaves(mixed_list(device))
    l1 = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    l2 = torch.rand(len(params), device=device, requires_grad=True)
    (3 * fused_penalty(params, l1=l1, l2=l2)).backward()
    assert (l1.grad.dtype, l2.grad.dtype, l2.grad.shape) == (torch.float64, torch.float32, l2.shape)
    assert_value(l1.grad / 3, [p.detach() for p in params], l1=1.0)
    for i, p in enumerate(params):
        torch.testing.assert_close(l2.grad[i].double(), 3 * p.detach().double().square().sum(), rtol=2e-7, atol=0)
        assert p.grad.dtype == p.dtype


def test_strength_trained_over_frozen_parameters(device):
    params = draw_list(torch.float32, device)
    l1 = torch.tensor(0.5, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(fused_penalty(params, l1=l1, l2=0.1), l1)
    assert_value(grad, params, l1=1.0)


@pytest.mark.parametrize("upstream", [1.0, 0.37])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_retain_graph(dtype, upstream, device):
    """Hard case 28: two backwards accumulate; the graph is gone after the second."""
    params = leaves(draw_list(dtype, device))
    expected = loop_gradients(params, upstream, **BOTH)
    loss = fused_penalty(params, **BOTH) * upstream
    loss.backward(retain_graph=True)
    assert_same_bits([p.grad for p in params], expected)
    first = [p.grad for p in params]
    for p in params:
        p.grad = None
    loss.backward(retain_graph=True)
    assert_same_bits([p.grad for p in params], expected)
    for p, grad in zip(params, first, strict=True):
        grad.fill_(7)
        assert not p.numel() or not torch.equal(p.grad, grad)
    loss.backward()
    assert_same_bits([p.grad for p in params], [e + e for e in expected])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_other_upstream_on_the_second_backward(device):
    """Hard case 28: the buffers of the forward are handed over once, whatever was asked first."""
    params = leaves(draw_list(torch.float32, device))
    penalty = fused_penalty(params, **BOTH)
    for upstream in (0.37, 1.0, 1.0, -2.0):
        gradient = torch.full_like(penalty, upstream)
        actual = torch.autograd.grad(penalty, params, gradient, retain_graph=True)
        assert_same_bits(actual, loop_gradients(params, upstream, **BOTH))


def test_gradient_of_some_parameters(device):
    """Hard case 28: `torch.autograd.grad` of a few of them."""
    params = leaves(draw_list(torch.float32, device))
    expected = loop_gradients(params, 0.37, **BOTH)
    for wanted in ([8], [2, 9], [9, 2, 0]):
        penalty = fused_penalty(params, **BOTH) * 0.37
        actual = torch.autograd.grad(penalty, [params[i] for i in wanted])
        assert_same_bits(actual, [expected[i] for i in wanted])
    with pytest.raises(RuntimeError, match="to not have been used in the graph"):
        torch.autograd.grad(fused_penalty(params[:2]), params[2])


@pytest.mark.parametrize("index", [0, 3, 9])
def test_in_place_change_before_backward(index, device):
    """Hard case 29: torch's own error."""
    params = leaves(draw_list(torch.float32, device))
    penalty = fused_penalty(params, **BOTH)
    with torch.no_grad():
        params[index].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()
    assert all(p.grad is None for p in params)


def test_in_place_change_of_a_frozen_parameter(device):
    """Hard case 29: is no error, because its gradient is not wanted."""
    trained, frozen = draw(10, device=device).requires_grad_(), draw(10, device=device)
    penalty = fused_penalty([trained, frozen], **BOTH)
    frozen.zero_()
    penalty.backward()
    assert_same_bits([trained.grad], value_and_grad(trained, **BOTH)[1])


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_two_penalties_in_one_loss(dtype, device):
    """Hard case 30."""
    params = leaves(draw_list(dtype, device))
    loss = fused_penalty(params, l1=0.1) + 0.5 * fused_penalty(params[3:], l2=1 / 3)
    loss.backward()
    first = loop_gradients(params, l1=0.1)
    second = loop_gradients(params[3:], 0.5, l2=1 / 3)
    assert_same_bits([p.grad for p in params], [*first[:3], *(a + b for a, b in zip(first[3:], second, strict=True))])


def test_penalty_beside_a_loss(device):
    """Hard case 30: the gradients add up, over several steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).to(device)
    x, y = draw((64, 20), device=device), draw((64, 1), device=device, seed=1)

    def train(penalty):
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (torch.nn.functional.mse_loss(model(x), y) + penalty()).backward()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()]

    start = {name: t.clone() for name, t in model.state_dict().items()}
    fused = train(lambda: fused_penalty(model.parameters(), l1=1e-3, l2=1e-2))
    loop = train(lambda: reference.loop(model.parameters(), l1=1e-3, l2=1e-2))
    torch.testing.assert_close(fused, loop, rtol=1e-5, atol=1e-7)
    assert not torch.equal(fused[0], train(lambda: 0.0)[0])


def test_sgd_weight_decay_is_half(device):
    """The L2 convention: `SGD(weight_decay=wd)` is `l2 = wd / 2`."""
    w = draw(100, device=device)
    decayed, penalized = (torch.nn.Parameter(w.clone()) for _ in range(2))
    for param, decay, l2 in ((decayed, 0.25, 0.0), (penalized, 0.0, 0.125)):
        optimizer = torch.optim.SGD([param], lr=0.1, weight_decay=decay, momentum=0.9)
        for _ in range(5):
            optimizer.zero_grad()
            (fused_penalty([param], l2=l2) + (param * w).sum()).backward()
            optimizer.step()
    torch.testing.assert_close(decayed, penalized, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, device):
    """Hard case 30."""
    params = leaves(draw_list(torch.float32, device))
    loss = checkpoint(lambda *p: fused_penalty(p, **BOTH) * 0.37, *params, use_reentrant=use_reentrant)
    loss.backward()
    assert_same_bits([p.grad for p in params], loop_gradients(params, 0.37, **BOTH))


def test_graph_dies_without_the_garbage_collector(device):
    """Hard case 38: no reference cycle, neither before nor after a backward."""
    gc.collect()
    gc.disable()
    try:
        for run in ("no backward", "backward", "retained", "create_graph", "trained strength"):
            w = torch.nn.Parameter(draw(20_000, device=device))
            l1 = torch.tensor(0.1, requires_grad=True) if run == "trained strength" else 0.1
            penalty = fused_penalty([w], l1=l1)
            if run == "create_graph":
                (grad,) = torch.autograd.grad(penalty, w, create_graph=True)
                del grad
            elif run != "no backward":
                penalty.backward(retain_graph=run == "retained")
            died = [weakref.ref(penalty), weakref.ref(w)]
            del penalty, w
            # For a GPU, a thread of the engine's own lets go of the last node a moment after the backward returns.
            deadline = time.monotonic() + (device.type == "cuda")
            while any(ref() is not None for ref in died) and time.monotonic() < deadline:
                time.sleep(0.001)
            assert [ref() for ref in died] == [None, None], run
    finally:
        gc.enable()


@pytest.mark.parametrize("term", ["l1", "l2"])
def test_mixed_derivatives_of_both_signs(term):
    """Of a loss that falls where the strength grows, as a meta-learner's may."""
    params = leaves([draw((5,), torch.float64), draw((2, 3), torch.float64)])
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(fused_penalty(params, **{term: strength}), strength, create_graph=True)
    grads = torch.autograd.grad(-slope, params)
    expected = value_and_grad(params, **{term: 1.0})[1]
    assert all(torch.equal(-g, e) for g, e in zip(grads, expected, strict=True))
