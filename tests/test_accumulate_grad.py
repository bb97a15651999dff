"""accumulate_grad_: ``.grad`` is what the loop's backward leaves there, and the value is fused_penalty's.

The tests of its memory, and of wrong input, are in test_accumulate_grad_memory.py.
"""

import math

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, assert_value, loop_gradients, ulp
from samples import (
    CHUNK,
    DTYPES,
    FULL_DTYPES,
    HALF_DTYPES,
    SIZES,
    STRENGTHS,
    UPSTREAMS,
    draw,
    draw_list,
    leaves,
    mixed_list,
)

from fused_reg import accumulate_grad_, fused_penalty, reference, value_and_grad

BOTH = {"l1": 0.1, "l2": 1 / 3}
EVERY_GROUP = pytest.mark.parametrize("group", ["tensor", "row"])


def with_grads(params, seed=50) -> list[torch.Tensor]:
    """Leaves over copies, each with a ``.grad`` of its own."""
    copies = leaves([p.clone() for p in params])
    for i, p in enumerate(copies):
        p.grad = draw(p.shape, p.dtype, p.device, seed + i)
    return copies


def expected_grads(params, scale=1.0, seed=50, **strengths) -> list[torch.Tensor]:
    """``g + gradient``, computed as the loop does, in float32 for half precision; where no term is left, ``g + 0``."""
    result = []
    for i, p in enumerate(params):
        of_one = {name: s[i] if isinstance(s, list) else s for name, s in strengths.items()}
        compute = p.dtype if p.dtype in FULL_DTYPES else torch.float32
        grad = draw(p.shape, p.dtype, "cpu", seed + i) + 0.0
        if any(of_one.values()) or not strengths:
            added = loop_gradients([p.to(compute)], scale, **of_one)[0]
            grad = (draw(p.shape, p.dtype, "cpu", seed + i).to(compute) + added).to(p.dtype)
        result.append(grad)
    return result


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
def test_adds_the_loops_gradient(strengths, dtype, device):
    """To the bit, and in half precision rounded once; ``None`` is all dtypes in turn."""
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    trained = with_grads(params)
    value = accumulate_grad_(trained, **strengths)
    assert_same_bits([p.grad for p in trained], expected_grads(params, **strengths))
    assert_same_bits([value], [fused_penalty(params, **strengths)])
    assert_same_bits(trained, params)  # the parameters are only read


@pytest.mark.parametrize("scale", [*UPSTREAMS[:8], 96.0, 1e-50], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("kind", ["float", "tensor", "other tensor"])
def test_scale(kind, dtype, scale, device):
    """Hard case 27: as the upstream gradient. A float, a 0-dim tensor with the parameters, one on the CPU."""
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    trained = with_grads(params)
    given = {
        "float": scale,
        "tensor": torch.tensor(scale, dtype=torch.float64, device=device),
        "other tensor": torch.tensor(scale, dtype=torch.float64, requires_grad=True),
    }[kind]
    value = accumulate_grad_(trained, **BOTH, scale=given)
    assert_same_bits([p.grad for p in trained], expected_grads(params, scale, **BOTH))
    assert_same_bits([value], [fused_penalty(params, **BOTH)])  # not scaled
    assert not value.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_tensor_of_any_dtype(dtype, device):
    params = draw_list(torch.float32, device)
    for place in {torch.device("cpu"), device}:
        trained = with_grads(params)
        accumulate_grad_(trained, **BOTH, scale=torch.tensor(96.0, dtype=dtype, device=place))
        assert_same_bits([p.grad for p in trained], expected_grads(params, 96.0, **BOTH))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_scale_tensor_that_overflowed(scale, dtype, device):
    """A tensor's value is not looked at: as the loop with that upstream gradient."""
    params = draw_list(dtype, device)
    trained = with_grads(params)
    accumulate_grad_(trained, **BOTH, scale=torch.tensor(scale, dtype=dtype, device=device))
    assert_same_bits([p.grad for p in trained], expected_grads(params, scale, **BOTH))


def test_scale_of_numpy(device):
    params = draw_list(torch.float32, device)
    for scale in (np.float32(0.5), np.float64(0.5), 0.5):
        trained = with_grads(params)
        accumulate_grad_(trained, **BOTH, scale=scale)
        assert_same_bits([p.grad for p in trained], expected_grads(params, 0.5, **BOTH))


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("strengths", [{"l1": 0.1}, {"l2": 1 / 3}, BOTH], ids=str)
def test_after_the_backward_of_a_loss(strengths, dtype, device):
    """Against two backwards of a training: the loss's, then the loop's. Over several steps, .grad kept and not."""
    x, y = draw((64, 20), dtype, device), draw((64, 1), dtype, device, seed=1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).to(device, dtype)
    start = {name: t.clone() for name, t in net.state_dict().items()}

    def train(add_penalty, set_to_none):
        net.load_state_dict(start)
        net.zero_grad()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(4):
            optimizer.zero_grad(set_to_none)
            torch.nn.functional.mse_loss(net(x), y).backward()
            add_penalty()
            optimizer.step()
        return [p.detach().clone() for p in net.parameters()] + [p.grad.clone() for p in net.parameters()]

    # On the CPU, where the loop's bits are the contract.
    def loop():
        for p, grad in zip(net.parameters(), loop_gradients(list(net.parameters()), 0.37, **strengths), strict=True):
            p.grad += grad.to(device)

    for set_to_none in (True, False):
        ours = train(lambda: accumulate_grad_(net.parameters(), **strengths, scale=0.37), set_to_none)
        assert_same_bits(ours, train(loop, set_to_none))


@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_equals_the_loops_own_backward(dtype, device):
    """``(scale * loop).backward()`` after another backward: the same ``.grad``."""
    params = draw_list(dtype)
    ours, loop = with_grads(params), with_grads(params)
    (reference.loop(loop, **BOTH) * 0.37).backward()
    on_device = [p.to(device) for p in params]
    ours = with_grads(on_device)
    accumulate_grad_(ours, **BOTH, scale=0.37)
    assert_same_bits([p.grad for p in ours], [p.grad for p in loop])


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("size", [*SIZES, 0])
def test_sizes(size, dtype, device):
    """Hard case 5."""
    params = [draw(size, dtype, device)]
    trained = with_grads(params)
    accumulate_grad_(trained, **BOTH)
    assert_same_bits([p.grad for p in trained], expected_grads(params, **BOTH))


def test_every_small_size(device):
    """Hard case 5: every tail, and nothing behind it."""
    whole, grad = draw(300, device=device), draw(300, device=device, seed=50)
    for n in range(1, 300):
        (p,) = leaves([whole[:n]])
        memory = grad.clone()
        p.grad = memory[:n]
        accumulate_grad_(p, **BOTH)
        assert_same_bits([memory[:n]], [grad[:n].cpu() + loop_gradients([whole[:n]], **BOTH)[0]])
        assert_same_bits([memory[n:]], [grad[n:]])


@pytest.mark.parametrize("offset", range(0, 16, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_offsets(dtype, offset, device):
    """Hard case 13: the gradient's alignment differs from the parameter's."""
    for size in (17, 257, CHUNK + 1):
        w = draw(size, dtype, device)
        (p,) = leaves([w])
        memory = torch.full((offset + size + 5,), math.nan, dtype=dtype, device=device)
        memory[offset : offset + size] = draw(size, dtype, device, seed=50)
        p.grad = memory[offset : offset + size]
        accumulate_grad_(p, **BOTH)
        assert_same_bits([p.grad], expected_grads([w], **BOTH))
        assert memory[:offset].isnan().all()
        assert memory[offset + size :].isnan().all()


SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-40, -1e-40, 1.7e308, -3e38, 1.0, -2.0)


@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("strengths", [{"l1": 0.1}, {"l2": 1 / 3}, BOTH, {"l1": 0.0}], ids=str)
def test_special_values(strengths, dtype, device):
    """Hard case 23: of the parameter and of its gradient, every pair."""
    w = torch.tensor(SPECIAL, dtype=torch.float64, device=device).to(dtype).repeat_interleave(len(SPECIAL))
    grad = torch.tensor(SPECIAL, dtype=torch.float64, device=device).to(dtype).repeat(len(SPECIAL))
    (p,) = leaves([w])
    p.grad = grad.clone()
    accumulate_grad_(p, **strengths)
    added = loop_gradients([w], **strengths)[0] if any(strengths.values()) else 0.0
    assert_same_bits([p.grad], [grad.cpu() + added])


@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_half_precision_is_rounded_once(dtype, device):
    """A sum of many small steps: what the loop's backward rounds away in each term stays."""
    one = torch.finfo(dtype)
    (p,) = leaves([torch.ones(7, dtype=dtype, device=device)])
    p.grad = torch.ones(7, dtype=dtype, device=device)
    accumulate_grad_(p, l1=0.4 * one.eps, l2=0.15 * one.eps)  # 0.4 and 2 * 0.15, each below half an ulp
    assert p.grad.tolist() == [1 + one.eps] * 7


@pytest.mark.parametrize("scale", [1.0, -0.37, 96.0])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@EVERY_GROUP
def test_norms(group, dtype, scale, device):
    """With ``l2_norm``: the truth in float64, to a few roundings of the parts."""
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    strengths = {"l1": [0.02 * (i % 3) for i in range(len(params))], "l2": 0.03, "l2_norm": 0.7}
    trained, fresh = with_grads(params), leaves(params)
    values = [accumulate_grad_(some, **strengths, group=group, scale=scale) for some in (trained, fresh)]
    assert_same_bits(values, [fused_penalty(params, **strengths, group=group)] * 2)
    _, exact = reference.value_and_grad([p.cpu().double() for p in params], **strengths, group=group)
    for i, (p, q, added) in enumerate(zip(trained, fresh, exact, strict=True)):
        before = draw(p.shape, p.dtype, "cpu", 50 + i).double()
        total, compute = before + scale * added, torch.float64 if p.dtype == torch.float64 else torch.float32
        rounding = 4 * torch.finfo(compute).eps * abs(scale) * (0.04 + 0.06 * p.detach().cpu().double().abs() + 0.7)
        for got, want in ((p.grad, total), (q.grad, scale * added)):
            assert got.dtype == p.dtype
            assert ((got.cpu().double() - want).abs() <= ulp(want, p.dtype) + rounding).all()


@EVERY_GROUP
def test_zero_groups_add_nothing(group, device):
    """Hard case 24: not NaN either."""
    params = [torch.zeros(5, device=device), torch.zeros(3, 4, device=device), torch.zeros((), device=device)]
    trained = with_grads(params)
    assert accumulate_grad_(trained, l2_norm=0.5, group=group) == 0
    assert_same_bits([p.grad for p in trained], [draw(p.shape, seed=50 + i) + 0.0 for i, p in enumerate(params)])
    fresh = leaves(params)
    accumulate_grad_(fresh, l2_norm=0.5, group=group)
    assert not any(p.grad.any() for p in fresh)


def test_tensor_strengths(device):
    """Hard case 26: one that requires grad is a constant here."""
    params = draw_list(torch.float32, device)
    each = [0.125 * (i % 5) for i in range(len(params))]
    expected = expected_grads(params, l1=each, l2=0.75)
    for place in {torch.device("cpu"), device}:
        for l1 in (torch.tensor(each, device=place), [torch.tensor(x, device=place) for x in each], each):
            for dtype in DTYPES:
                l2 = torch.tensor(0.75, dtype=dtype, device=place, requires_grad=True)
                trained = with_grads(params)
                value = accumulate_grad_(trained, l1=l1, l2=l2)
                assert not value.requires_grad
                assert l2.grad is None
                assert_same_bits([p.grad for p in trained], expected)


def test_strength_outside_of_float32(device):
    """Hard case 25: in the gradient as the loop has it, in the parameter's dtype; in the value not flushed."""
    w = 1e30 * draw(100, device=device)
    (p,) = leaves([w])
    value = accumulate_grad_(p, l2=1e-50)
    assert_value(value, [w], l2=1e-50)
    assert_same_bits([p.grad], loop_gradients([w], l2=1e-50))


def test_ten_thousand_tensors(device):
    """Hard case 6."""
    params = list(draw(20_000, torch.float32, device).split([i % 5 for i in range(10_000)]))
    strengths = {"l1": [i % 7 / 10 for i in range(10_000)], "l2": 0.25}
    trained = leaves(params)
    for p in trained[::2]:
        p.grad = torch.ones_like(p)
    value = accumulate_grad_(trained, **strengths)
    expected = value_and_grad(params, **strengths)
    assert_same_bits([value], [expected[0]])
    assert_same_bits([p.grad for p in trained[1::2]], expected[1][1::2])
    assert_same_bits([p.grad for p in trained[::2]], [1 + g for g in expected[1][::2]])


def test_twice_is_two_penalties(device):
    params = draw_list(torch.float64, device)
    trained = leaves(params)
    accumulate_grad_(trained, l1=0.1)
    accumulate_grad_(trained, l2=1 / 3)
    expected = zip(loop_gradients(params, l1=0.1), loop_gradients(params, l2=1 / 3), strict=True)
    assert_same_bits([p.grad for p in trained], [a + b for a, b in expected])


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("strengths", [BOTH, {**BOTH, "l2_norm": 0.5}], ids=str)
@EVERY_GROUP
def test_thread_counts(group, strengths, dtype, device, threads):
    """Hard case 33: the same bits, of fresh gradients and of sums."""
    shapes = ((300_001,), (0,), (17,), (123, 456), (CHUNK,), (700, 77))
    params = mixed_list(device, shapes) if dtype is None else draw_list(dtype, device, shapes)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        trained = with_grads(params)
        trained[0].grad = trained[3].grad = None
        of = {"group": group} if "l2_norm" in strengths else {}
        value = accumulate_grad_(trained, **strengths, **of, scale=0.37)
        results.append([value, *(p.grad for p in trained)])
    for other in results[1:]:
        assert_same_bits(other, results[0])
