"""Steps of `fused_reg.optim` on a GPU: the host's part in them, and there the bits of the CPU, one launch, graphs."""

import copy

import pytest
import torch
from optim_cases import CASES, ONE_EACH, PENALTY, given, named, numbers, pair
from oracle import assert_same_bits
from test_cuda_calls import assert_only, device_work
from test_cuda_streams import captured

from fused_reg import _devices

EACH = pytest.mark.parametrize(("name", "options"), named(ONE_EACH))
ALL = pytest.mark.parametrize(("name", "options"), named(CASES))
SIZES = ((7, torch.float32), (40000, torch.float32), (133, torch.bfloat16), (65, torch.float64), (20000, torch.float16))
#: Steps that are counted on the device. torch has none of Adagrad's on CUDA.
ON_DEVICE = {"Adam": {"fused": True}, "AdamW": {"capturable": True}, "RMSprop": {"capturable": True}}


def made(name, options, device="cpu", sizes=SIZES, **more):
    params = [torch.nn.Parameter(numbers(n).to(device, dtype)) for n, dtype in sizes]
    return pair(name)[1](params, **{**options, **PENALTY, **more})


def results(optimizer):
    """Weights, states and the penalty."""
    params = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(x for state in optimizer.state.values() for x in state.values()), optimizer.penalty]


@EACH
def test_an_overflow_that_the_host_does_not_read(name, options, monkeypatch):
    """Also at the first step: nothing is written, and the penalty is the last one's. Else the gradient is unscaled."""
    ours, plain = (made(name, options, sizes=SIZES[:2]) for _ in range(2))
    for optimizer in (ours, plain):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(9))], "l1": 0.5})
    params = [p for group in ours.param_groups for p in group["params"]]
    monkeypatch.setattr(_devices, "is_at_hand", lambda tensor: False)
    ours.grad_scale = torch.tensor(4.0)
    for i, overflow in enumerate((True, False, True, False)):
        given(ours, i)
        for p in params:
            p.grad *= 4
        states, penalty = copy.deepcopy(ours.state_dict()["state"]), ours.penalty
        grads = [p.grad.clone() for p in params]
        ours.found_inf = torch.tensor([float(overflow)])
        ours.step()
        if overflow:
            for place, state in states.items():
                assert_same_bits(list(ours.state_dict()["state"][place].values()), list(state.values()))
            assert_same_bits([ours.penalty, *(p.grad for p in params)], [penalty, *grads])
        else:
            given(plain, i).step()
            assert_same_bits(results(ours), results(plain))
            assert_same_bits([p.grad for p in params], [grad / 4 for grad in grads])


@pytest.mark.cuda
@ALL
@pytest.mark.parametrize("prox", [False, True, "preconditioned"])
def test_bits_of_the_cpu(name, options, prox, cuda):
    counted = [{}, ON_DEVICE[name]] if name in ON_DEVICE else [{}]
    here = made(name, options, prox=prox)
    there = [made(name, options, cuda, prox=prox, **more) for more in counted]
    for i in range(3):
        for optimizer in (here, *there):
            given(optimizer, i)
            optimizer.step()
    for optimizer in there:
        assert_same_bits(results(optimizer), results(here))


@pytest.mark.cuda
@EACH
@pytest.mark.parametrize("count", [161, 1000])
def test_launches(name, options, count, cuda):
    """One, with no copy and no fill, though the numbers change; lists beyond the arguments' table included."""
    optimizer = made(name, options, cuda, [(9, torch.float32)] * count, **ON_DEVICE.get(name, {}))
    given(optimizer)
    for i in range(4):
        optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    assert_only("step_kernel", device_work(optimizer.step))


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["SGD", *ON_DEVICE])
def test_graphs(name, cuda):
    """Replays count on, and read the rate and the strengths of then."""
    options = {"momentum": 0.9} if name == "SGD" else ON_DEVICE[name]
    rate, strength = torch.tensor(0.01, device=cuda), torch.tensor(0.02, device=cuda)
    replayed, stepped = (made(name, {**options, "lr": rate.clone(), "l1": strength}, cuda) for _ in range(2))
    for optimizer in (replayed, stepped):
        optimizer.param_groups[0].update(lr=rate, l1=strength)
        given(optimizer)

    def step():
        replayed.step()
        return [replayed.penalty]

    graph, (value,) = captured(step)
    for _ in range(3):
        stepped.step()
    for i in range(5):
        rate.fill_(0.01 / (i + 1))
        strength.fill_(0.02 * i)
        graph.replay()
        stepped.step()
        assert_same_bits([value], [stepped.penalty])
    assert_same_bits(results(replayed)[:-1], results(stepped)[:-1])


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # what was captured raised
def test_counts_on_the_host_in_a_graph(cuda):
    optimizer = given(made("Adam", {"lr": 0.01}, cuda))
    optimizer.step()
    with pytest.raises(RuntimeError, match="steps must be counted on the parameters' device"):
        captured(optimizer.step)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_scaler_on_the_device(name, cuda):
    """Without a look of the host at what the scaler finds; at the first step of a momentum with one."""
    ours, plain = made(name, {"lr": 0.01}, cuda, SIZES[:2], fused=True), made(name, {"lr": 0.01}, cuda, SIZES[:2])
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, backoff_factor=0.5, growth_interval=100)
    for i, factor in enumerate((1.0, float("inf"), 2.0)):
        for optimizer in (ours, plain):
            given(optimizer, i)
        for p in ours.param_groups[0]["params"]:
            p.grad *= scaler.scale(torch.ones((), device=cuda)) * factor
        for p in plain.param_groups[0]["params"]:
            p.grad *= factor
        scaler.step(ours)
        scaler.update()
        if i != 1:
            plain.step()
        assert_same_bits([p.detach() for p in ours.param_groups[0]["params"]], results(plain)[:2])
        assert_same_bits([ours.penalty], [plain.penalty])
