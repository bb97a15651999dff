"""`Regularizer.attach` under what loops do: closures, loss scales, clipping, accumulation."""

import pytest
import torch
from oracle import assert_same_bits
from test_attach import X, Y, loss_of, make
from torch import nn

from fused_reg import Regularizer, fused_penalty, reference

BOTH = {"l1": 1e-2, "l2": 1e-2}


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_minimizes_the_penalized_loss(line_search):
    """Each evaluation of the closure has gradient and value; the penalty is not added a second time."""

    def run(attached):
        net = make().double()
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.5, max_iter=10, line_search_fn=line_search)
        regularizer = Regularizer(net, l2=1e-2)
        attachment = regularizer.attach(optimizer) if attached else None
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net(X.double()), Y.double())
            if not attached:
                loss = loss + regularizer()
            loss.backward()
            return loss

        for _ in range(5):
            losses.append(optimizer.step(closure).item())
            assert regularizer.step == (len(losses) if attached else 0)
        if attachment is not None:
            assert 0 < attachment.value.item() < losses[-1]
        return losses, [p.detach() for p in net.parameters()]

    (losses, params), (expected_losses, expected) = run(True), run(False)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=0)
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("as_float", [False, True])
def test_a_closure_of_sgd(by_name, as_float):
    net, plain = make(), make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, **BOTH).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss.item() if as_float else loss

    loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    expected = loss_of(plain) + fused_penalty(plain.parameters(), **BOTH)
    expected.backward()
    torch.testing.assert_close(torch.as_tensor(loss).detach(), expected.detach())
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_two_penalties_with_a_closure_that_returns_nothing():
    net, plain = make(), make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=1e-2).attach(optimizer)
    Regularizer(net, l2=1e-2).attach(optimizer)

    def closure():
        optimizer.zero_grad()
        loss_of(net).backward()

    assert optimizer.step(closure) is None
    (loss_of(plain) + fused_penalty(plain.parameters(), **BOTH)).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_grad_scaler(kind, fused, unscale_first, device):
    """Recurring bug: the penalty is added to gradients under a loss scale as if they had none, or scaled twice."""

    def run(scale):
        net = make(device)
        optimizer = kind(net.parameters(), lr=0.1, fused=fused)
        attachment = Regularizer(net, **BOTH).attach(optimizer)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=scale > 0)
        for _ in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(net)).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            before = fused_penalty(net.parameters(), **BOTH).detach()
            scaler.step(optimizer)
            scaler.update()
            assert_same_bits([attachment.value], [before])
        return [p.detach() for p in net.parameters()]

    torch.testing.assert_close(run(1024.0), run(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("maximized", [(True, True), (False, True)])
def test_grad_scaler_where_gradients_are_maximized(maximized, fused, device):
    """Sign and scale are the gradient's; the value has neither."""

    def run(scale):
        net = make(device)
        groups = [{"params": p, "maximize": m} for p, m in zip(net.parameters(), maximized, strict=True)]
        optimizer = torch.optim.SGD(groups, lr=0.1, fused=fused)
        attachment = Regularizer(net, **BOTH).attach(optimizer)
        scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=scale > 0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(net)).backward()
            before = fused_penalty(net.parameters(), **BOTH).detach()
            scaler.step(optimizer)
            scaler.update()
            assert_same_bits([attachment.value], [before])
        return [p.detach() for p in net.parameters()]

    torch.testing.assert_close(run(1024.0), run(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.25)])
def test_grad_scaler_and_prox(fused, rates, device):
    """A step that is skipped because of an infinite gradient has no proximal step either."""
    net = make(device)
    groups = [{"params": p, "lr": lr} for p, lr in zip(net.parameters(), rates, strict=True)]
    optimizer = torch.optim.SGD(groups, fused=fused)
    Regularizer(net, l1=0.25).attach(optimizer, mode="prox")
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    params = list(net.parameters())
    for factor in (torch.inf, 0.0):
        before = [p.detach().clone() for p in params]
        optimizer.zero_grad()
        scaler.scale(sum(p.sum() for p in params) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == 0:
            reference.prox_(before, l1=0.25, step=list(rates))
        torch.testing.assert_close([p.detach() for p in params], before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["grad", "prox"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
def test_a_compiled_step(mode, backend):
    def run(compiled):
        net = make()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        Regularizer(net, l1=lambda step: 0.01 * (1 + step), l2=0.01).attach(optimizer, mode)
        step = torch.compile(lambda: optimizer.step(), backend=backend) if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(net).backward()
            step()
        return [p.detach() for p in net.parameters()]

    torch.testing.assert_close(run(True), run(False))


def test_clipping_comes_first():
    """The gradient of the loss is clipped, that of the penalty is added whole."""
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l2=10.0).attach(optimizer)
    loss_of(net).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
    clipped = [p.grad.clone() for p in net.parameters()]
    expected = [g + 20.0 * p.detach() for g, p in zip(clipped, net.parameters(), strict=True)]
    optimizer.step()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_gradient_accumulation():
    """Recurring bug: added once per micro-batch instead of once per step."""
    net, plain = make(), make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, **BOTH).attach(optimizer)
    for part in range(4):
        rows = slice(8 * part, 8 * part + 8)
        (nn.functional.mse_loss(net(X[rows]), Y[rows]) / 4).backward()
    optimizer.step()
    (loss_of(plain) + fused_penalty(plain.parameters(), **BOTH)).backward()
    torch.testing.assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])


def test_a_layer_whose_input_requires_grad():
    """Recurring bug: a backward hook that sets `.grad` has no effect there."""
    net = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer)
    loss_of(net).backward()
    expected = [p.grad + 0.5 * p.detach().sign() for p in net.parameters()]
    optimizer.step()
    torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_a_sparse_gradient_is_an_error():
    net = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer)
    net(torch.tensor([1])).sum().backward()
    before = net.weight.detach().clone()
    with pytest.raises(TypeError, match=r"accumulate_grad_: params\['weight'\].grad must be dense .*sparse=False"):
        optimizer.step()
    assert_same_bits([net.weight.detach()], [before])
