"""Lists and strengths on several devices, and devices that there are no kernels for (hard cases 18, 35, 36)."""

import re

import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import DTYPES, FULL_DTYPES, draw, leaves, numbers, one_each
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_reg import _devices, _ops, accumulate_grad_, fused_penalty, prox_, value_and_grad
from fused_reg._arguments import check_device, check_params
from fused_reg._routes import run
from fused_reg._terms import Strengths
from fused_reg.distributed import parts
from fused_reg.distributed.buckets import buckets, value_of

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
    cpu, meta = buckets(params, params, numbers((0.5,), l2))
    assert (cpu.places, meta.places) == ([0, 3, 4], [1, 2, 5])
    for part, device in ((cpu, "cpu"), (meta, "meta")):
        *own, end = part.shards
        assert all(a is params[i] for a, i in zip(own, part.places, strict=True))
        assert (end.dtype, end.shape, end.device.type) == (torch.float64, (0,), device)
        l1, l2_of_part, *_ = part.strengths.columns()
        assert l1 == (0.5,)
        assert l2_of_part.tolist() == [*part.places, part.places[0]]


def test_parts_come_together(monkeypatch):
    """The sum of the values, rounded once; the gradients in their places."""
    params = [torch.full((2,), float(i), device=device) for i, device in enumerate(("cpu", "meta", "cpu"))]

    def operator(part, needs_grad, *given):
        assert given == numbers((7.0,))
        value = torch.tensor(1 / 3 if part[0].is_meta else 1.0, dtype=torch.float64)
        return value, list(part), []

    monkeypatch.setattr(_ops, "penalty", operator)
    value, grads = parts.value_and_grad(params, numbers((7.0,)))
    assert_same_bits([value], [torch.tensor(4 / 3)])
    assert all(g is p for g, p in zip(grads, params, strict=True))
    double = [*params, torch.ones(1, dtype=torch.float64)]
    with torch.no_grad():
        value = parts.penalty(double, numbers((7.0,)))
    assert_same_bits([value], [torch.tensor(1 + 1 / 3, dtype=torch.float64)])
    assert value_of([value.float()], params).dtype == torch.float32


def test_gradients_accumulate_in_parts(monkeypatch):
    """Each part gets its own gradients, modes and strengths; a gradient that is missing is where its parameter is."""
    devices = ("cpu", "meta", "cpu", "meta")
    params = [torch.empty(i + 1, device=device, requires_grad=True) for i, device in enumerate(devices)]
    for p in params[1:3]:
        p.grad = torch.zeros_like(p)
    checked, calls = [], []

    def operator(part, own_grads, modes, scale, scale_tensor, *given):
        sizes = [(g.numel(), g.device.type) for g in own_grads]
        calls.append((sizes, modes, scale, scale_tensor, Strengths(*given).columns()[0]))
        return torch.tensor(1.0 if part[0].is_cpu else 1 / 3, dtype=torch.float64)

    monkeypatch.setattr(_ops, "accumulate_grad_", operator)
    monkeypatch.setattr(_ops, "check_writable", lambda *lists: checked.append((lists, len(calls))))
    given = numbers((0.1, 0.2, 0.3, 0.4))
    value = parts.accumulate_grad_(params, given, (0.5, None), False)
    # The whole list, before anything is written.
    assert checked == [((params, [params[1].grad, params[2].grad], [0, 2, 2, 0]), 0)]
    assert calls == [
        ([(1, "cpu"), (3, "cpu")], [1, 2, 0], 0.5, None, (0.1, 0.3, 0.1)),
        ([(2, "meta"), (4, "meta")], [2, 1, 0], 0.5, None, (0.2, 0.4, 0.2)),
    ]
    assert [(p.grad.numel(), p.grad.device) for p in params] == [(p.numel(), p.device) for p in params]
    assert_same_bits([value], [torch.tensor(4 / 3)])


def test_proximal_steps_in_parts(monkeypatch):
    params = [torch.empty(i + 1, device=device) for i, device in enumerate(("cpu", "meta", "cpu"))]
    checked, calls = [], []
    monkeypatch.setattr(_ops, "prox_", lambda part, *rest: calls.append(([p.numel() for p in part], *rest)))
    monkeypatch.setattr(_ops, "check_writable", lambda whole, *none: checked.append((whole, none, len(calls))))
    given = numbers(l2_norm=(0.5,), step=(0.1, 0.2, 0.3), group="row")
    parts.prox_(params, given)
    assert checked == [(params, ((), ()), 0)]
    assert calls == [
        ([1, 3, 0], None, (), *given.having(step=(0.1, 0.3, 0.1))),
        ([2, 0], None, (), *given.having(step=(0.2, 0.2))),
    ]


def test_a_list_in_parts_is_checked_before_it_is_cut():
    """So that an error has the place in the list, not that in a part."""
    params = [torch.ones(2), torch.ones(2, device="meta"), torch.ones(2), torch.ones(2)]
    for function in (parts.penalty, parts.value_and_grad):
        with raises(ValueError, "l1[3] must be finite and >= 0, got -1.0"):
            function(params, numbers(torch.tensor([1.0, 1.0, 1.0, -1.0])))
        with raises(TypeError, "params[3] must be floating point, got torch.int32"):
            function([*params[:3], params[3].int()], numbers((0.5,)))


def test_strengths_of_a_part():
    l1 = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    part = numbers(l1, (0.5, 0.25, 0.125)).at([2, 0, 2], torch.device("cpu"))
    assert part.floats == (0.125, 0.5, 0.125)
    assert part.tensors[0].tolist() == l1[[2, 0, 2]].tolist()
    part.tensors[0].sum().backward()
    assert l1.grad.tolist() == [1, 0, 2]
    assert part.counts[:2] == (-1, 3)
    assert not any(part.counts[2:])
    one = numbers((0.5,), torch.tensor(0.25))
    assert one.at([1], torch.device("meta")) == one  # a strength on the CPU goes everywhere
    elsewhere = numbers(torch.ones(2, device="meta"))
    assert elsewhere.at([1, 1, 0], torch.device("meta")).tensors[0].shape == (3,)


def test_which_lists_are_mixed():
    here, there = torch.empty(3), fake("cuda")
    assert parts.are_mixed([here, there])
    assert not parts.are_mixed([here, here])
    assert not parts.are_mixed([here, torch.empty(3, device="meta")])
    assert not parts.are_mixed([here, fake("xpu")])


def test_what_a_survey_finds():
    one, tagged = torch.empty(3), torch.nn.Parameter(torch.empty(3))
    tagged.mark = 1
    assert _ops.survey([one, torch.nn.Parameter(one)]) == _ops.survey([]) == 0
    assert _ops.survey([one, tagged]) == _ops.HAS_ATTRIBUTES
    assert _ops.survey([one, torch.empty(3, device="meta")]) == _ops.SEVERAL_DEVICES
    assert _ops.survey([one, torch._neg_view(one)]) == _ops.NEGATED
    for grad, expected in ((one, 0), (one.to_sparse(), _ops.ODD_GRAD), (torch._neg_view(one), _ops.ODD_GRAD)):
        trained = torch.empty(3, requires_grad=True)
        trained.grad = grad
        assert _ops.survey([trained]) == expected
    for other in (None, 1.0, one.to_sparse(), fake("cpu"), one.as_subclass(type("Mine", (torch.Tensor,), {}))):
        assert _ops.survey([one, other]) & _ops.UNUSUAL


@pytest.mark.skipif("cuda_architectures" in _ops.library.build_info(), reason="fused_reg is built with CUDA")
def test_built_without_cuda():
    """Hard case 36: says what is missing and how to mend it."""
    with pytest.raises(RuntimeError, match="FORCE_CUDA=1 pip install") as error:
        check_device("fused_penalty: params[1]", torch.device("cuda:0"))
    sentence = "fused_penalty: params[1] is on cuda:0, and fused_reg is built without CUDA; where nvcc and"
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize("other", ["xpu", "mps"])
def test_devices_without_kernels(other):
    """Hard case 36. A tensor that is there by name only may go on: its operators are its own."""
    with raises(TypeError, f"value_and_grad: params[0] must be on the CPU or a CUDA device, got {other}:0"):
        check_device("value_and_grad: params[0]", torch.device(other, 0))
    check_params("", [torch.empty(3), fake(other)])


def test_a_new_type_of_device_is_a_row(monkeypatch):
    """What is said of it, what it is mixed with, and what it does follow from there."""
    here, there = torch.empty(3), fake("xpu")
    assert not _devices.can_mix({here.device, there.device})
    assert not _devices.is_captured(there)
    row = _devices.Device("an XPU", build="fused_reg is built without it", is_captured=lambda: True)
    monkeypatch.setitem(_devices._ROWS, "xpu", row)
    assert _devices.can_mix({here.device, there.device})
    assert _devices.is_captured(there)
    assert not _devices.is_captured(here)
    with raises(RuntimeError, "prox_: params[0] is on xpu:0, and fused_reg is built without it"):
        check_device("prox_: params[0]", there.device)
    with raises(TypeError, "prox_: params[1] must be on the CPU, a CUDA device or an XPU, got mps:0"):
        check_device("prox_: params[1]", torch.device("mps", 0))


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("_Mine does not know fused_reg.penalty"),
        torch.OutOfMemoryError("mine"),
        ValueError("mine"),
        KeyError("params"),
    ],
    ids=repr,
)
def test_other_errors_stay(error):
    """Where no argument is to blame: an operator that a subclass does not know, or too little memory."""

    def fails(params):
        raise error

    with pytest.raises(type(error)) as raised:
        run("fused_penalty", fails, fails, [torch.empty(3)])
    assert raised.value is error
