"""Lists and strengths on several devices, and devices that there are no kernels for (hard cases 18, 35, 36)."""

import re

import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import DTYPES, FULL_DTYPES, draw, leaves, numbers, one_each
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_reg import _ops, accumulate_grad_, fused_penalty, prox_, value_and_grad
from fused_reg._arguments import explained
from fused_reg._terms import Strengths
from fused_reg.distributed import by_device

FUNCTIONS = pytest.mark.parametrize("function", [fused_penalty, value_and_grad])
BOTH = {"l1": 0.1, "l2": 1 / 3}
SHAPES = ((5,), (0,), (300, 7), (), (16385,), (0, 3), (33,), (2, 1))


def raises(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def devices_of(names, cuda) -> list[torch.device]:
    """Skips where there is no second GPU."""
    if "cuda:1" in names and torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    return [torch.device(name) for name in names]


def spread(devices, dtypes=(torch.float32,)) -> list[torch.Tensor]:
    """A list whose tensors take turns on the devices and, at another pace, in the dtypes."""
    return [
        draw(shape, dtypes[i // 2 % len(dtypes)], devices[i % 3 % len(devices)], seed=i)
        for i, shape in enumerate(SHAPES)
    ]


def strengths_on(device, count):
    return {
        "for all": BOTH,
        "per parameter": {"l1": one_each(count), "l2": one_each(count)[::-1]},
        "one tensor": {"l1": torch.tensor(0.25, device=device), "l2": 0.5},
        "a tensor of one each": {"l1": 0.5, "l2": torch.tensor(one_each(count), dtype=torch.float64, device=device)},
    }


def plain(strengths):
    return {name: s.tolist() if isinstance(s, torch.Tensor) else s for name, s in strengths.items()}


MIXED = pytest.mark.parametrize(
    "names", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:0", "cuda:1"), ("cuda:1", "cpu", "cuda:0")], ids=" ".join
)
KINDS = pytest.mark.parametrize("kind", list(strengths_on("cpu", 1)))


@pytest.mark.cuda
@MIXED
@KINDS
def test_mixed_devices(kind, names, cuda):
    """Hard case 18: the value on the first parameter's device; the gradients, each in its place, to the bit."""
    devices = devices_of(names, cuda)
    for dtypes in ((torch.float32,), FULL_DTYPES):
        params = spread(devices, dtypes)
        for where in {"cpu", devices[-1]}:
            strengths = strengths_on(where, len(params))[kind]
            value, grads = value_and_grad(params, **strengths)
            for scalar in (value, fused_penalty(params, **strengths), fused_penalty(leaves(params), **strengths)):
                assert scalar.device == params[0].device
                assert_value(scalar.detach(), params, **plain(strengths))
            assert [g.device for g in grads] == [p.device for p in params]
            assert_same_bits(grads, loop_gradients(params, **plain(strengths)))
            for upstream in (1.0, 0.37, -2.0):
                actual = gradients(fused_penalty, params, upstream, **strengths)
                assert [g.device for g in actual] == [p.device for p in params]
                assert_same_bits(actual, loop_gradients(params, upstream, **plain(strengths)))


@pytest.mark.cuda
@MIXED
def test_mixed_devices_and_dtypes(names, cuda):
    """Hard case 18: every gradient is the one that its parameter has alone; frozen ones have none."""
    params = spread(devices_of(names, cuda), DTYPES)
    each = {"l1": one_each(len(params)), "l2": one_each(len(params))[::-1]}
    some = [p.detach().requires_grad_(i != 2) for i, p in enumerate(params)]
    penalty = fused_penalty(some, **each)
    assert_value(penalty.detach(), params, **each)
    (0.37 * penalty).backward()
    for i, p in enumerate(some):
        if i == 2:
            assert p.grad is None
        else:
            one = {name: values[i] for name, values in each.items()}
            assert_same_bits([p.grad], gradients(fused_penalty, [params[i]], 0.37, **one))


@pytest.mark.cuda
@MIXED
def test_strengths_trained_over_mixed_devices(names, cuda):
    """Their gradients come back to where they are, from every device."""
    devices = devices_of(names, cuda)
    params = spread(devices)
    for where in {"cpu", devices[-1]}:
        l1 = torch.tensor(0.5, dtype=torch.float64, device=where, requires_grad=True)
        l2 = torch.tensor(one_each(len(params)), dtype=torch.float64, device=where, requires_grad=True)
        some = leaves(params)
        fused_penalty(some, l1=l1, l2=l2).backward()
        assert (l1.grad.device, l2.grad.device) == (l1.device, l2.device)
        assert_value(l1.grad, [*params, torch.empty(0, dtype=torch.float64)], l1=1.0)
        sums = [p.double().square().sum().item() for p in params]
        torch.testing.assert_close(l2.grad.cpu(), torch.tensor(sums, dtype=torch.float64))
        assert_same_bits([p.grad for p in some], loop_gradients(params, l1=0.5, l2=l2.tolist()))


@pytest.mark.cuda
def test_second_device(cuda):
    """Hard case 35: the parameters' device counts, and the current one stays."""
    (device,) = devices_of(["cuda:1"], cuda)
    assert torch.cuda.current_device() == 0
    for count in (3, 3000):
        params = [draw(7 + i % 5, device=device, seed=i) for i in range(count)]
        copies = [p.cpu() for p in params]
        strength = torch.tensor(0.25, device=device)
        value, grads = value_and_grad(params, l1=strength, l2=0.5)
        assert {value.device, *(g.device for g in grads)} == {device}
        expected, expected_grads = value_and_grad(copies, l1=0.25, l2=0.5)
        assert_same_bits([value, *grads], [expected, *expected_grads])
        actual = gradients(fused_penalty, params, 0.37, **BOTH)
        assert_same_bits(actual, gradients(fused_penalty, copies, 0.37, **BOTH))
    assert torch.cuda.current_device() == 0


@pytest.mark.cuda
@FUNCTIONS
def test_strength_on_another_device(function, cuda):
    """Hard case 26: is named, and nothing waits for it; a strength on the CPU goes with every parameter."""
    there, here = torch.ones(3, device=cuda), torch.ones(3)
    rule = "strengths must be on the CPU or on the parameters' device"
    for strength in (torch.tensor(0.5, device=cuda), torch.full((1,), 0.5, device=cuda)):
        for name in ("l1", "l2"):
            with raises(ValueError, f"{function.__name__}: {rule} (cpu), got {there.device}"):
                function([here], **{name: strength})
    assert fused_penalty([there], l1=torch.tensor(0.5), l2=torch.tensor([0.25])) == 2.25


@pytest.mark.cuda
@FUNCTIONS
def test_strength_on_another_gpu(function, cuda):
    """Hard case 26."""
    here, there = devices_of(["cuda:0", "cuda:1"], cuda)
    rule = f"strengths must be on the CPU or on the parameters' device ({here}), got {there}"
    with raises(ValueError, f"{function.__name__}: {rule}"):
        function([torch.ones(3, device=here)], l1=torch.tensor(0.5, device=there))


# Without a GPU: meta tensors stand in for those of a second device, fake ones for those of a GPU.


@pytest.mark.cuda
def test_a_wrong_strength_writes_on_no_device(cuda):
    params = [torch.ones(2, device=device, requires_grad=True) for device in (cuda, "cpu")]
    for p in params:
        p.grad = torch.zeros_like(p)
    wrong = torch.tensor([0.5, -1.0])
    with raises(ValueError, "accumulate_grad_: l1[1] must be finite and >= 0, got -1.0"):
        accumulate_grad_(params, l1=wrong)
    with raises(ValueError, "prox_: l1[1] must be finite and >= 0, got -1.0"):
        prox_(params, l1=wrong, step=1.0)
    assert [(p.tolist(), p.grad.tolist()) for p in params] == [([1, 1], [0, 0])] * 2


def fake(device):
    with FakeTensorMode():
        return torch.empty(3, device=device)


def test_parts_of_a_list():
    """A part per device, in the order of their first parameters, each with its strengths and an empty float64."""
    places = ("cpu", "meta", "meta", "cpu", "cpu", "meta")
    params = [torch.empty(i, device=device) for i, device in enumerate(places)]
    l2 = torch.arange(6.0)
    cpu, meta = by_device._parts(params, numbers((0.5,), l2))
    assert (cpu.places, meta.places) == ([0, 3, 4], [1, 2, 5])
    for part, device in ((cpu, "cpu"), (meta, "meta")):
        *own, end = part.params
        assert all(a is params[i] for a, i in zip(own, part.places, strict=True))
        assert (end.dtype, end.shape, end.device.type) == (torch.float64, (0,), device)
        l1, l2_of_part, *_ = part.strengths.columns()
        assert l1 == (0.5,)
        assert l2_of_part.tolist() == [*part.places, part.places[0]]


def test_parts_come_together():
    """The sum of the values, rounded once; the gradients in their places."""
    params = [torch.full((2,), float(i), device=device) for i, device in enumerate(("cpu", "meta", "cpu"))]

    def one_device(part, given):
        assert given == numbers((7.0,))
        value = torch.tensor(1 / 3 if part[0].is_meta else 1.0, dtype=torch.float64)
        return value, tuple(part[:-1])

    value, grads = by_device.value_and_grad(one_device, params, numbers((7.0,)))
    assert_same_bits([value], [torch.tensor(4 / 3)])
    assert all(g is p for g, p in zip(grads, params, strict=True))
    double = [*params, torch.ones(1, dtype=torch.float64)]
    value = by_device.penalty(lambda *a: one_device(*a)[0], double, numbers((7.0,)))
    assert_same_bits([value], [torch.tensor(1 + 1 / 3, dtype=torch.float64)])


def test_gradients_accumulate_in_parts(monkeypatch):
    """Each part gets its own gradients, modes and strengths."""
    devices = ("cpu", "meta", "cpu", "meta")
    params = [torch.empty(i + 1, device=device) for i, device in enumerate(devices)]
    grads = by_device.empty_grads(params)
    assert [(g.numel(), g.device.type) for g in grads] == [(1, "cpu"), (2, "meta"), (3, "cpu"), (4, "meta")]
    checked, calls = [], []

    def operator(part, own_grads, modes, scale, scale_tensor, *given):
        calls.append((part[0].device.type, own_grads, modes, scale, scale_tensor, Strengths(*given).columns()[0]))
        return torch.tensor(1.0 if part[0].is_cpu else 1 / 3, dtype=torch.float64)

    monkeypatch.setattr(_ops, "accumulate_grad_", operator)
    monkeypatch.setattr(_ops, "check_writable", lambda *lists: checked.append((lists, len(calls))))
    given = numbers((0.1, 0.2, 0.3, 0.4))
    value = by_device.accumulate_grad_(params, grads, [1, 2, 2, 1], 0.5, None, given)
    assert checked == [((params, grads, [1, 2, 2, 1]), 0)]  # the whole list, before anything is written
    assert calls == [
        ("cpu", [grads[0], grads[2]], [1, 2, 0], 0.5, None, (0.1, 0.3, 0.1)),
        ("meta", [grads[1], grads[3]], [2, 1, 0], 0.5, None, (0.2, 0.4, 0.2)),
    ]
    assert_same_bits([value], [torch.tensor(4 / 3)])


def test_proximal_steps_in_parts(monkeypatch):
    params = [torch.empty(i + 1, device=device) for i, device in enumerate(("cpu", "meta", "cpu"))]
    checked, calls = [], []
    monkeypatch.setattr(_ops, "prox_", lambda part, *rest: calls.append(([p.numel() for p in part], *rest)))
    monkeypatch.setattr(_ops, "check_writable", lambda whole, *none: checked.append((whole, none, len(calls))))
    given = numbers(l2_norm=(0.5,), step=(0.1, 0.2, 0.3), group="row")
    by_device.prox_(params, given)
    assert checked == [(params, ((), ()), 0)]
    assert calls == [
        ([1, 3, 0], None, (), *given.having(step=(0.1, 0.3, 0.1))),
        ([2, 0], None, (), *given.having(step=(0.2, 0.2))),
    ]


def test_strengths_of_a_part():
    l1 = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    part = numbers(l1, (0.5, 0.25, 0.125)).at([2, 0, 2], torch.device("cpu"))
    assert part.floats == (0.125, 0.5, 0.125)
    assert part.tensors[0].tolist() == l1[[2, 0, 2]].tolist()
    part.tensors[0].sum().backward()
    assert l1.grad.tolist() == [1, 0, 2]
    assert part.counts == (-1, 3, 0, 0, 0, 0)
    one = numbers((0.5,), torch.tensor(0.25))
    assert one.at([1], torch.device("meta")) == one  # a strength on the CPU goes everywhere
    elsewhere = numbers(torch.ones(2, device="meta"))
    assert elsewhere.at([1, 1, 0], torch.device("meta")).tensors[0].shape == (3,)


def test_which_lists_are_mixed():
    here, there = torch.empty(3), fake("cuda")
    error = ValueError("params[1] must be on cpu, as params[0], got cuda:0")
    assert by_device.is_mixed([here, there], error)
    assert by_device.is_mixed([here, there, None], error)
    assert not by_device.is_mixed([here, here], error)
    assert not by_device.is_mixed([here, torch.empty(3, device="meta")], error)
    assert not by_device.is_mixed([here, there], TypeError("params[1] must be floating point"))
    assert not by_device.is_mixed([here, there], RuntimeError())


@pytest.mark.skipif(bool(_ops.library.build_info()["cuda_architectures"]), reason="fused_reg is built with CUDA")
@pytest.mark.parametrize("position", [0, 1])
def test_built_without_cuda(position):
    """Hard case 36: says what is missing and how to mend it."""
    params = [torch.empty(3), torch.empty(3)]
    params[position] = fake("cuda")
    missing = NotImplementedError("Could not run 'fused_reg::penalty' with arguments from the 'CUDA' backend.")
    error = explained("fused_penalty", params, missing)
    assert type(error) is RuntimeError
    sentence = f"fused_penalty: params[{position}] is on cuda:0, and fused_reg is built without CUDA; where nvcc and"
    assert str(error).startswith(sentence)
    assert "FORCE_CUDA=1 pip install" in str(error)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("other", ["xpu", "mps"])
def test_devices_without_kernels(other, position):
    """Hard case 36."""
    params = [torch.empty(3), torch.empty(3)]
    params[position] = fake(other)
    error = explained("value_and_grad", params, NotImplementedError("Could not run 'fused_reg::penalty_and_grad'"))
    assert type(error) is TypeError
    where = params[position].device
    assert str(error) == f"value_and_grad: params[{position}] must be on the CPU or a CUDA device, got {where}"


def test_other_errors_stay():
    """Where no parameter is to blame: an operator that a subclass does not know, or too little memory."""
    for error in (NotImplementedError("_Mine does not know fused_reg.penalty"), torch.OutOfMemoryError("mine")):
        assert explained("fused_penalty", [torch.empty(3), torch.empty(3)], error) is error
