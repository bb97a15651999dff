"""Modes, hooks and transforms around the penalty (hard cases 21, 30, 31)."""

import copy
from contextlib import nullcontext

import pytest
import torch
from oracle import assert_same_bits, assert_value, loop_gradients
from samples import DTYPES, draw, draw_list, leaves, mixed_list
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_reg import _ops, fused_penalty, reference, value_and_grad

BOTH = {"l1": 0.1, "l2": 1 / 3}


def test_vmap_under_no_grad(device):
    """Hard case 31."""
    w = draw(30, device=device).reshape(5, 6)
    with torch.no_grad():
        values = vmap(lambda row: fused_penalty(row, l1=0.5, l2=0.25))(w)
    assert_same_bits([values], [torch.stack([fused_penalty(row, l1=0.5, l2=0.25) for row in w])])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_value_without_a_graph_computes_no_gradient(mode, device, monkeypatch):
    """Logging the penalty costs one read, not a read and a write."""
    w = leaves([draw(1000, device=device)])
    asked = []
    operator = _ops.penalty
    monkeypatch.setattr(_ops, "penalty", lambda *args: (asked.append(args[1]), operator(*args))[1])
    monkeypatch.setattr(_ops, "plain_value", lambda *args: None)  # which knows of no gradients
    with mode():
        assert_value(fused_penalty(w, l1=0.5, l2=0.25), [p.detach() for p in w], 0.5, 0.25)
    assert asked == [()]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph(mode, device):
    """Hard case 30: the value alone, also of a strength that requires grad."""
    params = leaves(mixed_list(device))
    expected = fused_penalty(params, **BOTH).detach()
    trained = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with mode():
        penalty = fused_penalty(params, **BOTH)
        with_trained = fused_penalty(params, l1=trained, l2=BOTH["l2"])
        value, grads = value_and_grad(params, **BOTH)
    for result in (penalty, with_trained, value, *grads):
        assert not result.requires_grad
        assert result.is_inference() == (mode is torch.inference_mode)
    assert_same_bits([penalty, value], [expected, expected])
    assert_value(with_trained, [p.detach() for p in params], **BOTH)
    assert_same_bits(grads, value_and_grad(params, **BOTH)[1])


def test_inference_tensors(device):
    """Hard case 21: alone, and among trainable ones."""
    with torch.inference_mode():
        frozen = draw(300, device=device).clone()
    assert frozen.is_inference()
    (trained,) = leaves([draw(200, device=device, seed=1)])
    assert_value(fused_penalty(frozen, **BOTH), [frozen], **BOTH)
    value, grads = value_and_grad([frozen, trained], **BOTH)
    assert_value(value, [frozen, trained.detach()], **BOTH)
    for upstream in (1.0, 0.37):
        for params in ([frozen, trained], [trained, frozen]):
            trained.grad = None
            penalty = fused_penalty(params, **BOTH)
            assert_value(penalty.detach(), [frozen, trained.detach()], **BOTH)
            (upstream * penalty).backward()
            assert_same_bits([trained.grad], loop_gradients([trained], upstream, **BOTH))
    assert_same_bits([grads[1]], value_and_grad(trained, **BOTH)[1])


def test_inference_tensor_as_a_strength(device):
    with torch.inference_mode():
        strength = torch.tensor(0.1, device=device)
    (w,) = leaves([draw(200, device=device)])
    assert_value(fused_penalty([w.detach()], l1=strength), [w.detach()], l1=strength.item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_autocast(compute, dtype, device):
    """Neither the value nor the gradient is cast down."""
    params = draw_list(dtype, device)
    with torch.autocast(device.type, dtype=compute):
        penalty = fused_penalty(some := leaves(params), **BOTH)
        value, grads = value_and_grad(params, **BOTH)
        penalty.backward()
    assert_value(penalty.detach(), params, **BOTH)
    assert_same_bits([value, *grads], [(expected := value_and_grad(params, **BOTH))[0], *expected[1]])
    assert_same_bits([p.grad for p in some], expected[1])


@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_non_leaf_parameters(upstream, device):
    """Functions of other parameters: products, casts, slices."""
    pair = leaves([draw((40, 30), device=device), draw((40, 30), device=device, seed=1)])

    def penalty(function):
        a, b = pair
        return function([a * b, a.double(), (a + b)[::2], b.t().exp()], l1=[0.1, 0.2, 0.3, 0.4], l2=0.5) * upstream

    actual = torch.autograd.grad(penalty(fused_penalty), pair)
    expected = torch.autograd.grad(penalty(reference.loop), pair)
    torch.testing.assert_close(actual, expected)


def test_saved_tensors_hooks(device):
    """What is saved may be packed away, and comes back."""
    params = leaves(draw_list(torch.float32, device))
    expected = loop_gradients(params, 0.37, **BOTH)
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.clone()):
        penalty = fused_penalty(params, **BOTH)
    assert packed == [p.shape for p in params]
    actual = torch.autograd.grad(0.37 * penalty, params, retain_graph=True)
    assert_same_bits(actual, expected)
    with torch.autograd.graph.save_on_cpu():
        penalty = fused_penalty(params, **BOTH)
    assert_same_bits(torch.autograd.grad(0.37 * penalty, params), expected)


def test_only_what_needs_a_gradient_is_saved(device):
    params = draw_list(torch.float32, device)
    params[3].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_penalty(params, **BOTH)
    assert_same_bits(saved, [params[3]])


def test_hooks(device):
    """On parameters, on accumulated gradients, on the penalty: each sees and may replace the gradient."""
    first, second = leaves([draw(100, device=device), draw(50, device=device, seed=1)])
    seen = []
    first.register_hook(lambda g: 2 * g)
    second.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    penalty = fused_penalty([first, second], **BOTH)
    penalty.register_hook(lambda g: g * 0.37)
    penalty.backward()
    expected = loop_gradients([first, second], 0.37, **BOTH)
    assert_same_bits([first.grad, second.grad], [2 * expected[0], expected[1]])
    assert_same_bits(seen, [expected[1]])


def test_func_grad(device):
    """Hard case 31: of a list, of a function of the penalty, of the strength."""
    params = tuple(draw_list(torch.float32, device))
    expected = value_and_grad(params, **BOTH)
    actual = grad(lambda p: fused_penalty(p, **BOTH))(params)
    assert_same_bits(actual, expected[1])
    actual, value = grad_and_value(lambda p: fused_penalty(p, **BOTH))(params)
    assert_same_bits(actual, expected[1])
    assert_value(value, params, **BOTH)
    l1 = [0.1 * i for i in range(len(params))]
    actual = grad(lambda p: fused_penalty(p, l1=l1, l2=0.3))(params)
    assert_same_bits(actual, value_and_grad(params, l1=l1, l2=0.3)[1])
    actual = grad(lambda p: -2 * fused_penalty(p, **BOTH))(params)
    assert_same_bits(actual, loop_gradients(params, -2.0, **BOTH))
    slope = grad(lambda s: fused_penalty(params, l1=s, l2=0.3))(torch.tensor(0.5, dtype=torch.float64, device=device))
    assert_value(slope, [p.double() for p in params], l1=1.0)


def test_func_grad_keeps_the_bits(device):
    """Hard case 31: for any upstream gradient."""
    params = tuple(draw_list(torch.float32, device))
    for factor in (0.37, 1 / 7, 1e-3):
        actual = grad(lambda p, factor=factor: factor * fused_penalty(p, **BOTH))(params)
        assert_same_bits(actual, loop_gradients(params, factor, **BOTH))


def test_func_vjp_and_jacobians(device):
    """Hard case 31."""
    w = draw((4, 3), torch.float64, device)
    value, pull = vjp(lambda x: fused_penalty(x, **BOTH), w)
    assert_value(value, [w], **BOTH)
    (actual,) = pull(torch.tensor(2.0, dtype=torch.float64, device=device))
    torch.testing.assert_close(actual, 2 * value_and_grad(w, **BOTH)[1][0])
    torch.testing.assert_close(jacrev(lambda x: fused_penalty(x, **BOTH))(w), value_and_grad(w, **BOTH)[1][0])
    curvature = jacrev(grad(lambda x: fused_penalty(x, **BOTH)))(w).reshape(12, 12)
    torch.testing.assert_close(curvature, 2 / 3 * torch.eye(12, dtype=torch.float64, device=device))


@pytest.mark.usefixtures("forward_mode")
@pytest.mark.parametrize("transform", [jacfwd, hessian])
def test_forward_mode_says_that_it_is_missing(transform, device):
    """Hard case 31: works, or one clear error; never a wrong number."""
    w = draw(5, torch.float64, device)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp"):
        transform(lambda x: fused_penalty(x, l2=0.5))(w)


def test_functional_call(device):
    """Hard case 31: a penalty inside of a module that is called with other parameters."""

    class Penalized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(5, 3)

        def forward(self, x):
            return self.inner(x).sum() + fused_penalty(self.inner.parameters(), **BOTH)

    model = Penalized().to(device)
    other = {name: draw(p.shape, device=device, seed=9) for name, p in model.named_parameters()}
    x = draw((2, 5), device=device)
    actual = grad(lambda p: functional_call(model, p, (x,)))(other)
    plain = copy.deepcopy(model)
    plain.load_state_dict(other)
    plain(x).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(actual[name], p.grad)


def test_vmap(device):
    """Hard case 31: a penalty for each row; with the gradient of each, and per-sample strengths."""
    batch, shared = draw((6, 4, 3), device=device), draw(7, device=device, seed=1)
    rows = [[batch[i], shared] for i in range(6)]
    values = vmap(lambda w: fused_penalty([w, shared], **BOTH))(batch)
    assert values.shape == (6,)
    for row, value in zip(rows, values, strict=True):
        assert_value(value, row, **BOTH)
    moved = vmap(lambda w: fused_penalty([w, shared], **BOTH), in_dims=2)(batch.movedim(0, 2))
    assert_same_bits([moved], [values])
    actual = vmap(grad(lambda w: fused_penalty([w, shared], **BOTH)))(batch)
    assert_same_bits(actual, [value_and_grad(w, **BOTH)[1][0] for w in batch])
    strengths = torch.arange(1, 7, device=device) / 8
    values = vmap(lambda w, s: fused_penalty(w, l2=s))(batch, strengths)
    for w, value, s in zip(batch, values, strengths.tolist(), strict=True):
        assert_value(value, [w], l2=s)


def test_vmap_over_an_ensemble(device):
    """Hard case 31: models whose parameters are stacked."""
    models = [torch.nn.Linear(4, 2).to(device) for _ in range(3)]
    params, _ = torch.func.stack_module_state(models)
    values = vmap(lambda p: fused_penalty(p.values(), **BOTH))(params)
    for model, value in zip(models, values, strict=True):
        assert_value(value.detach(), [p.detach() for p in model.parameters()], **BOTH)


def test_func_higher_order(device):
    """Hard case 31: the penalty of a gradient, differentiated again."""
    w = draw(6, torch.float64, device).abs() + 0.5

    def inner(x):
        return (grad(lambda y: fused_penalty(y, l1=0.3, l2=0.7) ** 2)(x)).sum()

    def loop(x):
        return (grad(lambda y: reference.loop(y, l1=0.3, l2=0.7) ** 2)(x)).sum()

    torch.testing.assert_close(grad(inner)(w), grad(loop)(w))


def test_function_and_dispatch_modes_see_the_operators(device):
    """As they see torch's own functions: the direct way into the dispatcher leaves nobody out."""

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Subclass(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    w = draw(10, device=device)
    expected = reference.fused_penalty([w], 0.5, 0.25)
    for mode, params in ((Functions(), w), (Dispatched(), w), (nullcontext(), w.as_subclass(Subclass))):
        seen: list[str] = []
        with mode, torch.no_grad():
            value = fused_penalty(params, l1=0.5, l2=0.25)
        assert "fused_reg.penalty.default" in seen
        torch.testing.assert_close(value.as_subclass(torch.Tensor), expected, check_dtype=False)


@pytest.mark.usefixtures("forward_mode")
def test_a_tangent_is_an_error(device):
    """It would silently be lost: where no autograd function is, and where gradients are off."""
    w = draw(3, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, torch.ones_like(w))
        with pytest.raises(NotImplementedError, match=r"value_and_grad: params\[1\] must not have a tangent: forward"):
            value_and_grad([w, dual])
        with torch.no_grad(), pytest.raises(NotImplementedError, match=r"fused_penalty: params\[0\] must not have"):
            fused_penalty(dual)
        strength = forward_ad.make_dual(torch.tensor(0.5), torch.tensor(1.0))
        with pytest.raises(NotImplementedError, match="fused_penalty: l1 must not have a tangent"):
            fused_penalty(w, l1=strength)
        assert_value(fused_penalty(w, l1=0.5), [w], l1=0.5)
