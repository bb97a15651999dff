"""`Regularizer.attach` and parameters that the loss does not use, and what stays in `.grad`. (Hard case 48.)"""

import pytest
import torch
from oracle import assert_same_bits, assert_value
from ranks import ranks
from samples import draw
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_reg import Regularizer, reference

NAMES = ("body", "first head", "second head")
FORMS = {
    "one call": {"l1": 0.01, "l2": 0.02},
    "two calls": {
        "l2": 0.02,
        "rules": [("body", {"l2": 0.02, "l2_norm": 0.1, "group": "row"}), ("first*", {"l2": 0.02, "l2_norm": 0.1})],
    },
}


class Heads(nn.Module):
    """A head that is not in the loss has no gradient."""

    def __init__(self, device):
        super().__init__()
        for i, name in enumerate(NAMES):
            self.register_parameter(name, nn.Parameter(draw((5, 5), device=device, seed=i).double()))

    def loss(self, head):
        own = dict(self.named_parameters())
        return (own["body"] @ own[head]).square().mean()


def train(net, optimizer, penalty=None, after=None, keep=False):
    """Three steps of one head, one of the other."""
    for head in (NAMES[1], NAMES[1], NAMES[2], NAMES[1]):
        if not keep:
            optimizer.zero_grad()
        loss = net.loss(head)
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        if after:
            after()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("keep", [False, True])
def test_the_same_as_weight_decay(kind, keep, device):
    """Which leaves alone what has no gradient, and keeps the moments as they are."""
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    expected, actual = Heads(device), Heads(device)
    own = kind(actual.parameters(), lr=0.1, **options)
    Regularizer(actual, l2=0.05).attach(own)
    decayed = train(expected, kind(expected.parameters(), lr=0.1, weight_decay=0.1, **options))
    torch.testing.assert_close(train(actual, own), decayed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_head_without_gradient_is_left_alone(mode, form, device):
    net = Heads(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    regularizer = Regularizer(net, **FORMS[form])
    attachment = regularizer.attach(optimizer, mode)
    for head in (NAMES[1], NAMES[2], NAMES[1]):
        optimizer.zero_grad()
        net.loss(head).backward()
        own = dict(net.named_parameters())
        idle = own.pop(NAMES[2] if head == NAMES[1] else NAMES[1])
        before, version, value = idle.detach().clone(), idle._version, regularizer().detach()
        optimizer.step()
        assert idle.grad is None
        assert idle._version == version
        assert_same_bits([idle.detach()], [before])
        # All parameters count in the value: with "grad" before the step, with "prox" now.
        assert_same_bits([attachment.value], [value if mode == "grad" else regularizer().detach()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_it_can_be_included(mode, form, device):
    """As from a loss that has the penalty; or every weight shrinks in every step."""
    expected, actual = Heads(device), Heads(device)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (expected, actual)]
    regularizers = [Regularizer(net, **FORMS[form]) for net in (expected, actual)]
    regularizers[1].attach(optimizers[1], mode, include_unused=True)
    if mode == "grad":
        train(expected, optimizers[0], regularizers[0])
    else:
        train(expected, optimizers[0], after=lambda: regularizers[0].prox_(0.1))
    torch.testing.assert_close(train(actual, optimizers[1]), [p.detach() for p in expected.parameters()])


@pytest.mark.parametrize("include_unused", [False, True])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_a_closure_decides_what_is_used(mode, include_unused, device):
    net = Heads(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Regularizer(net, l1=0.01).attach(optimizer, mode, include_unused=include_unused)
    before = dict(net.named_parameters())[NAMES[2]].detach().clone()

    def closure():
        optimizer.zero_grad()
        net.loss(NAMES[1]).backward()

    optimizer.step(closure)
    if include_unused:
        reference.prox_([before], l1=0.01, step=0.1)  # far from 0 it is the gradient's step
    torch.testing.assert_close(dict(net.named_parameters())[NAMES[2]].detach(), before)


def test_a_word_is_no_flag():
    """It would be true, also "no"."""
    w = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    with pytest.raises(TypeError, match=r"^attach: include_unused must be True or False, got 'no'$"):
        Regularizer([w], l2=0.1).attach(optimizer, include_unused="no")
    w.grad = torch.zeros(2)
    optimizer.step()
    assert w.tolist() == [1, 1]


def test_a_batch_without_any_gradient_is_no_step(device):
    net = Heads(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for include_unused in (False, True):
        with Regularizer(net, l1=0.01).attach(optimizer, include_unused=include_unused):
            before = [p.detach().clone() for p in net.parameters()]
            optimizer.step()
            assert_same_bits([p.detach() for p in net.parameters()], before)


def test_accumulate_grad_writes_where_there_is_none(device):
    net = Heads(device)
    value = Regularizer(net, l1=0.01).accumulate_grad_()
    assert_value(value, [p.detach() for p in net.parameters()], l1=0.01)
    assert all(p.grad is not None for p in net.parameters())


def test_what_stays_in_the_gradient(device):
    """The penalty's gradient: so the documentation says, with zero_grad as the cure."""
    net = Heads(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    Regularizer(net, l2=0.5).attach(optimizer, include_unused=True)
    net.loss(NAMES[1]).backward()
    loss_grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    for count in (1, 2):
        optimizer.step()
        for p, grad in zip(net.parameters(), loss_grads, strict=True):
            torch.testing.assert_close(p.grad, count * p.detach() + (0 if grad is None else grad))


def of_shards(mode, include_unused):
    """What two steps do to the penalty, which is that of the whole, and to parameters without a gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    values = [draw((5, 3), seed=i).double() for i in range(2)]
    used, unused = (nn.Parameter(distribute_tensor(x, mesh, [Shard(i)])) for i, x in enumerate(values))
    plain = nn.Parameter(draw(4, seed=2).double())
    params = [used, unused, plain]
    optimizer = torch.optim.SGD(params, lr=0.125)
    attachment = Regularizer(params, l1=0.25, l2_norm=0.5).attach(optimizer, mode, include_unused=include_unused)
    penalties = [attachment.value.item()]
    for _ in range(2):
        used.grad, unused.grad = distribute_tensor(torch.ones(5, 3).double(), mesh, [Shard(0)]), None
        plain.grad = None
        optimizer.step()
        penalties.append(attachment.value.item())
    weights = [used.full_tensor().tolist(), unused.full_tensor().tolist(), plain.tolist()]
    return penalties, weights, unused.grad is None, plain.grad is None


@pytest.mark.parametrize("include_unused", [False, True])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_shards_without_gradient(mode, include_unused):
    params = [nn.Parameter(draw(shape, seed=i).double()) for i, shape in enumerate([(5, 3), (5, 3), 4])]
    before = [p.tolist() for p in params[1:]]
    optimizer = torch.optim.SGD(params, lr=0.125)
    attachment = Regularizer(params, l1=0.25, l2_norm=0.5).attach(optimizer, mode, include_unused=include_unused)
    penalties = [attachment.value.item()]
    for _ in range(2):
        params[0].grad, params[1].grad, params[2].grad = torch.ones(5, 3).double(), None, None
        optimizer.step()
        penalties.append(attachment.value.item())
    for found in ranks(2).run(of_shards, mode, include_unused):
        assert found[0] == pytest.approx(penalties, rel=1e-14)
        torch.testing.assert_close(found[1], [p.tolist() for p in params], rtol=1e-14, atol=1e-15)
        assert (found[1][1:] == before) == (not include_unused)
        assert found[2:] == (mode == "prox" or not include_unused,) * 2


def test_a_captured_step_without_gradients_looks_at_nothing(monkeypatch):
    """A capture cannot wait for the GPU. Tensors without data, which cannot be looked at either, stand in for it."""
    with FakeTensorMode():
        w = nn.Parameter(torch.ones(3, device="cuda"))
        regularizer, optimizer = Regularizer([w], l1=0.5), torch.optim.SGD([w], lr=0.1)
        regularizer.attach(optimizer)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        optimizer.step()
    assert regularizer.step == 0
