"""``toward`` and ``importance`` in compiled code, and with parameters that are cut over processes (DTensor)."""

import pytest
import torch
from oracle import assert_same_bits
from ranks import ranks
from samples import draw_list, leaves
from test_distributed import STRENGTHS, assert_agree, assert_gradients_agree, assert_near, layouts
from test_references import references
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, optim, prox_, value_and_grad

SHAPES = ((3,), (5, 7), (257,))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
@pytest.mark.parametrize("given", ["toward", "importance", "both"])
def test_compiled(given):
    terms = {"l1": 0.1, "l2": 0.2, **references(draw_list(shapes=SHAPES), given)}
    backend = CompileCounterWithBackend("aot_eager")

    def penalties(params, terms):
        return fused_penalty(params, **terms), value_and_grad(params, **terms)

    def steps(params, terms):
        value = accumulate_grad_(params, **terms)
        prox_(params, step=0.1, **terms)
        return value

    results = []
    for function in (lambda f: f, lambda f: torch.compile(f, backend=backend, fullgraph=True)):
        params = leaves(draw_list(shapes=SHAPES))
        for p in params:
            p.grad = torch.ones_like(p)
        loss, (value, grads) = function(penalties)(params, terms)
        loss.backward()
        results.append([loss, value, *grads, function(steps)(params, terms), *(p.grad for p in params), *params])
    assert_same_bits(*results)
    assert backend.frame_count == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", [fused_penalty, value_and_grad, accumulate_grad_, prox_])
@pytest.mark.parametrize("strength", [0.3, [0.1, 0.2]], ids=["one", "each"])
def test_a_compiled_importance_is_looked_at(function, strength):
    """Where it is used, and the sentence is that of a use that is not compiled."""
    errors = []
    for is_compiled in (False, True):
        params, importance = leaves([torch.ones(3), torch.ones(2, 4)]), [torch.ones(3), torch.ones(2, 1)]
        more = {"step": 0.1} if function is prox_ else {}

        def use(params=params, importance=importance, more=more):
            return function(params, l1=strength, importance=importance, **more)

        run = torch.compile(use, backend="aot_eager", fullgraph=True) if is_compiled else use
        run()
        importance[1][1] = -2
        with pytest.raises(ValueError, match=r"importance\[1\] must be finite and >= 0, got -2") as found:
            run()
        errors.append(str(found.value))
        importance[1][1] = 2
        run()
    assert errors[1] == errors[0]


@pytest.mark.filterwarnings("ignore")
def test_a_regularizer_compiled():
    net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    regularizer = Regularizer(net, l1=0.1, l2=0.3, toward="start", importance={"0.bias": torch.rand(4)})
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    results = []
    for function in (regularizer, torch.compile(lambda: regularizer(), backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        value = function()
        value.backward()
        results.append([value, *(p.grad for p in net.parameters())])
    assert_same_bits(*results)


def same(xs, like):
    """References of the whole, cut as the parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    return [
        distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x
        for x, p in zip(xs, like, strict=True)
    ]


def check_layouts() -> None:
    for strengths in (STRENGTHS[2], STRENGTHS[4], STRENGTHS[8]):
        sharded, full = layouts()
        whole = references(full, "toward" if "l2_norm" in strengths else "both")
        cut = {name: same(xs, sharded) for name, xs in whole.items()}
        sharded, full = [nn.Parameter(p) for p in sharded], [nn.Parameter(p.clone()) for p in full]
        value, grads = value_and_grad(sharded, **strengths, **cut)
        expected, expected_grads = value_and_grad(full, **strengths, **whole)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        assert_near(grads, expected_grads, rtol=1e-6)
        for params, given in ((sharded, cut), (full, whole)):
            fused_penalty(params, **strengths, **given).backward()
            accumulate_grad_(params, **strengths, **given)
            prox_(params, **strengths, **given, step=0.5)
        assert_near([p.grad for p in sharded], [p.grad for p in full], rtol=1e-6)
        assert_near(sharded, full, rtol=1e-6)
        if "l2_norm" not in strengths:
            assert_gradients_agree(sharded, full)
            assert_agree(sharded, full)


def check_what_is_not_cut_alike() -> None:
    sharded, full = layouts()
    for p, x in ((sharded[0], full[0]), (full[0], sharded[0]), (sharded[0], sharded[3])):
        with pytest.raises(ValueError, match=r"^fused_penalty: toward\[0\] must (be|have the)"):
            fused_penalty(nn.Parameter(p), l2=0.1, toward=x)
    with pytest.raises(ValueError, match=r"must be a DTensor of .*, got a plain tensor; use `distribute"):
        fused_penalty(nn.Parameter(sharded[0]), l2=0.1, importance=full[0].abs())


def check_fully_shard() -> list[float]:
    from torch.distributed.fsdp import fully_shard

    trained = []
    for is_cut, is_attached in ((False, True), (True, True), (True, False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2))
        if is_cut:
            fully_shard(model)
        strengths = {"l1": 0.1, "l2": 0.3, "toward": "start"}
        regularizer = Regularizer(model, **strengths)
        optimizer = optim.Adam(model.parameters(), lr=0.05, **({} if is_attached else strengths))
        if is_attached:
            regularizer.attach(optimizer)
        values = []
        for i in range(3):
            optimizer.zero_grad()
            model(torch.linspace(-1, 1, 36).reshape(4, 9) + i).square().sum().backward()
            optimizer.step()
            values.append(optimizer.penalty.item())
        full = [p.full_tensor() if is_cut else p.detach() for p in model.parameters()]
        trained.append([*full, torch.tensor(values), regularizer().detach()])
        if is_cut:
            again = Regularizer(model, l1=0.1, l2=0.3, toward="start")
            assert again() == 0
            again.load_state_dict(regularizer.state_dict())
            assert again() == regularizer()
    for x, y, z in zip(*trained, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # of the loss, which adds in another order
        torch.testing.assert_close(y, z, rtol=0, atol=0)
    return trained[0][-2].tolist()


def check_converted() -> list[float]:
    """What is cut follows its module as a whole one does."""
    import warnings

    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    warnings.simplefilter("ignore")  # that it follows
    mesh, found = init_device_mesh("cpu", (4,)), []
    for is_cut in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(9, 6)
        if is_cut:
            for name, p in [*model.named_parameters()]:
                setattr(model, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        importance = {"weight": model.weight.detach().abs()}
        regularizer = Regularizer(model, l1=0.1, l2=0.3, toward="start", importance=importance)
        optimizer = optim.SGD(model.parameters(), lr=0.1, l2=0.3, toward="start")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
        model.double()
        assert all(p.dtype is torch.float64 and isinstance(p, DTensor) == is_cut for p in model.parameters())
        regularizer.prox_(0.1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        found.append([x.item() for x in (regularizer(), optimizer.penalty)] + [regularizer.report().total["value"]])
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)
    return found[0]


@pytest.mark.parametrize("check", [check_layouts, check_what_is_not_cut_alike, check_fully_shard, check_converted])
def test_cut_over_processes(check):
    results = ranks(4).run(check)
    assert results == results[:1] * 4
    if check is check_fully_shard:
        assert 0 == results[0][0] < results[0][1] < results[0][2]
