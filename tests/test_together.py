"""``together``: groups of several parameters, as a neuron's weights and its bias, or a channel and its normalization.

The truth is the norm of what is concatenated, in float64."""

import pytest
import torch
from oracle import assert_same_bits
from torch import nn

from fused_reg import NORMS, Regularizer

CHANNELS, NEURONS = ("0.weight", "0.bias", "1.weight", "1.bias"), ("4.weight", "4.bias")
RULES = ["bias", NORMS]
#: What is given, and the sets that it means.
WAYS = {
    "rules": (RULES, [CHANNELS, NEURONS]),
    "bias": ("bias", [CHANNELS[:2], NEURONS, ("1.weight",), ("1.bias",)]),
    "norms": (NORMS, [(CHANNELS[0], *CHANNELS[2:]), ("0.bias",), ("4.weight",), ("4.bias",)]),
    "type": (nn.BatchNorm2d, [(CHANNELS[0], *CHANNELS[2:]), ("0.bias",), ("4.weight",), ("4.bias",)]),
    "names": ([CHANNELS, NEURONS[::-1]], [CHANNELS, NEURONS]),
    "patterns": ([("0.*", "1.*")], [CHANNELS, ("4.weight",), ("4.bias",)]),
    "a rule and names": (["bias", ("1.weight", "1.bias")], [CHANNELS[:2], CHANNELS[2:], NEURONS]),
}


def make_net(dtype=torch.float64, device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()
    return net.to(device)


def joined(net, names) -> torch.Tensor:
    """[groups, elements] float64: those of parameters whose groups are one."""
    params = dict(net.named_parameters())
    return torch.cat([params[name].double().flatten(1) if params[name].ndim > 1 else params[name].double()[:, None]
                      for name in names], 1)  # fmt: skip


def penalty_of(net, sets, l2_norm, weights=None) -> torch.Tensor:
    norms = [joined(net, names).norm(dim=1) for names in sets]
    weights = [torch.ones_like(own) for own in norms] if weights is None else weights
    return l2_norm * sum((w * own).sum() for w, own in zip(weights, norms, strict=True))


def prox_of(net, sets, threshold, l1=0.0, shrink=1.0) -> list[torch.Tensor]:
    """[groups, elements] of each set after the step, by the closed form of one concatenated tensor."""
    found = []
    for names in sets:
        w = joined(net, names).detach()
        w = w.sign() * (w.abs() - l1).clamp(min=0)
        norms = w.norm(dim=1, keepdim=True)
        found.append(torch.where(norms > threshold, w * (1 - threshold / norms), 0) / shrink)
    return found


def assert_near(found, expected, rtol=1e-12, atol=1e-14):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("way", WAYS)
def test_values_gradients_and_steps(way, device):
    together, sets = WAYS[way]
    net = make_net(device=device)
    params = [*net.parameters()]
    regularizer = Regularizer(net, l2_norm=0.3, l1=0.1, group="output", together=together)
    value = regularizer()
    expected = penalty_of(net, sets, 0.3) + 0.1 * sum(p.abs().sum() for p in params)
    grads = torch.autograd.grad(expected, params)
    assert_near(value.detach(), expected.detach())
    assert_near(torch.autograd.grad(2 * value, params), tuple(2 * g for g in grads))
    params[0].grad = torch.ones_like(params[0])
    assert_near(regularizer.accumulate_grad_(0.5), expected.detach())
    assert_near([p.grad for p in params], [(i == 0) + 0.5 * g for i, g in enumerate(grads)])
    after = prox_of(net, sets, 3.0 * 0.3, l1=0.3)
    regularizer.prox_(3.0)
    for names, own in zip(sets, after, strict=True):
        assert_near(joined(net, names).detach(), own)


def test_a_group_is_zero_in_all_members_or_in_none():
    net = make_net()
    step = joined(net, NEURONS).norm(dim=1).median().item()
    Regularizer(net, l2_norm=1.0, group="output", together=RULES).prox_(step)
    for names in (CHANNELS, NEURONS):
        is_zero = joined(net, names) == 0
        assert (is_zero.all(1) | ~is_zero.any(1)).all()
    assert (joined(net, NEURONS) == 0).all(1).sum() == 3
    alone = make_net()
    Regularizer(alone, l2_norm=1.0, group="output").prox_(step)
    assert not alone[4].bias.any()


def test_a_step_is_optimal():
    """What is zero has a subgradient that makes it so; elsewhere the gradient of ``½ ||x - w||² + step * penalty``
    is 0."""
    net = make_net()
    before = {names: joined(net, names).detach() for names in (CHANNELS, NEURONS)}
    softened = {names: w.sign() * (w.abs() - 0.2).clamp(min=0) for names, w in before.items()}
    strength = softened[NEURONS].norm(dim=1).median().item() / 2
    Regularizer(net, l1=0.1, l2=0.2, l2_norm=strength, group="output", together=RULES).prox_(2.0)
    for names, w in before.items():
        x = joined(net, names).detach()
        is_zero = (x == 0).all(1)
        assert not is_zero.all()
        assert names == CHANNELS or is_zero.any()
        assert (softened[names][is_zero].norm(dim=1) <= 2 * strength).all()
        x, w = x[~is_zero], w[~is_zero]
        slope = x - w + 2 * (strength * x / x.norm(dim=1, keepdim=True) + 0.4 * x)
        assert_near(slope[x != 0], -0.2 * x.sign()[x != 0], rtol=0, atol=1e-13)
        assert (slope[x == 0].abs() <= 0.2 + 1e-13).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    """Also mixed: a normalization layer in float32."""
    net = make_net(dtype)
    net[1].float()
    regularizer = Regularizer(net, l2_norm=0.3, group="output", together=RULES)
    value = regularizer()
    exact = make_net()
    exact.load_state_dict(net.state_dict())
    expected = penalty_of(exact, [CHANNELS, NEURONS], 0.3)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-7)
    value.backward()
    expected.backward()
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e300, 1e-310])
def test_no_overflow_and_no_underflow(scale):
    """The squares of neither are numbers."""
    weight, bias = nn.Parameter(torch.ones(2, 4).double() * scale), nn.Parameter(torch.ones(2).double() * 2 * scale)
    given = {"group": "row", "together": [("w", "b")]}
    named = [("w", weight), ("b", bias)]
    norm = 8**0.5
    regularizer = Regularizer(named, l2_norm=0.5, **given)
    value = regularizer()
    rtol = 1e-12 if scale > 1e-300 else 1e-6  # subnormal numbers have fewer digits
    assert value.item() / scale == pytest.approx(norm, rel=rtol)
    value.backward()
    for grad, share in ((weight.grad, 1), (bias.grad, 2)):
        assert_near(grad, torch.full_like(grad, 0.5 * share / norm), rtol=rtol)
    weight.grad = bias.grad = None
    regularizer.accumulate_grad_()
    assert_near(bias.grad, torch.full_like(bias, 1 / norm), rtol=rtol)
    Regularizer(named, l2_norm=norm * scale, **given).prox_(0.5)
    assert_near(weight.detach() / scale, torch.full((2, 4), 0.5).double(), rtol=max(rtol, 1e-12))
    assert_near(bias.detach() / scale, torch.ones(2).double(), rtol=max(rtol, 1e-12))
    Regularizer(named, l2_norm=norm * scale, **given).prox_(1.0)
    assert not weight.any()
    assert not bias.any()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(number):
    net = make_net()
    with torch.no_grad():
        net[4].bias[2] = number
    regularizer = Regularizer(net, l2_norm=0.3, group="output", together=RULES)
    value = regularizer()
    assert value == number or (value.isnan() and number != number)
    value.backward()
    others = torch.arange(5) != 2
    assert net[4].weight.grad[others].isfinite().all()
    assert net[0].weight.grad.isfinite().all()
    assert net[4].weight.grad[2].isnan().all() if number != number else (net[4].weight.grad[2] == 0).all()
    regularizer.prox_(1.0)
    assert net[4].weight[others].isfinite().all()
    assert net[4].weight[2].isnan().all() or number == number


def test_zeros_have_a_gradient_of_zero():
    net = make_net()
    with torch.no_grad():
        net[4].weight[1] = net[4].bias[1] = 0  # a whole group
        net[4].weight[2] = 0  # all of it but its bias
    Regularizer(net, l2_norm=0.3, group="output", together=RULES)().backward()
    assert not net[4].weight.grad[1:3].any()
    assert net[4].bias.grad[1] == 0
    assert net[4].bias.grad[2].abs() == pytest.approx(0.3)


def test_a_frozen_member_is_not_in_its_group():
    net = make_net()
    regularizer = Regularizer(net, l2_norm=0.3, group="output", together=RULES)
    net[4].bias.requires_grad_(False)
    net[0].weight.requires_grad_(False)
    before = [net[4].bias.clone(), net[0].weight.clone()]
    sets = [CHANNELS[1:], NEURONS[:1]]
    assert_near(regularizer().detach(), penalty_of(net, sets, 0.3).detach())
    after = prox_of(net, sets, 1.2)
    regularizer.prox_(4.0)
    for names, own in zip(sets, after, strict=True):
        assert_near(joined(net, names).detach(), own)
    assert_same_bits([net[4].bias, net[0].weight], before)
    net[4].bias.requires_grad_(True)
    assert_near(regularizer().detach(), penalty_of(net, [CHANNELS[1:], NEURONS], 0.3).detach())


def test_parameters_that_are_not_in_a_set_keep_their_bits():
    net, other = make_net(torch.float32), make_net(torch.float32)
    given = {"l1": 0.1, "l2_norm": 0.3, "group": "output"}
    joint = Regularizer(net, **given, together=[CHANNELS])
    alone = Regularizer(other, **given)
    joint.accumulate_grad_()
    alone.accumulate_grad_()
    joint.prox_(0.5)
    alone.prox_(0.5)
    for own, expected in zip(net[4].parameters(), other[4].parameters(), strict=True):
        assert_same_bits([own, own.grad], [expected, expected.grad])


def test_the_value_is_rounded_once():
    """The sums of both calls, of what has sets and of what has none, are float64."""
    net = make_net(torch.float32)
    exact = make_net()
    exact.load_state_dict(net.state_dict())
    sets = [CHANNELS, *((name,) for name in NEURONS)]
    value = Regularizer(net, l2_norm=0.3, group="output", together=[CHANNELS])()
    assert value.item() == penalty_of(exact, sets, 0.3).float().item()


def test_a_neuron_with_what_reads_it():
    """A row, a bias, and a column of the next layer."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    sets = [("0.*", "2.weight")]
    rules = [("2.weight", {"group": ("column", 2)})]
    regularizer = Regularizer(net, l2_norm=0.3, group=("row", 2), rules=rules, together=sets)

    def neurons():
        return torch.cat([net[0].weight, net[0].bias[:, None], net[2].weight.T], 1).reshape(3, -1)

    value, expected = regularizer(), 0.3 * neurons().norm(dim=1).sum()
    assert_near(value.detach(), expected.detach())
    params = [*net.parameters()]
    assert_near(torch.autograd.grad(value, params), torch.autograd.grad(expected, params))
    before = neurons().detach()
    regularizer.prox_(1.0)
    assert_near(neurons().detach(), before * (1 - 0.3 / before.norm(dim=1, keepdim=True)))
    assert regularizer.report().total["value"] == pytest.approx(regularizer().item(), rel=1e-12)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(3, 4, 2), nn.ConvTranspose1d(2, 5, 3)], ids=["2d", "1d"])
def test_columns_with_rows(layer):
    """The outputs of a transposed convolution are columns of its weight, and elements of its bias."""
    layer = layer.double()
    with torch.no_grad():
        layer.bias.normal_()
    regularizer = Regularizer(layer, l2_norm=0.3, l1=0.1, group="output", together="bias")

    def channels():
        return torch.cat([layer.weight.transpose(0, 1).flatten(1), layer.bias[:, None]], 1)

    expected = 0.3 * channels().norm(dim=1).sum() + 0.1 * channels().abs().sum()
    params = [*layer.parameters()]
    grads = torch.autograd.grad(expected, params)
    value = regularizer()
    assert_near(value.detach(), expected.detach())
    assert_near(torch.autograd.grad(value, params), grads)
    regularizer.accumulate_grad_()
    regularizer.accumulate_grad_()
    assert_near([p.grad for p in params], [2 * g for g in grads])
    assert regularizer.report().total["value"] == pytest.approx(expected.item(), rel=1e-12)
    before = channels().detach()
    soft = before.sign() * (before.abs() - 0.1).clamp(min=0)
    regularizer.prox_(1.0)
    assert_near(channels().detach(), soft * (1 - 0.3 / soft.norm(dim=1, keepdim=True)).clamp(min=0))
    regularizer.set_strength(l2_norm=100.0)
    regularizer.prox_(1.0)
    report = regularizer.report()
    assert report["weight"]["zero_slices"] == report["weight"]["slices"] == len(layer.bias)


def test_heads_of_attention():
    """Groups of several rows, and of whole tensors."""
    query = nn.Linear(6, 8).double()
    regularizer = Regularizer(query, l2_norm=0.3, group=("row", 4), together="bias")
    whole = torch.cat([query.weight, query.bias[:, None]], 1)
    assert_near(regularizer().detach(), 0.3 * whole.reshape(2, -1).norm(dim=1).sum().detach())
    layer = Regularizer(query, l2_norm=0.3, together="bias")
    assert_near(layer().detach(), 0.3 * whole.norm().detach())
    row = layer.report()["weight"]
    assert row["value"] == pytest.approx(0.3 * whole.norm().item())


def test_parameters_without_elements():
    named = [("w", nn.Parameter(torch.ones(0, 4))), ("b", nn.Parameter(torch.ones(0)))]
    regularizer = Regularizer(named, l2_norm=0.3, group="row", together=[("w", "b")])
    value = regularizer()
    assert value == 0
    value.backward()
    regularizer.prox_(1.0)
    assert regularizer.report()["w"]["zero_slices"] == 0
