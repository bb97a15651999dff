"""`Regularizer.attach`: the penalty in an optimizer's steps."""

import copy
import gc
import re
import weakref

import pytest
import torch
from oracle import assert_same_bits
from samples import draw
from test_regularizer import make_net
from torch import nn

from fused_reg import Regularizer, fused_penalty, reference

X, Y = draw((32, 7)), draw((32, 5), seed=1)


def make(device="cpu", bias=True) -> nn.Module:
    return filled(nn.Linear(7, 5, bias=bias).to(device))


def filled(net: nn.Module) -> nn.Module:
    for i, p in enumerate(net.parameters()):
        p.data.copy_(draw(p.shape, device=p.device, seed=i))
    return net


def loss_of(net) -> torch.Tensor:
    device = next(net.parameters()).device
    return nn.functional.mse_loss(net(X.to(device)), Y.to(device))


def train(net, optimizer, steps) -> list[torch.Tensor]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def step(optimizer) -> None:
    """With gradients of zeros: a step without any is none."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
        (torch.optim.Adam, {"lr": 0.01}),
        (torch.optim.Adam, {"lr": 0.01, "fused": True}),
        (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
        (torch.optim.NAdam, {"lr": 0.01}),
        (torch.optim.Adagrad, {"lr": 0.01}),
    ],
)
def test_weight_decay_is_twice_l2(kind, options):
    """The same trajectory within rounding, over 200 steps."""
    objective = -1 if options.get("maximize") else 1  # a penalty shrinks the weights either way

    def run(weight_decay):
        net = make().double()
        optimizer = kind(net.parameters(), **options, weight_decay=weight_decay)
        if not weight_decay:
            Regularizer(net, l2=1e-2).attach(optimizer)
        for _ in range(200):
            optimizer.zero_grad()
            (objective * nn.functional.mse_loss(net(X.double()), Y.double())).backward()
            optimizer.step()
        return [p.detach() for p in net.parameters()]

    torch.testing.assert_close(run(0), run(2e-2), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_same_as_in_the_loss(set_to_none, device):
    """To the bit: the gradient of the loss, plus that of the penalty."""
    expected, actual = make(device), make(device)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (expected, actual)]
    regularizer = Regularizer(actual, l1=1e-2, l2=1e-3)
    attachment = regularizer.attach(optimizers[1])
    assert_same_bits([attachment.value], [regularizer().detach()])  # before the first step the penalty now
    assert f"{attachment.value:.3f}" == f"{regularizer():.3f}"
    for _ in range(10):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        penalty = fused_penalty(expected.parameters(), l1=1e-2, l2=1e-3)
        loss_of(expected).backward()
        penalty.backward()
        loss_of(actual).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits([attachment.value], [penalty.detach()])
        assert not attachment.value.requires_grad
        assert_same_bits([p.detach() for p in actual.parameters()], [p.detach() for p in expected.parameters()])


def test_prox_is_ista_and_makes_exact_zeros():
    """At rest zero lies in the subdifferential of the penalized loss, with exact zeros where its gradient is small."""
    net = make(bias=False).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    attachment = Regularizer(net, l1=0.02, l2=0.01).attach(optimizer, mode="prox")
    for _ in range(500):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(X.double()), Y.double()).backward()
        optimizer.step()
    optimizer.zero_grad()
    nn.functional.mse_loss(net(X.double()), Y.double()).backward()
    w, slope = net.weight.detach(), net.weight.grad + 0.02 * net.weight.detach()
    zero = w == 0
    assert 5 <= zero.sum() <= 30
    assert (slope[zero].abs() <= 0.02).all()
    torch.testing.assert_close(slope[~zero], -0.02 * w[~zero].sign(), rtol=0, atol=1e-9)
    torch.testing.assert_close(attachment.value, reference.fused_penalty([w], l1=0.02, l2=0.01))
    assert not attachment.value.requires_grad


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_prox_takes_each_groups_own_learning_rate(tensor_lr, device):
    net = make_net(device)
    params = list(net.parameters())
    before = [p.detach().clone() for p in params]
    rates = [0.5, 0.25, 0.5]
    groups = [params[2:4], params[5:], [params[0], params[4]]]
    optimizer = torch.optim.SGD(
        [
            {"params": group, "lr": torch.tensor(lr, device=device) if tensor_lr else lr}
            for group, lr in zip(groups, rates, strict=True)
        ],
        lr=1.0,
    )
    rules = [("3.*", {"l1": 0, "l2": 0.25}), ("0.*", {"l1": 0, "l2_norm": 0.3, "group": "row"})]
    regularizer = Regularizer(net, l1=0.1, rules=rules)
    regularizer.attach(optimizer, mode="prox")
    with pytest.warns(UserWarning, match="of the regularizer must be in an attached optimizer"):
        step(optimizer)
    for i, lr in zip((2, 3, 4), (0.5, 0.5, 0.5), strict=True):
        reference.prox_([before[i]], l1=0.1, step=lr)
    reference.prox_([before[5]], l1=0.1, step=0.25)
    reference.prox_(before[6:], l2=0.25, step=0.25)
    reference.prox_(before[:1], l2_norm=0.3, group="row", step=0.5)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=1e-6, atol=1e-7)
    assert_same_bits([params[1]], [before[1]])  # no optimizer holds it


def test_prox_copies_no_index_twice(device, monkeypatch):
    """Several learning rates, some in tensors: a copy to a GPU is waited for, and a CUDA graph takes none."""
    params = [nn.Parameter(draw(9, device=device, seed=seed)) for seed in range(3)]
    expected = [p.detach().clone() for p in params]
    rates = [torch.tensor(0.5, device=device), 0.25, 0.25]
    optimizer = torch.optim.SGD([{"params": p, "lr": lr} for p, lr in zip(params, rates, strict=True)])
    Regularizer(params, l1=0.1).attach(optimizer, mode="prox")
    step(optimizer)
    monkeypatch.setattr(torch, "tensor", lambda *_, **__: pytest.fail("a tensor was made of numbers"))
    step(optimizer)
    monkeypatch.undo()
    optimizer.param_groups[2]["lr"] = 0.125
    step(optimizer)
    for third in (0.25, 0.25, 0.125):
        reference.prox_(expected, l1=0.1, step=[0.5, 0.25, third])
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_prox_follows_the_scheduler():
    """The step of each proximal operator is the learning rate that the optimizer's step had."""
    w = nn.Parameter(torch.tensor([8.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    Regularizer([w], l1=1.0).attach(optimizer, mode="prox")
    for _ in range(3):
        w.grad = torch.zeros(1)
        optimizer.step()
        scheduler.step()
    assert w.item() == 8 - 1 - 0.5 - 0.25


def test_prox_decouples_from_adams_metric():
    """As AdamW's decay: the shrinkage is lr * l1, however large the gradients are."""
    for size in (1e-3, 1e3):
        w = nn.Parameter(torch.tensor([8.0, -8.0], dtype=torch.float64))
        plain = nn.Parameter(w.detach().clone())
        Regularizer([w], l1=1.0).attach(attached := torch.optim.Adam([w], lr=0.5), mode="prox")
        for p, optimizer in ((w, attached), (plain, torch.optim.Adam([plain], lr=0.5))):
            p.grad = torch.tensor([size, size], dtype=torch.float64)
            optimizer.step()
        torch.testing.assert_close(w.detach(), plain.detach() - 0.5 * plain.detach().sign())


def test_schedules_advance_once_per_step():
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([w], lr=1.0)
    regularizer = Regularizer([w], l1=lambda step: 0.25**step)
    regularizer.attach(optimizer)
    for count in range(3):
        w.data.fill_(1.0)
        step(optimizer)
        assert w.grad.item() == 0.25**count
        assert regularizer.step == count + 1


def test_several_optimizers():
    """Each handles its own; the schedule counts the steps of the first."""
    net = make_net()
    params = list(net.parameters())
    first, second = torch.optim.SGD(params[:4], lr=0.1), torch.optim.Adam(params[4:], lr=0.1)
    regularizer = Regularizer(net, l1=lambda step: 1 + step)
    attachments = [regularizer.attach(first), regularizer.attach(second, mode="prox")]
    signs = [p.detach().sign() for p in params[:4]]
    step(first)
    assert regularizer.step == 1
    torch.testing.assert_close([p.grad for p in params[:4]], signs)
    assert all(p.grad is None for p in params[4:])
    before = [p.detach().clone() for p in params[4:]]
    step(second)
    assert regularizer.step == 1
    reference.prox_(before, l1=2.0, step=0.1)
    torch.testing.assert_close([p.detach() for p in params[4:]], before)
    torch.testing.assert_close(attachments[1].value, reference.fused_penalty(before, l1=2.0))
    attachments[0].remove()
    step(second)
    assert regularizer.step == 2


def test_detaching():
    net = make()
    regularizer = Regularizer(net, l1=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with regularizer.attach(optimizer) as attachment:
        step(optimizer)
        assert net.weight.grad.any()
    assert not attachment.is_active
    attachment.remove()
    step(optimizer)
    assert not net.weight.grad.any()
    regularizer.attach(optimizer, mode="prox")  # now it may be attached again


def test_nothing_keeps_an_optimizer_alive():
    net = make()
    regularizer = Regularizer(net, l1=0.5)
    gone = []
    gc.disable()
    try:
        for mode in ("grad", "prox"):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            regularizer.attach(optimizer, mode=mode)
            step(optimizer)
            gone.append(weakref.ref(optimizer))
            del optimizer
    finally:
        gc.enable()
    assert [ref() for ref in gone] == [None, None]


def test_parameters_that_an_optimizer_gets_later():
    net = make_net()
    params = list(net.parameters())
    optimizer = torch.optim.SGD(params[:2], lr=0.5)
    Regularizer(params[:4], l1=0.25).attach(optimizer, mode="prox")
    with pytest.warns(UserWarning, match="'2' and 1 more of the regularizer must be in an attached optimizer"):
        step(optimizer)
    before = [p.detach().clone() for p in params[:4]]
    optimizer.add_param_group({"params": params[2:4], "lr": 0.25})
    step(optimizer)
    reference.prox_(before, l1=0.25, step=[0.5, 0.5, 0.25, 0.25])
    torch.testing.assert_close([p.detach() for p in params[:4]], before)


@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_parameter_that_a_second_optimizer_gets_later(mode):
    """The error comes before the step."""
    net = make()
    first, second = torch.optim.SGD([net.weight], lr=0.1), torch.optim.SGD([net.bias], lr=0.1)
    regularizer = Regularizer(net, l1=0.5)
    regularizer.attach(first)
    regularizer.attach(second, mode)
    second.add_param_group({"params": [net.weight]})
    net.weight.grad = torch.ones(5, 7)
    before = net.weight.detach().clone()
    with pytest.raises(ValueError, match="another attachment handles 'weight' already"):
        second.step()
    assert_same_bits([net.weight.detach()], [before])


def test_freezing_is_followed():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.5).attach(optimizer)
    net.weight.requires_grad_(False)
    step(optimizer)
    assert net.weight.grad is None
    net.weight.requires_grad_()
    expected = 0.5 * net.weight.detach().sign() + 0.0
    step(optimizer)
    assert_same_bits([net.weight.grad], [expected])


def test_state_dicts_and_copies():
    """A checkpoint continues as if it had not stopped; copies are not attached, which a step of theirs says."""
    net = make()
    regularizer = Regularizer(net, l1=lambda step: 0.01 * (1 + step))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    regularizer.attach(optimizer)
    train(net, optimizer, 5)
    states = copy.deepcopy((net.state_dict(), optimizer.state_dict(), regularizer.state_dict()))
    expected = [p.clone() for p in train(net, optimizer, 5)]

    again = make()
    resumed = Regularizer(again, l1=lambda step: 0.01 * (1 + step))
    fresh = torch.optim.Adam(again.parameters(), lr=0.01)
    resumed.attach(fresh)
    for target, state in zip((again, fresh, resumed), states, strict=True):
        target.load_state_dict(state)
    assert_same_bits(train(again, fresh, 5), expected)

    copied_net, copied_optimizer, copied = copy.deepcopy((net, optimizer, regularizer))
    with pytest.warns(UserWarning, match="'weight' has its penalty in the steps of an optimizer that is gone"):
        step(copied_optimizer)
    assert not copied_net.weight.grad.any()
    assert copied.step == 10
    copied.attach(copied_optimizer)
    step(copied_optimizer)
    assert copied_net.weight.grad.any()


@pytest.mark.parametrize(
    ("optimizer", "mode", "error", "message"),
    [
        (lambda net: net, "grad", TypeError, "attach: optimizer must be a torch.optim.Optimizer, got Linear"),
        (
            lambda net: torch.optim.SGD(net.parameters()),
            "proximal",
            ValueError,
            'attach: mode must be "grad", "prox" or "preconditioned", got \'proximal\'',
        ),
        (
            lambda net: torch.optim.SGD([nn.Parameter(torch.ones(2))]),
            "grad",
            ValueError,
            "attach: optimizer must hold a parameter of the regularizer, got one that holds none",
        ),
        (
            lambda net: torch.optim.Adafactor([{"params": net.parameters(), "lr": None}]),
            "prox",
            ValueError,
            'attach: mode "prox" must find a learning rate in each group of a regularized parameter, got lr=None in '
            'group 0; mode "grad" needs none',
        ),
    ],
)
def test_errors(optimizer, mode, error, message):
    net = make()
    with pytest.raises(error, match=re.escape(message)):
        Regularizer(net, l1=0.5).attach(optimizer(net), mode=mode)


def test_attached_twice():
    net = make()
    regularizer = Regularizer(net, l1=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = regularizer.attach(optimizer)
    for mode in ("grad", "prox"):
        with pytest.raises(
            ValueError, match="attach: optimizer must be attached once, got one that is attached already"
        ):
            regularizer.attach(optimizer, mode)
    Regularizer(net, l2=0.5).attach(optimizer)  # another penalty is welcome
    step(optimizer)
    torch.testing.assert_close(attachment.value, reference.fused_penalty([*make().parameters()], l1=0.5).detach())


def test_a_warning_that_l2_counts_twice():
    """Recurring bug: weight_decay set as well."""
    net = make()
    message = (
        r"^attach: L2 counts twice for 'weight': l2 of the regularizer, and weight_decay=0.01 in the optimizer's "
        "group 0; set one of them to 0$"
    )
    optimizer = torch.optim.AdamW(net.parameters())
    with pytest.warns(UserWarning, match=message) as caught:
        Regularizer(net, l2=0.5).attach(optimizer)
    assert [(w.filename, w.category) for w in caught] == [(__file__, UserWarning)]
    optimizer.step()
    Regularizer(net, l1=0.5).attach(optimizer)  # no l2
    Regularizer(net, l2=0.5).attach(torch.optim.Adam(net.parameters()))
    Regularizer(net, l2=0.5, exclude="bias").attach(
        torch.optim.SGD([{"params": net.weight, "weight_decay": 0}, {"params": net.bias, "weight_decay": 1.0}])
    )
