"""Mixed precision: the penalty beside autocast, under a loss scale, and over parameters of half precision."""

import pytest
import torch
from oracle import assert_same_bits, assert_value
from samples import HALF_DTYPES
from test_attach import X, Y, filled, loss_of
from torch import nn

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, reference

BOTH = {"l1": 1e-2, "l2": 1e-2}
FORMS = {
    "both": BOTH,
    "norms": {"l1": 1e-2, "l2_norm": 0.1},
    "rows": {"l2": 1e-2, "l2_norm": 0.1, "group": "row"},
}
SCALE = 1024.0  # a power of two: what is multiplied and divided by it keeps its bits
LR = 0.1


def make(device, dtype=torch.float32) -> nn.Module:
    return filled(nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 5)).to(device)).to(dtype)


def params_of(net) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def scaler_on(device, enabled=True) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, init_scale=SCALE, enabled=enabled)


# Autocast


@pytest.mark.parametrize("compute", [None, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_with_autocast(form, compute, device):
    """Inside of the region and outside: the same value and gradient, to the bit, as without autocast."""
    net = make(device)
    regularizer = Regularizer(net, **FORMS[form])
    plain = regularizer()
    grads = torch.autograd.grad(plain, list(net.parameters()))
    with torch.autocast(device.type, compute, enabled=compute is not None):
        assert net(X.to(device)).dtype == (compute or torch.float32)
        inside = regularizer()
        loss = nn.functional.mse_loss(net(X.to(device)), Y.to(device))
        total = loss + inside
    assert total.dtype == torch.float32
    assert_value(inside.detach(), params_of(net), **FORMS[form])
    assert_same_bits([inside.detach()], [plain.detach()])
    own = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    total.backward()
    assert_same_bits([p.grad for p in net.parameters()], [a + b for a, b in zip(own, grads, strict=True)])


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_with_autocast(form, device):
    """Of trained strengths, and of a gradient: sums and products of the general path are not cast down."""
    params = [p.detach().double().requires_grad_() for p in make(device).parameters()]
    strength = torch.tensor(0.3, dtype=torch.float64, device=device, requires_grad=True)
    forms = {**FORMS[form], "l2": strength}

    def derivatives():
        penalty = fused_penalty(params, **forms)
        grads = torch.autograd.grad(penalty, [strength, *params], create_graph=True)
        return [penalty, *grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), [strength, *params])]

    expected = derivatives()
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_bits(derivatives(), expected)


# A loss scale


def composed(net, optimizer, scaler, loss):
    scaler.scale(loss + fused_penalty(net.parameters(), **BOTH)).backward()


def before_unscaling(net, optimizer, scaler, loss):
    scaler.scale(loss).backward()
    one = torch.ones((), device=loss.device)
    accumulate_grad_(net.parameters(), **BOTH, scale=scaler.scale(one))


def before_unscaling_with_a_float(net, optimizer, scaler, loss):
    scaler.scale(loss).backward()
    accumulate_grad_(net.parameters(), **BOTH, scale=scaler.get_scale())


def after_unscaling(net, optimizer, scaler, loss):
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    accumulate_grad_(net.parameters(), **BOTH)


def attached(net, optimizer, scaler, loss):
    scaler.scale(loss).backward()


def attached_and_unscaled(net, optimizer, scaler, loss):
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)


WAYS = (composed, before_unscaling, before_unscaling_with_a_float, after_unscaling, attached, attached_and_unscaled)


def steps_of(way, device, scaled, factors=(1.0,) * 5, fused=False) -> list[torch.Tensor]:
    """Training; the loss of each step is multiplied by a factor. Not scaled: the same lines, with a scale of 1."""
    net = make(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5, fused=fused)
    if way in (attached, attached_and_unscaled):
        Regularizer(net, **BOTH).attach(optimizer)
    scaler = scaler_on(device, scaled)
    for factor in factors:
        optimizer.zero_grad()
        way(net, optimizer, scaler, factor * loss_of(net))
        scaler.step(optimizer)
        scaler.update()
    return params_of(net)


def loop(factors=(1.0,) * 5, prox=False) -> list[torch.Tensor]:
    """The hand-written loop in float64, on the CPU. A step whose factor is infinite is left out."""
    net = make(torch.device("cpu")).double()
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for factor in factors:
        if not 0 <= factor < torch.inf:
            continue
        loss = factor * nn.functional.mse_loss(net(X.double()), Y.double())
        loss = loss if prox else loss + reference.loop(net.parameters(), **BOTH)
        grads = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, m, g in zip(net.parameters(), momentum, grads, strict=True):
                p.sub_(LR * m.mul_(0.5).add_(g))
        if prox:
            reference.prox_([p.data for p in net.parameters()], **BOTH, step=LR)
    return params_of(net)


def assert_near(params, expected) -> None:
    actual = [p.double().cpu() for p in params]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_loss_scale(way, fused, device):
    """The scale is a power of two: the bits are those without one."""
    scaled = steps_of(way, device, True, fused=fused)
    assert_same_bits(scaled, steps_of(way, device, False, fused=fused))
    assert_near(scaled, loop())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_skipped_steps(way, fused, device):
    """Steps with an infinite loss: nothing changes, the scale falls, and training goes on."""
    factors = (1.0, torch.inf, 0.5, torch.inf, torch.inf, 1.0)
    assert_near(steps_of(way, device, True, factors, fused), loop(factors))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_prox_under_a_loss_scale(unscale, fused, device):
    """The proximal step sees no scale, and is skipped with the step."""
    factors = (1.0, torch.inf, 0.5, 1.0)
    net = make(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5, fused=fused)
    Regularizer(net, **BOTH).attach(optimizer, mode="prox")
    scaler = scaler_on(device)
    for factor in factors:
        optimizer.zero_grad()
        scaler.scale(factor * loss_of(net)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert_near(params_of(net), loop(factors, prox=True))


def test_the_scale_as_a_tensor(device):
    """What `scale` gives of a 1: the scale of the step, also after it has changed, and 1 where no scaler is."""
    net = make(device)
    penalty_grads = torch.autograd.grad(fused_penalty(net.parameters(), **BOTH), list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    for scaler, scales in ((scaler_on(device), (SCALE, SCALE / 2)), (scaler_on(device, False), (1.0, 1.0))):
        for scale in scales:
            optimizer.zero_grad()
            accumulate_grad_(net.parameters(), **BOTH, scale=scaler.scale(torch.ones((), device=device)))
            assert_same_bits([p.grad for p in net.parameters()], [scale * g for g in penalty_grads])
            next(net.parameters()).grad[0] = torch.inf
            if scaler.is_enabled():
                scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("way", ["composed", "attached"])
def test_micro_batches_and_clipping(way, device):
    """The penalty once per step. Composed, its share is clipped with the loss's; attached, it comes after the clip."""
    strengths, bound = {"l1": 0.5, "l2": 0.5}, 0.5

    def run(net, scaler=None):
        optimizer = torch.optim.SGD(net.parameters(), lr=LR)
        attachment = Regularizer(net, **strengths).attach(optimizer) if scaler and way == "attached" else None
        penalize = reference.loop if scaler is None else fused_penalty
        for _ in range(3):
            optimizer.zero_grad()
            x, y = X.to(next(net.parameters())), Y.to(next(net.parameters()))
            for part in range(4):
                rows = slice(8 * part, 8 * part + 8)
                loss = nn.functional.mse_loss(net(x[rows]), y[rows])
                if way == "composed":
                    loss = loss + penalize(net.parameters(), **strengths)
                (scaler.scale(loss / 4) if scaler else loss / 4).backward()
            if scaler:
                scaler.unscale_(optimizer)
            assert nn.utils.clip_grad_norm_(net.parameters(), bound) > bound
            if scaler is None and way == "attached":
                penalize(net.parameters(), **strengths).backward()
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
        if attachment is not None:
            attachment.remove()
        return params_of(net)

    assert_near(run(make(device), scaler_on(device)), run(make(torch.device("cpu")).double()))


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_several_optimizers_under_one_scaler(mode, device):
    """Each has its own penalty, and only the one with an infinite gradient skips its step."""
    net = make(device)
    optimizers = [torch.optim.SGD(net[i].parameters(), lr=LR) for i in (0, 2)]
    regularizer = Regularizer(net, **BOTH)
    for optimizer in optimizers:
        regularizer.attach(optimizer, mode)
    scaler = scaler_on(device)
    expected = [p.double() for p in params_of(net)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(loss_of(net)).backward()
        grads = [p.grad.double() / scaler.get_scale() for p in net.parameters()]
        if step == 1:
            net[2].bias.grad[0] = torch.inf
        taken = slice(0, 2) if step == 1 else slice(0, 4)
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        own = expected[taken]
        penalty = torch.autograd.grad(reference.loop(leaves := [p.requires_grad_() for p in own], **BOTH), leaves)
        with torch.no_grad():
            for p, g, of_penalty in zip(own, grads[taken], penalty, strict=True):
                p.requires_grad_(False).sub_(LR * (g + (of_penalty if mode == "grad" else 0)))
        if mode == "prox":
            reference.prox_(own, **BOTH, step=LR)
        torch.testing.assert_close([p.double() for p in params_of(net)], expected, rtol=1e-5, atol=1e-6)
        assert regularizer.step == step + 1


# Parameters of half precision


def in_half(device, dtype) -> nn.Module:
    """Whose gradients are float32."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    net = make(device, dtype)
    for p in net.parameters():
        p.grad_dtype = torch.float32
    return net


def half_loss(net) -> torch.Tensor:
    p = next(net.parameters())
    return nn.functional.mse_loss(net(X.to(p)).float(), Y.to(p.device))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_float32_gradients_of_half_parameters(dtype, scaled, device):
    """Composed: the gradient of half precision, cast. Added to `.grad` or attached: in float32, in full."""
    net, other, plain = (in_half(device, dtype) for _ in range(3))
    scaler = scaler_on(device, scaled)
    scaler.scale(half_loss(plain)).backward()
    scaler.scale(half_loss(net) + fused_penalty(net.parameters(), **BOTH)).backward()
    scale = SCALE if scaled else 1.0
    of_penalty = torch.autograd.grad(scale * fused_penalty(plain.parameters(), **BOTH), list(plain.parameters()))
    expected = [p.grad + g.float() for p, g in zip(plain.parameters(), of_penalty, strict=True)]
    assert [p.grad.dtype for p in net.parameters()] == [torch.float32] * 4
    assert_same_bits([p.grad for p in net.parameters()], expected)

    optimizer = torch.optim.SGD(other.parameters(), lr=LR, foreach=False)
    Regularizer(other, **BOTH).attach(optimizer)
    scaler.scale(half_loss(other)).backward()
    scaler.step(optimizer)
    in_full = [p.float().requires_grad_() for p in params_of(plain)]
    of_penalty = torch.autograd.grad(reference.loop(in_full, **BOTH), in_full)
    expected = [p.grad / scale + g for p, g in zip(plain.parameters(), of_penalty, strict=True)]
    assert_same_bits([p.grad for p in other.parameters()], expected)
    stepped = [p.detach().clone().sub_(g, alpha=LR) for p, g in zip(plain.parameters(), expected, strict=True)]
    assert_same_bits(params_of(other), stepped)


@pytest.mark.parametrize("way", ["composed", "accumulated", "attached", "prox"])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_master_weights(dtype, way, device):
    """The penalty is of the float32 copies that the optimizer holds: strengths below a half's resolution count."""
    strengths = {"l1": 1e-4, "l2": 1e-4}
    net = make(device, dtype)
    masters = [p.requires_grad_() for p in params_of(make(device))]
    exact = [p.detach().double() for p in masters]
    optimizer = torch.optim.SGD(masters, lr=LR)
    regularizer = Regularizer(masters, **strengths)
    if way in ("attached", "prox"):
        regularizer.attach(optimizer, "prox" if way == "prox" else "grad")
    scaler = scaler_on(device)
    for _ in range(5):
        net.zero_grad()
        scaler.scale(half_loss(net)).backward()
        for p, master in zip(net.parameters(), masters, strict=True):
            master.grad = p.grad.float()
        grads = [master.grad.double() / SCALE for master in masters]
        if way == "composed":
            scaler.scale(regularizer()).backward()
        elif way == "accumulated":
            scaler.unscale_(optimizer)
            regularizer.accumulate_grad_()
        scaler.step(optimizer)
        scaler.update()
        if way == "prox":
            exact = [p - LR * g for p, g in zip(exact, grads, strict=True)]
            reference.prox_(exact, **strengths, step=LR)
        else:
            leaves = [p.requires_grad_() for p in exact]
            of_penalty = torch.autograd.grad(reference.loop(leaves, **strengths), leaves)
            exact = [p.detach() - LR * (g + r) for p, g, r in zip(exact, grads, of_penalty, strict=True)]
        torch.testing.assert_close([p.detach().double() for p in masters], exact, rtol=1e-6, atol=1e-7)
        with torch.no_grad():
            for p, master in zip(net.parameters(), masters, strict=True):
                p.copy_(master)
