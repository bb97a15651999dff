"""Every form of the penalty under every transform of ``torch.func``; what has none says so (hard case 31)."""

from itertools import product

import pytest
import torch
from oracle import assert_same_bits, assert_value
from samples import draw
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, prox_, reference, value_and_grad

FORMS = {
    "l1": {"l1": 0.1},
    "l2": {"l2": 1 / 3},
    "per parameter": {"l1": [0.1, 0.2], "l2": [1 / 3, 0.0]},
    "norms": {"l2_norm": 0.7},
    "rows": {"l2_norm": 0.7, "group": "row"},
    "all": {"l1": 0.1, "l2": 1 / 3, "l2_norm": 0.7, "group": "row"},
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
FORWARD_MODE = "forward-mode differentiation is not supported; use backward, torch.func.grad or jacrev"


def pair(device) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, none of it near 0, where the absolute value has no derivative."""
    return tuple(w + 0.3 * w.sign() + (w == 0) for w in (draw((4, 3), torch.float64, device), draw(5, torch.float64)))


def both_on(device, form):
    """The penalty and its specification as functions of two tensors, and these."""
    params = tuple(p.to(device) for p in pair(device))
    return (lambda *ps: fused_penalty(ps, **FORMS[form])), (lambda *ps: reference.loop(ps, **FORMS[form])), params


@EVERY_FORM
def test_first_derivatives(form, device):
    ours, loop, params = both_on(device, form)
    where = (0, 1)
    expected = grad(loop, where)(*params)
    torch.testing.assert_close(grad(ours, where)(*params), expected)
    torch.testing.assert_close(jacrev(ours, where)(*params), expected)
    grads, value = grad_and_value(ours, where)(*params)
    torch.testing.assert_close(grads, expected)
    assert_value(value, params, **FORMS[form])
    value, pull = vjp(ours, *params)
    assert_value(value, params, **FORMS[form])
    torch.testing.assert_close(pull(torch.full_like(value, -2.0)), tuple(-2 * e for e in expected))


@EVERY_FORM
def test_second_derivatives(form, device):
    """A Hessian, a product with it, and the gradient of a gradient's norm."""
    ours, loop, params = both_on(device, form)
    for i in (0, 1):
        torch.testing.assert_close(jacrev(jacrev(ours, i), i)(*params), jacrev(jacrev(loop, i), i)(*params))

    def of_gradient(function, w):
        return grad(lambda v: function(v, params[1]).exp())(w).square().sum()

    results = [grad(lambda w, f=function: of_gradient(f, w))(params[0]) for function in (ours, loop)]
    torch.testing.assert_close(*results)
    vector = draw((4, 3), torch.float64, device, seed=7)
    products = [vjp(grad(lambda w, f=f: f(w, params[1])), params[0])[1](vector)[0] for f in (ours, loop)]
    torch.testing.assert_close(*products)


@EVERY_FORM
def test_vmap(form, device):
    """Of the value, the gradient and the Jacobian, over the first list's rows."""
    ours, _, params = both_on(device, form)
    batch = torch.stack([params[0], 2 * params[0], -params[0]])
    for transform in (lambda f: f, grad, jacrev):
        function = transform(lambda w: ours(w, params[1]))
        assert_same_bits([vmap(function)(batch)], [torch.stack([function(w) for w in batch])])
    nested = vmap(vmap(grad(lambda w: ours(w, params[1]))))(torch.stack([batch, batch]))
    assert_same_bits([nested[1]], [vmap(grad(lambda w: ours(w, params[1])))(batch)])


class Penalized(nn.Module):
    """A penalty of its own parameters in its forward."""

    def __init__(self, strengths) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3).double()
        self.strengths = strengths

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).sum() + fused_penalty(self.inner.parameters(), **self.strengths)


@EVERY_FORM
def test_functional_call(form, device):
    """With other parameters, and with those of an ensemble."""
    module = Penalized(FORMS[form]).to(device)
    x = draw((2, 5), torch.float64, device)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    members = [{n: draw(s, torch.float64, device, seed=i) + 0.1 for n, s in shapes.items()} for i in range(3)]

    def loop(params):
        out = nn.functional.linear(x, params["inner.weight"], params["inner.bias"]).sum()
        return out + reference.loop(params.values(), **FORMS[form])

    expected = [grad(loop)(params) for params in members]
    function = grad(lambda params: functional_call(module, params, (x,)))
    for params, own in zip(members, expected, strict=True):
        torch.testing.assert_close(function(params), own)
    stacked = {name: torch.stack([params[name] for params in members]) for name in shapes}
    actual = vmap(function)(stacked)
    for name in shapes:
        torch.testing.assert_close(actual[name], torch.stack([own[name] for own in expected]))


def test_regularizer(device):
    """Built where the parameters are given. One that was built before is of its own: a constant here."""
    net = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)).double().to(device)
    params = {name: draw(p.shape, torch.float64, device, seed=9) + 0.1 for name, p in net.named_parameters()}
    chosen = {"weights_only": True, "rules": [("0.*", {"l1": 0.5}), ("1.*", {"l2_norm": 0.25, "group": "row"})]}
    actual = grad(lambda ps: Regularizer(ps.items(), **chosen)())(params)
    assert_same_bits([actual["0.weight"]], [0.5 * params["0.weight"].sign()])
    rows = params["1.weight"]
    torch.testing.assert_close(actual["1.weight"], 0.25 * rows / rows.norm(dim=1, keepdim=True))
    assert not actual["0.bias"].any()
    assert not actual["1.bias"].any()

    before = Regularizer(net, **chosen)
    x = torch.ones(2, 5, dtype=torch.float64, device=device)

    def output(ps):
        return functional_call(net, ps, (x,)).sum()

    grads, value = grad_and_value(lambda ps: output(ps) + before())(params)
    assert_same_bits(grads.values(), grad(output)(params).values())
    torch.testing.assert_close(value, output(params) + before())


@pytest.mark.usefixtures("forward_mode")
@EVERY_FORM
def test_forward_mode_is_an_error(form, device):
    """Also where it is over reverse mode."""
    ours, _, params = both_on(device, form)

    def function(w):
        return ours(w, params[1])

    def of_a_dual(w):
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(w, w))

    def along(f):
        return lambda w: jvp(f, (w,), (w,))

    forward = (jacfwd(function), along(function), lambda w: linearize(function, w), of_a_dual)
    for transformed in (*forward, hessian(function), along(grad(function)), jacfwd(jacrev(function))):
        with pytest.raises(NotImplementedError, match=f"^fused_penalty: .*{FORWARD_MODE}"):
            transformed(params[0])
    assert_value(function(params[0]), params, **FORMS[form])  # nothing is left behind


def test_vmap_outside_of_autograd_is_an_error(device):
    w = draw((4, 3), device=device)
    functions = (
        (value_and_grad, lambda row: value_and_grad(row, l1=0.1)[0]),
        (accumulate_grad_, lambda row: accumulate_grad_(row, l1=0.1)),
        (prox_, lambda row: prox_(row, l1=0.1, step=0.5)),
    )
    for (named, function), requires_grad in product(functions, (False, True)):
        name = named.__name__
        with pytest.raises(NotImplementedError, match=f"^{name}: torch.func.vmap is not supported, but for fused_pen"):
            vmap(function)(w.clone().requires_grad_(requires_grad))
    assert_same_bits([w], [draw((4, 3), device=device)])
