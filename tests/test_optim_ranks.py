"""`fused_reg.optim` on several processes: parameters that are DTensors step as whole ones do in one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from optim_cases import ONE_EACH, PENALTY, assert_same, backward, named, net, pair
from ranks import mesh_of, ranks
from test_fsdp import Net, X, hybrid, own_rows, sharded, tensor_parallel, whole

from fused_reg import fused_penalty

SGD, ADAM, *MORE = ONE_EACH
EACH = pytest.mark.parametrize(
    ("name", "options"), [*named([SGD, ADAM]), *(pytest.param(*case, marks=pytest.mark.long) for case in MORE)]
)


def tensor_parallel_alone(model):
    from torch.distributed.tensor import init_device_mesh

    return tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def in_two_dimensions(model):
    """Of the mesh: tensor parallel, then fully_shard. Some parameters are on a mesh of one dimension."""

    mesh = mesh_of((2, dist.get_world_size() // 2), ("dp", "tp"))
    return sharded(tensor_parallel(model, mesh["tp"]), mesh["dp"])


#: How a net is cut, and into how many parts its data are.
ARRANGEMENTS = {
    "fully_shard": (sharded, 4),
    "hybrid": (hybrid, 4),
    "tensor parallel": (tensor_parallel_alone, 1),  # beside plain tensors
    "both": (in_two_dimensions, 2),
}


def gradients(model, rows, penalty=None):
    model.zero_grad()
    loss = model(rows).square().mean()
    if penalty is not None:
        loss = loss + fused_penalty(model.parameters(), **penalty)
    loss.backward()


def all_of(model):
    if hasattr(model, "reshard"):
        model.reshard()
    return [whole(p.detach()) for p in model.parameters()]


def rows_of(parts):
    return X.double().chunk(parts)[dist.get_rank() * parts // dist.get_world_size()]


def check_steps(name, options, arrangement, prox) -> None:
    """Coupled: as torch's with the penalty in the loss, without processes. The value is that of all, on each, by what
    they tell one another when it is looked at."""
    from torch.distributed.tensor.debug import CommDebugMode

    arrange, parts = ARRANGEMENTS[arrangement]
    model, expected = arrange(Net(True, 12).double()), Net(True, 12).double()
    optimizer = pair(name)[1](model.parameters(), **options, **PENALTY, prox=prox)
    own = {**PENALTY, "prox": prox} if prox else {}
    of_whole = pair(name)[bool(prox)](expected.parameters(), **options, **own)
    torch.testing.assert_close(whole(optimizer.penalty), fused_penalty(all_of(expected), **PENALTY))
    for _ in range(3):
        before = fused_penalty([p.detach() for p in expected.parameters()], **PENALTY)
        gradients(model, rows_of(parts))
        gradients(expected, X.double(), None if prox else PENALTY)
        with CommDebugMode() as of_step:
            optimizer.step()
        of_whole.step()
        with CommDebugMode() as of_look:
            assert optimizer.penalty.shape == ()
        assert (of_step.get_total_counts(), of_look.get_total_counts() > 0) == (0, True)
        torch.testing.assert_close(whole(optimizer.penalty), before)
    assert_same(all_of(model), expected, rtol=1e-6, atol=1e-8)


@EACH
@pytest.mark.parametrize("prox", [False, True])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_steps(name, options, arrangement, prox):
    options = {k: x for k, x in options.items() if not (k == "lr_decay" and prox)}
    ranks(4).run(check_steps, name, options, arrangement, prox)


def check_without_gradients(name, options) -> None:
    """What has none is left alone on every process, and counts."""
    model, expected = sharded(Net(False).double()), Net(False).double()
    found = []
    for m, rows in ((model, own_rows().double()), (expected, X.double())):
        optimizer = pair(name)[1](m.parameters(), **options, **PENALTY)
        for i in range(3):
            gradients(m, rows)
            if i != 1:
                m.b.weight.grad = m.scale.grad = None
            optimizer.step()
            found.append(whole(optimizer.penalty))
    torch.testing.assert_close(found[:3], found[3:])
    assert_same(all_of(model), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "options"), named([SGD, ADAM]))
def test_without_gradients(name, options):
    ranks(4).run(check_without_gradients, name, options)


def check_states(name, options) -> None:
    """Gathered, they are torch's of a whole net, which go on from there, and come back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    asked = StateDictOptions(full_state_dict=True)
    model, expected = sharded(Net(True).double()), Net(True).double()
    optimizer = pair(name)[1](model.parameters(), **options)
    for _ in range(2):
        gradients(model, own_rows().double())
        optimizer.step()
    model.zero_grad()  # or torch makes no states to load into
    for p, q in zip(expected.parameters(), all_of(model), strict=True):
        p.data.copy_(q)
    of_whole = pair(name)[0](expected.parameters(), **{**options, "lr": 0.5})
    set_optimizer_state_dict(expected, of_whole, get_optimizer_state_dict(model, optimizer, options=asked))
    back = pair(name)[1](model.parameters(), **{**options, "lr": 0.5, "l1": 1.0})
    before = all_of(model)
    set_optimizer_state_dict(model, back, copy.deepcopy(get_optimizer_state_dict(expected, of_whole)), options=asked)
    assert_same(all_of(model), before, rtol=0, atol=0)
    back.param_groups[0]["l1"] = 0.0
    for _ in range(2):
        gradients(model, own_rows().double())
        gradients(expected, X.double())
        back.step()
        of_whole.step()
    assert_same(all_of(model), expected, rtol=1e-6, atol=1e-8)


@EACH
def test_states(name, options):
    ranks(4).run(check_states, name, options)


def check_redundancy(name, options) -> None:
    """ZeRO: each process steps its share, and has the penalty of that."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, expected = net(), net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), pair(name)[1], **options, **PENALTY)
    of_whole = pair(name)[1](expected.parameters(), **options, **PENALTY)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for i in range(3):
        backward(model, i)
        backward(expected, i)
        of_whole.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        of_whole.step()
        scheduler.step()
    assert_same(model, expected, rtol=0, atol=0)
    penalty = optimizer.optim.penalty
    dist.all_reduce(penalty)
    torch.testing.assert_close(penalty, of_whole.penalty)


@EACH
def test_redundancy(name, options):
    ranks(4).run(check_redundancy, name, options)
