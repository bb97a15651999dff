"""Groups of several parameters that are DTensors: what comes out is what one process gets of the whole parameters."""

import pytest
import torch
import torch.distributed as dist
from ranks import ranks
from samples import draw, first_quick
from torch import nn

from fused_reg import Regularizer

SHAPES = {"w": (5, 4), "b": (5,), "v": (5, 3, 2), "one": (1, 6), "its bias": (1,), "alone": (7, 2)}
SETS = [("w", "b", "v"), ("one", "its bias")]


def both(mesh, placement, **others):
    """The parameters cut so, some of them otherwise; and whole."""
    from torch.distributed.tensor import distribute_tensor

    def cut(name, t):
        return distribute_tensor(t.clone(), mesh, [others.get(name, placement)], src_data_rank=None)

    whole = {name: draw(shape, torch.float64, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    return {n: nn.Parameter(cut(n, t)) for n, t in whole.items()}, {n: nn.Parameter(t) for n, t in whole.items()}


def assert_alike(cut, whole, of=lambda p: p.detach()) -> None:
    for name, p in cut.items():
        torch.testing.assert_close(of(p).full_tensor(), of(whole[name]), rtol=1e-12, atol=1e-14)


def check_everything() -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    of_columns = {"w": Shard(1), "v": Shard(1)}  # the pieces of each row are on several processes
    for placement, others, sets in (
        (Shard(0), {}, SETS),
        (Replicate(), {}, SETS),
        (Shard(0), of_columns, [("w", "v"), ("one", "its bias")]),
    ):
        cut, whole = both(mesh, placement, **others)
        given = {"l1": 0.1, "l2_norm": 0.3, "group": "row", "together": sets}
        own, expected = (Regularizer(params.items(), **given) for params in (cut, whole))
        value = own()
        torch.testing.assert_close(value, expected(), rtol=1e-12, atol=0)
        for regularizer in (own, expected):
            (3 * regularizer()).backward()
        assert_alike(cut, whole, lambda p: p.grad)
        for regularizer in (own, expected):
            regularizer.accumulate_grad_(0.5)
        assert_alike(cut, whole, lambda p: p.grad)
        if placement == Shard(0) and not others:  # takes long
            torch._dynamo.reset()
            compiled = torch.compile(lambda regularizer=own: regularizer(), backend="aot_eager", fullgraph=True)()
            torch.testing.assert_close(compiled, value, rtol=1e-12, atol=0)
        strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        grads = []
        for params in (cut, whole):
            trained = Regularizer(params.items(), **{**given, "l2_norm": strength})()
            torch.testing.assert_close(trained, expected(), rtol=1e-12, atol=0)
            grads.append(torch.autograd.grad(trained, strength))
        torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
        for regularizer in (own, expected):
            regularizer.prox_(5.0)
        assert_alike(cut, whole)
        reports = [regularizer.report() for regularizer in (own, expected)]
        zeros, values = ([report.total[kind] for report in reports] for kind in ("zeros", "value"))
        assert zeros[0] == zeros[1] > 0
        assert values[0] == pytest.approx(values[1], rel=1e-12)
        assert [row.get("zero_slices") for row in reports[0].rows] == [r.get("zero_slices") for r in reports[1].rows]


@pytest.mark.parametrize("world", first_quick(2, 3, 4))
def test_dtensors(world):
    ranks(world).run(check_everything)


def check_fully_shard() -> None:
    """Attached, and followed to the DTensors that the parameters have become."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for layer in (nets[0][0], nets[0]):
        fully_shard(layer)
    x = torch.ones(2, 4, dtype=torch.float64)
    for mode in ("grad", "prox"):
        attached, optimizers = [], []
        for net in nets:
            optimizers.append(torch.optim.SGD(net.parameters(), lr=0.1))
            regularizer = Regularizer(net, l2_norm=2.0, group="output", together="bias")
            attached.append(regularizer.attach(optimizers[-1], mode=mode))
        for _ in range(3):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                net(x).square().sum().backward()
                optimizer.step()
            torch.testing.assert_close(attached[0].value, attached[1].value, rtol=1e-10, atol=0)
            assert_alike(dict(nets[0].named_parameters()), dict(nets[1].named_parameters()))
        for attachment in attached:
            attachment.remove()


def test_fully_shard():
    ranks(2).run(check_fully_shard)


def check_errors() -> None:
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    given = {"l2_norm": 0.3, "group": "row"}
    for w in (Shard(1), Replicate()):
        cut, _ = both(mesh, Shard(0), w=w)
        with pytest.raises(ValueError, match=r"^Regularizer: params\['b'\] must be cut as params\['w'\], because"):
            Regularizer(cut.items(), **given, together=SETS)
    cut, _ = both(mesh, Shard(0))
    with pytest.raises(TypeError, match=r"^Regularizer: group_weights\['b'\] must be of plain tensors, got a DTensor"):
        Regularizer(cut.items(), **given, group_weights={"b": torch.ones(5)})
    layer = nn.ConvTranspose1d(5, 5, 2)
    layer.weight = nn.Parameter(torch.distributed.tensor.distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(
        ValueError, match=r"^Regularizer: params\['weight'\] must be a plain tensor, to have columns tog"
    ):
        Regularizer(layer, l2_norm=0.3, group="output", together="bias")


def test_errors():
    ranks(2).run(check_errors)
