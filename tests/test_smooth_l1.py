"""``smooth_l1`` and ``beta``: the sum of ``torch.nn.functional.smooth_l1_loss``, in everything that takes a term."""

from fractions import Fraction

import pytest
import torch
from oracle import assert_near, assert_same_bits, gradients
from samples import DTYPES, FULL_DTYPES, draw, draw_list, leaves, mixed_list
from torch.autograd import gradcheck, gradgradcheck

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, prox_, reference, regularized, value_and_grad

COUNT = len(mixed_list())
STRENGTHS = {
    "alone": {"smooth_l1": 0.3},
    "with all": {"l1": 0.1, "l2": 0.2, "smooth_l1": 0.3, "beta": 0.7, "l2_norm": 0.4, "group": "row"},
    "each its own": {
        "smooth_l1": [0.1 * (i % 4) for i in range(COUNT)],
        "beta": [0.0, *(2.0 ** (i % 5 - 3) for i in range(1, COUNT))],
    },
    "tensors": {"l1": 0.1, "smooth_l1": torch.tensor(0.3).double(), "beta": torch.linspace(0, 2, COUNT).double()},
    "wide": {"l2": 0.1, "smooth_l1": 2, "beta": 1e6},
}
EVERY_STRENGTHS = pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)


def by_torch(params, strength, beta):
    """By torch's loss, in float64."""
    loss = torch.nn.functional.smooth_l1_loss
    return sum(strength * loss(p.double(), torch.zeros_like(p).double(), reduction="sum", beta=beta) for p in params)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 0.5, 1.0, 3.0])
def test_values_and_gradients_are_those_of_torch(beta, device):
    params = mixed_list(device)
    value, grads = value_and_grad(params, smooth_l1=0.3, beta=beta)
    assert_near(value, _exact(by_torch(params, 0.3, beta)))
    for grad, expected in zip(grads, gradients(by_torch, params, strength=0.3, beta=beta), strict=True):
        torch.testing.assert_close(grad, expected.to(grad.dtype), rtol=2 * torch.finfo(grad.dtype).eps, atol=0)


def _exact(value) -> Fraction:
    return Fraction(value.item())


@EVERY_STRENGTHS
def test_functions_agree_with_the_reference(strengths, device):
    params = mixed_list(device)
    value, grads = value_and_grad(params, **strengths)
    expected, expected_grads = reference.value_and_grad(params, **strengths)
    assert_near(value, _exact(reference.fused_penalty([p.double() for p in params], **strengths)))
    assert value.dtype == expected.dtype
    for grad, e in zip(grads, expected_grads, strict=True):
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grad, e, rtol=4 * eps, atol=eps)
    assert_same_bits(gradients(fused_penalty, params, **strengths), grads)
    fresh = leaves([p.clone() for p in params])
    assert_same_bits([accumulate_grad_(fresh, **strengths), *(p.grad for p in fresh)], [value, *grads])


@pytest.mark.parametrize("beta", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_gradients_have_the_bits_of_the_loop(dtype, beta, device):
    """Where beta is a power of two: of another one the loop rounds its slope elsewhere."""
    params = draw_list(dtype, device)
    strengths = {"smooth_l1": 0.7, "beta": beta}
    assert_same_bits(value_and_grad(params, **strengths)[1], gradients(reference.loop, params, **strengths))


def test_beta_0_is_l1_and_none_is_1(device):
    params = mixed_list(device)
    value, grads = value_and_grad(params, l1=0.3)
    assert_same_bits(value_and_grad(params, smooth_l1=0.3, beta=0.0)[1], grads)
    assert value_and_grad(params, smooth_l1=0.3, beta=0.0)[0] == value
    for other in ({"beta": 1.0}, {"beta": None}, {"beta": torch.ones(COUNT, dtype=torch.float64)}):
        assert fused_penalty(params, smooth_l1=0.3, **other) == fused_penalty(params, smooth_l1=0.3)
    assert fused_penalty(params, l2=0.1, smooth_l1=0.0, beta=2.0) == fused_penalty(params, l2=0.1)


@pytest.mark.parametrize("name", [name for name in STRENGTHS if name != "with all"])
def test_proximal_steps(name, device):
    params, expected = mixed_list(device), mixed_list(device)
    prox_(params, **STRENGTHS[name], step=0.7)
    reference.prox_(expected, **STRENGTHS[name], step=0.7)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p, e, rtol=8 * torch.finfo(p.dtype).eps, atol=torch.finfo(p.dtype).eps)


def test_a_proximal_step_is_a_gradient_step_that_looks_ahead():
    """x = w - step * gradient(x), which says of x that it is the minimum."""
    w = draw((997,), torch.float64)
    x = w.clone()
    strengths = {"l2": 0.3, "smooth_l1": 0.9, "beta": 0.4}
    prox_(x, **strengths, step=0.5)
    (grad,) = value_and_grad(x, **strengths)[1]
    torch.testing.assert_close(x, w - 0.5 * grad, rtol=1e-14, atol=1e-15)


def test_no_proximal_step_beside_norms():
    params = [draw((3,)), draw((4,))]
    before = [p.clone() for p in params]
    each = {"l2_norm": [0.0, 0.5], "smooth_l1": [0.5, 0.0]}
    message = "smooth_l1 and l2_norm of one parameter have no proximal operator in closed form, got both for params"
    for given, place in (
        ({"l2_norm": 0.5, "smooth_l1": 0.5}, 0),
        ({"l2_norm": 0.5, "smooth_l1": each["l2_norm"]}, 1),
        ({"l2_norm": torch.tensor([0.0, 0.5]), "smooth_l1": torch.tensor(0.5)}, 1),
    ):
        with pytest.raises(ValueError, match=rf"^prox_: {message}\[{place}\]$"):
            prox_(params, **given, step=0.1)
    named = [("a", torch.nn.Parameter(params[0])), ("b", torch.nn.Parameter(params[1]))]
    regularizer = Regularizer(named, smooth_l1=0.5, rules=[("b", {"l2_norm": 0.5})])
    with pytest.raises(ValueError, match=rf"^prox_: {message}\['b'\]$"):
        regularizer.prox_(0.1)
    assert_same_bits(params, before)
    prox_(params, **each, step=0.1)


def test_derivatives_of_any_order():
    # Away from the kinks at beta, where there is no second derivative.
    params = leaves(torch.tensor(w, dtype=torch.float64) for w in ([-1.5, 0.2, 0.4, -0.3], [[0.1, -0.7], [0.9, -0.2]]))
    strength = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    for beta in (0.0, 0.5):
        assert gradgradcheck(lambda *params, beta=beta: fused_penalty(params, smooth_l1=0.3, beta=beta), params)
    for more in ({}, {"l1": 0.2, "l2": 0.1}, {"l2_norm": 0.3, "group": "row"}):

        def penalty(strength, *params, more=more):
            return fused_penalty(params, smooth_l1=strength, beta=torch.tensor([0.5, 0.0]), **more)

        assert gradcheck(penalty, (strength, *params))
        assert gradgradcheck(penalty, (strength, *params))
        assert gradgradcheck(lambda *params, penalty=penalty: penalty(strength.detach(), *params), params)
    curvature = torch.func.jacrev(torch.func.jacrev(lambda w: fused_penalty(w, smooth_l1=0.3, beta=0.5)))(params[0])
    assert_same_bits([curvature.diag()], [(params[0].abs() < 0.5).double() * (0.3 / 0.5)])


@pytest.mark.parametrize("beta", [0.0, 1e-320, 1e-41, 0.25, 1e30])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_curvatures(dtype, beta):
    """Of widths whose parabolas are too steep for the dtype, too."""
    w = torch.tensor([0.0, 0.5, -0.125, -2.0], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(fused_penalty(w, smooth_l1=0.5, beta=beta), w, create_graph=True)
    (curvature,) = torch.autograd.grad(grad.sum(), w)
    steep = torch.tensor(0.5 / (beta or 1.0), dtype=torch.float64, device=w.device)
    torch.testing.assert_close(curvature, torch.where(w.double().abs() < beta, steep, 0).to(dtype))


@pytest.mark.parametrize("name", STRENGTHS)
def test_compiled(name):
    strengths, params = STRENGTHS[name], mixed_list()
    torch._dynamo.reset()
    compiled = torch.compile(fused_penalty, fullgraph=True, backend="aot_eager")
    assert compiled(params, **strengths) == fused_penalty(params, **strengths)
    assert_same_bits(gradients(compiled, params, **strengths), gradients(fused_penalty, params, **strengths))


def test_errors():
    w, trained = draw((3,)), torch.tensor(0.5, requires_grad=True)
    for given, error, message in (
        ({"l1": 0.1, "beta": 0.5}, ValueError, "beta must come with smooth_l1, whose width it is, got none"),
        ({"smooth_l1": 0.1, "beta": -1.0}, ValueError, "beta must be finite and >= 0, got -1.0"),
        ({"smooth_l1": 0.1, "beta": torch.tensor(-1.0)}, ValueError, "beta must be finite and >= 0, got -1"),
        ({"smooth_l1": 0.1, "beta": [1.0, 2.0]}, ValueError, "beta must have one strength per parameter"),
        ({"smooth_l1": 0.1, "beta": "1"}, TypeError, "beta must be a float, a 0-dim tensor or a sequence"),
        ({"smooth_l1": 0.1, "beta": trained}, ValueError, "beta must be a constant, got a tensor that requires grad"),
        ({"smooth_l1": 0.1, "beta": [trained]}, ValueError, "beta must be a constant, got a tensor that requires grad"),
        ({"smooth_l1": -0.1}, ValueError, "smooth_l1 must be finite and >= 0, got -0.1"),
        ({"smooth_l1": 0.0, "beta": -1.0}, ValueError, "beta must be finite and >= 0, got -1.0"),
        ({"smooth_l1": 0.0, "beta": "1"}, TypeError, "beta must be a float, a 0-dim tensor or a sequence"),
    ):
        for function, more in ((fused_penalty, {}), (value_and_grad, {}), (accumulate_grad_, {}), (prox_, {"step": 1})):
            with pytest.raises(error, match=f"^{function.__name__}: {message}"):
                function(w, **given, **more)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))


def test_errors_of_regularizers():
    message = "beta must come with smooth_l1, whose width it is, got none"
    for beta in (0.0, 0.5):  # 0 is a number as others
        for given in ({"l1": 0.1, "beta": beta}, {"l1": 0.1, "rules": [("0.*", {"beta": beta})]}):
            with pytest.raises(ValueError, match=f"^Regularizer: .*{message}"):
                Regularizer(net(), **given)
        with pytest.raises(ValueError, match=r"^Regularizer: beta must apply to a parameter, but rules or marks"):
            Regularizer(net(), smooth_l1=0.1, beta=beta, rules=[("*", {"beta": 1.0})])
    with pytest.raises(ValueError, match=f"^set_strength: {message}"):
        Regularizer(net(), l1=0.1).set_strength(beta=0.5)
    with pytest.raises(ValueError, match=f"^regularized: {message}"):
        regularized(net(), l1=0.1, beta=0.5)
    trained = torch.tensor(0.5, requires_grad=True)
    for where, given in (("", {"beta": trained}), ("rules\\[0\\] '0.\\*': ", {"rules": [("0.*", {"beta": trained})]})):
        with pytest.raises(ValueError, match=f"^Regularizer: {where}beta must be a constant, got a tensor"):
            Regularizer(net(), smooth_l1=0.1, **given)


def test_no_proximal_attachment_beside_norms():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    regularizer = Regularizer(model, smooth_l1=0.1, rules=[("1.weight", {"l2_norm": 0.5}), ("0.*", {"l1": 0.1})])
    message = "attach: smooth_l1 and l2_norm of one parameter have no proximal operator in closed form, got both for "
    with pytest.raises(ValueError, match=rf"^{message}params\['1.weight'\]$"):
        regularizer.attach(optimizer, mode="prox")
    regularizer.set_strength(smooth_l1=0.0, where="1.weight")
    with regularizer.attach(optimizer, mode="prox"):
        model(torch.ones(3)).sum().backward()
        before = [p.clone() for p in model.parameters()]
        regularizer.set_strength(l2_norm=0.1, where="0.weight")
        with pytest.raises(ValueError, match=rf"^{message}params\['0.weight'\]$"):
            optimizer.step()
        assert_same_bits(list(model.parameters()), before)


def test_a_regularizer_has_it_as_any_term():
    model = net()
    rules = [("0.*", {"beta": 0.5}), ("1.bias", {"smooth_l1": 0.0, "l1": 0.2})]
    regularizer = Regularizer(model, smooth_l1=0.1, rules=rules)
    strengths = {"l1": [0, 0, 0, 0.2], "smooth_l1": [0.1, 0.1, 0.1, 0], "beta": [0.5, 0.5, 1.0, 1.0]}
    params = list(model.parameters())
    assert regularizer() == fused_penalty(params, **strengths)
    assert repr(regularizer).split("\n")[1:4] == [
        "  smooth_l1=0.1, beta=0.5: 2 parameters, 16 elements: 0.weight, 0.bias",
        "  smooth_l1=0.1: 1 parameter, 4 elements: 1.weight",
        "  l1=0.2: 1 parameter, 1 element: 1.bias",
    ]
    report = regularizer.report()
    assert report.rows[-1]["value"] == pytest.approx(regularizer().item(), rel=1e-6)
    assert str(report).split("\n")[0].split() == [
        "elements",
        "l1",
        "l2",
        "l2_norm",
        "smooth_l1",
        "beta",
        "value",
        "norm",
        "zeros",
    ]
    assert report.scalars()["regularizer/group 0/beta"] == 0.5
    state = regularizer.state_dict()
    assert Regularizer.from_config(regularizer.get_config(), model)() == regularizer()
    regularizer.set_strength(smooth_l1=lambda step: 0.1 * (step + 1), beta=2.0)
    regularizer.advance()
    assert regularizer() == fused_penalty(params, l1=strengths["l1"], smooth_l1=[0.2, 0.2, 0.2, 0], beta=2.0)
    regularizer.load_state_dict(state)
    assert regularizer() == fused_penalty(params, **strengths)
    other = net()
    regularized(other[0], smooth_l1=0.1, beta=0.5)
    assert Regularizer(other)() == fused_penalty(other[0].weight, smooth_l1=0.1, beta=0.5)
    assert repr(other[0]).startswith("Linear[smooth_l1=0.1, beta=0.5](")


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_attached(mode):
    model, by_hand = net(), net()
    strengths = {"smooth_l1": 0.1, "beta": 0.3}
    optimizer, own = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, by_hand))
    with Regularizer(model, **strengths).attach(optimizer, mode=mode):
        for _ in range(3):
            for m, o in ((model, optimizer), (by_hand, own)):
                o.zero_grad()
                m(torch.ones(3)).sum().backward()
            optimizer.step()
            if mode == "grad":
                accumulate_grad_(by_hand.parameters(), **strengths)
            own.step()
            if mode == "prox":
                prox_(by_hand.parameters(), **strengths, step=0.5)
    assert_same_bits(list(model.parameters()), list(by_hand.parameters()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(dtype):
    w = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max], dtype=dtype)
    _, (grad,) = value_and_grad(w, smooth_l1=0.5, beta=2.0)
    expected = torch.tensor([0.0, 0.0, 0.5, -0.5, torch.nan, 0.5], dtype=dtype)
    assert_same_bits([grad], [expected])
    assert fused_penalty(w[:2], smooth_l1=0.5) == 0
    assert fused_penalty(w[:4], smooth_l1=0.5) == torch.inf
    assert fused_penalty(w, smooth_l1=0.5).isnan()
    x = w.clone()
    prox_(x, smooth_l1=0.5, beta=2.0, step=1.0)
    assert x.isnan().tolist() == w.isnan().tolist()
    y = w[:-1].clone()
    reference.prox_(y, smooth_l1=0.5, beta=2.0, step=1.0)
    assert y.isnan().tolist() == w[:-1].isnan().tolist()
    assert x[2:4].tolist() == w[2:4].tolist()
