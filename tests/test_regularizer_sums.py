"""The value of a `Regularizer` is rounded once, whatever its rules: rows beside whole tensors, groups to maximize."""

import pytest
import torch
from oracle import assert_near, assert_same_bits, exact_penalty
from samples import draw
from torch import nn

from fused_reg import Regularizer, fused_penalty

ROWS, WHOLE = {"l1": 0.1, "l2_norm": 0.3, "group": "row"}, {"l2": 0.2, "l2_norm": 0.7}
DTYPES = [(torch.float32,) * 2, (torch.float64,) * 2, (torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
LISTS = 12  # a sum of two float32 values is off in some of them


def make(device, dtypes, seed):
    pairs = [("rows", (40, 3)), ("whole", (7, 5)), ("more.rows", (3,)), ("more.whole", ())]
    named = [
        (name, nn.Parameter(draw(shape, device=device, seed=4 * seed + i).to(dtypes[i % 2])))
        for i, (name, shape) in enumerate(pairs)
    ]
    return [p for _, p in named], Regularizer(named, rules=[("*rows", ROWS), ("*whole", WHOLE)])


def assert_rounded_once(value, params):
    exact = exact_penalty(params[::2], **ROWS) + exact_penalty(params[1::2], **WHOLE)
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32
    assert (value.dtype, value.shape) == (dtype, ())
    if dtype is torch.float32:
        assert value.item() == torch.tensor(float(exact), dtype=torch.float64).float().item()
    assert_near(value, exact)


def called(regularizer, params):
    value = regularizer()
    value.backward()
    return value.detach()


def called_without_a_graph(regularizer, params):
    with torch.no_grad():
        return regularizer()


def accumulated(regularizer, params):
    return regularizer.accumulate_grad_()


def attached(regularizer, params, groups=None):
    optimizer = torch.optim.SGD(groups or params, lr=0.125)
    attachment = regularizer.attach(optimizer)
    before = attachment.value
    for p in params:
        p.grad = torch.zeros_like(p)
    for p in params:
        p.data = p.data.clone()
    old = [p.detach().clone() for p in params]
    optimizer.step()
    assert_same_bits([attachment.value], [before])
    for p, values in zip(params, old, strict=True):
        p.data = values
    return attachment.value


def attached_and_maximized(regularizer, params):
    groups = [{"params": params[:3]}, {"params": params[3:], "maximize": True}]
    return attached(regularizer, params, groups)


def attached_prox(regularizer, params):
    return regularizer.attach(torch.optim.SGD(params, lr=0.125), "prox").value


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "way",
    [called, called_without_a_graph, accumulated, attached, attached_and_maximized, attached_prox],
    ids=lambda way: way.__name__,
)
def test_rounded_once(way, dtypes, device):
    for seed in range(LISTS):
        params, regularizer = make(device, dtypes, seed)
        assert_rounded_once(way(regularizer, params), params)


def test_maximized_groups_are_one_value(device):
    """Without norms, where only the sign is another."""
    for seed in range(LISTS):
        params, _ = make(device, DTYPES[0], seed)
        expected = fused_penalty(params, l1=0.1, l2=0.2).detach()
        regularizer = Regularizer(params, l1=0.1, l2=0.2)
        assert_same_bits([attached_and_maximized(regularizer, params)], [expected])


@pytest.mark.filterwarnings("ignore")  # torch warns of itself while it traces
def test_rounded_once_in_compiled_code(device):
    for dtypes in DTYPES[:2]:
        params, regularizer = make(device, dtypes, 3)
        compiled = torch.compile(lambda regularizer=regularizer: regularizer(), backend="aot_eager", fullgraph=True)
        value = compiled()
        value.backward()
        assert_rounded_once(value.detach(), params)
        expected = torch.autograd.grad(regularizer(), params)
        assert_same_bits([p.grad for p in params], expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_gradients_keep_their_bits(dtypes, device):
    """Those of the two calls apart, under any upstream gradient."""
    params, regularizer = make(device, dtypes, 0)
    for upstream in (1.0, 1 / 3, -1024.0):
        parts = [fused_penalty(params[::2], **ROWS), fused_penalty(params[1::2], **WHOLE)]
        ups = [torch.full_like(part, upstream) for part in parts]
        expected = [torch.autograd.grad(*pair) for pair in zip(parts, (params[::2], params[1::2]), ups, strict=True)]
        value = regularizer()
        actual = torch.autograd.grad(value, params, torch.full_like(value, upstream))
        if dtypes[0] == dtypes[1]:  # else 1/3 is another number in float64
            assert_same_bits([actual[i] for i in (0, 2, 1, 3)], [g for grads in expected for g in grads])
        for p in params:
            p.grad = None
        regularizer.accumulate_grad_(upstream)
        if dtypes[0] == dtypes[1] == torch.float64 or upstream != 1 / 3:
            assert_same_bits([p.grad for p in params], list(actual))


def test_higher_derivatives_and_trained_strengths(device):
    params, _ = make(device, DTYPES[1], 0)
    strength = torch.tensor(0.3, device=device, dtype=torch.float64, requires_grad=True)
    named = list(zip("abcd", params, strict=True))
    rules = [("[ac]", ROWS | {"l2_norm": strength}), ("[bd]", WHOLE)]
    regularizer = Regularizer(named, rules=rules)
    (grad,) = torch.autograd.grad(regularizer(), strength, create_graph=True)
    torch.testing.assert_close(grad, sum(p.reshape(len(p), -1).norm(dim=1).sum() for p in params[::2]))
    second = torch.autograd.grad(grad, params[0])
    torch.testing.assert_close(second[0], params[0].detach() / params[0].detach().norm(dim=1, keepdim=True))


def test_a_report_has_the_same_value(device):
    for dtypes in DTYPES:
        _, regularizer = make(device, dtypes, 1)
        value = regularizer().detach().cpu()
        total = torch.tensor(regularizer.report().rows[-1]["value"], dtype=torch.float64)
        torch.testing.assert_close(total.to(value.dtype), value, rtol=1e-15, atol=0)
