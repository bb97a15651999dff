"""One launch a call, and nothing that waits for the device."""

import math
from contextlib import contextmanager

import pytest
import torch
from oracle import assert_same_bits, gradients
from samples import draw, draw_list, leaves, many, mixed_list, one_each
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fused_reg import Regularizer, fused_penalty, value_and_grad

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

BOTH = {"l1": 0.1, "l2": 1 / 3}
LARGEST_UPLOAD = 32672  # bytes of a table in one launch: Piece of csrc/cuda/penalty_kernels.cuh


# One launch


def device_work(function) -> list[str]:
    """The names of the kernels, copies and fills that a call brings to the device."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        function()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return [e.name for e in events if not e.name.endswith((" Sync", " Wait Event"))]  # the wait above


def assert_only(kernel: str, work: list[str]) -> None:
    assert len(work) == 1, work
    assert kernel in work[0]


def resnet(device):
    return leaves(draw_list(torch.float32, device, [(n % 23 + 1, 7 + n) for n in range(161)]))


# name -> device -> parameters, strengths
CASES = {
    "161 tensors": lambda device: (resnet(device), BOTH),
    "1000 tensors": lambda device: (leaves(many(1000, device)), BOTH),
    "frozen parameters": lambda device: ([p.requires_grad_(i % 3 > 0) for i, p in enumerate(resnet(device))], BOTH),
    "strengths per parameter": lambda device: (resnet(device), {"l1": one_each(161), "l2": one_each(161)}),
    "800 strengths": lambda device: (leaves(many(800, device)), {"l1": 0.1, "l2": one_each(800)}),
    "strengths on the device": lambda device: (
        resnet(device),
        {"l1": torch.tensor(0.3, device=device), "l2": torch.rand(161, dtype=torch.bfloat16, device=device)},
    ),
    "strengths on the CPU": lambda device: (resnet(device), {"l1": torch.tensor(0.3), "l2": torch.rand(161)}),
    "mixed dtypes": lambda device: (leaves(mixed_list(device)), BOTH),
    "large and small": lambda device: (leaves([draw(3_000_001, device=device), draw(1, device=device)]), BOTH),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


@EVERY_CASE
def test_launches_of_the_forward(case, cuda):
    """One kernel for the value, one for the value with the gradients; no copy, no fill."""
    params, strengths = CASES[case](cuda)
    plain = [p.detach() for p in params]
    for function, arguments in ((fused_penalty, params), (fused_penalty, plain), (value_and_grad, params)):
        function(arguments, **strengths)
        assert_only("penalty_kernel", device_work(lambda f=function, a=arguments: f(a, **strengths)))


@EVERY_CASE
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_launches_of_the_backward(upstream, case, cuda):
    """At most one: it looks at the upstream gradient on the device. A second backward has one, too."""
    params, strengths = CASES[case](cuda)
    wanted = [p for p in params if p.requires_grad]
    penalties = [fused_penalty(params, **strengths) for _ in range(2)]
    upstream = torch.full_like(penalties[0], upstream)

    def backward(penalty):
        torch.autograd.grad(penalty, wanted, upstream, retain_graph=True)

    for penalty in penalties:  # the first warms up
        first, second = device_work(lambda p=penalty: backward(p)), device_work(lambda p=penalty: backward(p))
    assert_only("GradientPass", first)
    assert_only("GradientPass", second)


def test_launches_of_long_lists(cuda):
    """5,000 tensors: their table is brought by launches too, once; then it is there."""
    fused_penalty(many(3000, cuda))  # loads the kernels
    params = many(5000, cuda)
    pieces = math.ceil((5000 * 24 + 16) / LARGEST_UPLOAD)
    for strengths in ({"l1": 0.1}, {"l1": torch.tensor(0.1, device=cuda)}):
        first = device_work(lambda s=strengths: fused_penalty(params, **s))
        assert sum("upload_kernel" in name for name in first) == len(first) - 1 == pieces
        assert_only("penalty_kernel", device_work(lambda s=strengths: fused_penalty(params, **s)))


def test_launches_of_long_lists_with_gradients(cuda):
    """The table holds the gradients' addresses, which come to rest after a few steps."""
    params = leaves(many(5000, cuda))
    upstream = torch.full((), 0.37, device=cuda)

    def step():
        torch.autograd.grad(fused_penalty(params, **BOTH), params, upstream)

    step()
    for _ in range(20):
        work = device_work(step)
        others = [name for name in work if "upload_kernel" not in name]
        assert len(others) == 2
        assert "penalty_kernel" in others[0]
        assert "GradientPass" in others[1]
        if len(work) == 2:
            return
    pytest.fail(f"{len(work) - 2} uploads in every step")


def test_launches_are_seen(cuda):
    """What the tests above rest on."""
    w = torch.ones(100_000, device=cuda)
    assert len(device_work(lambda: (w.add_(1), w.mul_(2)))) == 2
    assert any(name.startswith("Memcpy") for name in device_work(lambda: w.cpu()))


# No waiting

SYNC_MODE = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@contextmanager
def waiting_is_an_error():
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@SYNC_MODE
@EVERY_CASE
def test_nothing_waits(case, cuda):
    params, strengths = CASES[case](cuda)
    wanted = [p for p in params if p.requires_grad]
    upstream = torch.full((), 0.37, dtype=fused_penalty(params, **strengths).dtype, device=cuda)
    with waiting_is_an_error():
        with torch.no_grad():
            fused_penalty(params, **strengths)
        value_and_grad(params, **strengths)
        penalty = fused_penalty(params, **strengths)
        torch.autograd.grad(penalty, wanted, retain_graph=True)
        torch.autograd.grad(penalty, wanted, upstream)
        (3 * fused_penalty(params, **strengths)).backward()
    expected = gradients(fused_penalty, params, 3.0, **strengths)
    assert_same_bits([p.grad for p in wanted], [e for p, e in zip(params, expected, strict=True) if p.requires_grad])


@SYNC_MODE
def test_nothing_waits_for_a_long_list(cuda):
    params = leaves(many(5000, cuda))
    with waiting_is_an_error():
        fused_penalty(params, l1=0.1, l2=one_each(5000)).backward()


@SYNC_MODE
@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("trained", ["l1", "l2", "both"])
def test_nothing_waits_for_trained_strengths(trained, per_parameter, cuda):
    """Nor for the floats beside them, nor where some parameters are frozen."""
    params = [p.detach().requires_grad_(i % 3 > 0) for i, p in enumerate(mixed_list(cuda))]
    wanted = [p for p in params if p.requires_grad]
    count = len(params)
    strengths = {"l1": one_each(count) if per_parameter else 0.1, "l2": one_each(count)[::-1] if per_parameter else 0.7}
    for name in ("l1", "l2") if trained == "both" else (trained,):
        strengths[name] = torch.tensor(strengths[name], dtype=torch.float64, device=cuda, requires_grad=True)
    wanted += [s for s in strengths.values() if isinstance(s, torch.Tensor)]
    with waiting_is_an_error():
        penalty = fused_penalty(params, **strengths)
        once = torch.autograd.grad(penalty, wanted, retain_graph=True)
        graph = torch.autograd.grad(penalty, wanted, create_graph=True)
        torch.autograd.grad([g.double().square().sum() for g in graph], wanted, allow_unused=True)
    assert_same_bits(graph, once)
    plain = {k: s.tolist() if isinstance(s, torch.Tensor) else s for k, s in strengths.items()}
    expected = gradients(fused_penalty, params, **plain)
    expected = [e for p, e in zip(params, expected, strict=True) if p.requires_grad]
    assert_same_bits(once[: len(expected)], expected)


@SYNC_MODE
@pytest.mark.parametrize("strengths", [BOTH, {"l1": 0.1, "l2": one_each(11)}], ids=["for all", "per parameter"])
def test_nothing_waits_for_create_graph(strengths, cuda):
    params = [p.detach().requires_grad_(i != 4) for i, p in enumerate(draw_list(torch.float32, cuda))]
    wanted = [p for p in params if p.requires_grad]
    vectors = [torch.ones_like(p) for p in wanted]
    with waiting_is_an_error():
        grads = torch.autograd.grad(fused_penalty(params, **strengths), wanted, create_graph=True)
        torch.autograd.grad(grads, wanted, vectors)


@SYNC_MODE
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")
@pytest.mark.parametrize("rates", [(0.5, 0.5), (0.5, 0.25)])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_nothing_waits_for_an_attached_step(mode, rates, cuda):
    """Nor for its schedule, for strengths that differ, and for learning rates in tensors."""
    params = leaves(draw_list(torch.float32, cuda))
    rates = [torch.tensor(rate, device=cuda) for rate in rates]
    groups = [{"params": params[i::2], "lr": rate} for i, rate in enumerate(rates)]
    optimizer = torch.optim.Adam(groups, capturable=True)
    rules = [("*[02468]", {"l1": lambda step: 0.1 / (1 + step)}), ("*", {"l2": 0.1, "l2_norm": 0.2, "group": "row"})]
    attachment = Regularizer([(str(i), p) for i, p in enumerate(params)], rules=rules).attach(optimizer, mode)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with waiting_is_an_error():
        for _ in range(3):
            optimizer.step()
    assert attachment.value > 0


@SYNC_MODE
def test_waiting_is_seen(cuda):
    """What the tests above rest on."""
    w = torch.ones((), device=cuda)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchronizing"):
        w.item()
    assert torch.cuda.get_sync_debug_mode() == 0
    assert w.item() == 1
