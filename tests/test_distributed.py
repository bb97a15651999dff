"""Lists with DTensors, on 1 to 4 processes: what comes out is what one process gets of the whole parameters."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from oracle import assert_same_bits
from ranks import mesh_of, ranks
from samples import DTYPES, draw, first_quick
from torch import nn

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, prox_, value_and_grad

WORLDS = first_quick(4, 3, 2)  # four have meshes of two dimensions

# Every strength kind; where there are several, for a list of len(LAYOUTS) + 1.
STRENGTHS = (
    {},
    {"l1": 0.1},
    {"l1": 0.1, "l2": 0.3},
    {"l2_norm": 0.3},
    {"l1": 0.1, "l2": 0.2, "l2_norm": 0.3, "group": "row"},
    {"l1": [0.1 * i for i in range(9)], "l2_norm": [0.3 * (i % 3) for i in range(9)]},
    {"l1": torch.tensor(0.1), "l2_norm": torch.arange(9) / 8, "group": "row"},
    {"l2": 0.1, "l2_norm": 0.3, "group": "column"},
    {"l1": 0.1, "smooth_l1": [0.1 * i for i in range(9)], "beta": torch.arange(9) / 4},
)


def cut(t: torch.Tensor, mesh, placements) -> torch.Tensor:
    """A DTensor of a tensor that every process has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(t, mesh, placements, src_data_rank=None)


def shard(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to_local() if hasattr(t, "placements") else t.detach()


def shards(full, like) -> list[torch.Tensor]:
    """What this process has of tensors that are cut as others are."""
    return [
        shard(cut(t.detach(), p.device_mesh, p.placements)) if hasattr(p, "placements") else t.detach()
        for t, p in zip(full, like, strict=True)
    ]


def assert_agree(sharded, full) -> None:
    """Tensors that are cut have the bits of those that are not."""
    assert_same_bits(list(map(shard, sharded)), shards(full, sharded))


def assert_near(sharded, full, rtol) -> None:
    for got, expected in zip(map(shard, sharded), shards(full, sharded), strict=True):
        assert torch.allclose(got, expected, rtol=rtol, atol=1e-12)


def assert_laid_out_as(grad, p) -> None:
    assert type(grad) is type(p) or type(grad) is torch.Tensor
    assert grad.shape == p.shape
    assert grad.dtype == p.dtype
    if hasattr(p, "placements"):
        assert grad.placements == p.placements
        assert grad.device_mesh == p.device_mesh
        assert grad.stride() == p.stride()
        assert grad.to_local().shape == p.to_local().shape


def assert_gradients_agree(sharded, full) -> None:
    for p in sharded:
        assert_laid_out_as(p.grad, p)
    assert_agree([p.grad for p in sharded], [p.grad for p in full])


def check_everything(sharded, full, strengths) -> None:
    """Every function, on parameters and on what they are together."""
    sharded, full = [nn.Parameter(p) for p in sharded], [nn.Parameter(p.clone()) for p in full]
    value, expected = fused_penalty(sharded, **strengths), fused_penalty(full, **strengths)
    assert type(value) is torch.Tensor
    assert_same_bits([value], [expected])
    for loss in (3 * value, 3 * expected):
        loss.backward()
    assert_gradients_agree(sharded, full)

    (value, grads), (expected, expected_grads) = (value_and_grad(ps, **strengths) for ps in (sharded, full))
    assert_same_bits([value], [expected])
    for p, grad in zip(sharded, grads, strict=True):
        assert_laid_out_as(grad, p)
    assert_agree(grads, expected_grads)

    sharded[0].grad = full[0].grad = None
    sharded[1].requires_grad_(False)
    full[1].requires_grad_(False)
    for scale in (0.25, torch.tensor(3.0)):
        value, expected = (accumulate_grad_(ps, **strengths, scale=scale) for ps in (sharded, full))
        assert_same_bits([value], [expected])
        assert_gradients_agree(sharded, full)

    prox_(sharded, **strengths, step=0.5)
    prox_(full, **strengths, step=0.5)
    assert_agree(sharded, full)


def random_model(seed: int) -> list[torch.Tensor]:
    """Uneven shapes, also 0-dim, empty and with a first dimension of 1."""
    rng = np.random.default_rng(seed)
    shapes = [tuple(rng.integers(1, 24, rng.integers(1, 4)).tolist()) for _ in range(rng.integers(1, 12))]
    return [draw(shape, seed=i) for i, shape in enumerate([(1, 7), *shapes, (0, 3), (1,)])]


def random_models():
    """Parameters and strengths."""
    kinds = ({}, {"l1": 0.1}, {"l1": 0.37, "l2": 1 / 3}, {"l2": 0.1, "l2_norm": 0.7})
    return [(random_model(seed), kinds[seed % 4]) for seed in range(40)]


def check_random_models() -> list[float]:
    from torch.distributed.tensor import Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = []
    for full, strengths in random_models():
        sharded = [nn.Parameter(cut(p, mesh, [Shard(0)])) for p in full]
        full = [nn.Parameter(p) for p in full]
        value, expected = fused_penalty(sharded, **strengths), fused_penalty(full, **strengths)
        for loss in (0.3 * value, 0.3 * expected):
            loss.backward()
        assert_gradients_agree(sharded, full)
        values.append(value.item())
    return values


@pytest.mark.parametrize("world", WORLDS)
def test_random_models_have_the_same_bits_on_any_number_of_processes(world):
    expected = [fused_penalty(params, **strengths).item() for params, strengths in random_models()]
    assert len(set(expected)) == 40
    assert ranks(world).run(check_random_models) == [expected] * world


def layouts(dtype=torch.float32):
    """Parameters cut in every way that meshes of this world allow, and what they are together."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    world = dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    meshes = [line] * 5
    placements = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()], [Shard(1)]]
    if world == 4:
        grid = mesh_of((2, 2), ("dp", "tp"))
        meshes += [grid, grid["tp"], grid, grid]
        placements += [[Replicate(), Shard(0)], [Shard(0)], [Shard(0), Shard(1)], [Shard(0), Shard(0)]]
    else:
        meshes += [line] * 4
        placements += [[Shard(2)], [Shard(0)], [Replicate()], [Shard(1)]]
    shapes = [(5, 7), (1, 3), (4, 1), (3, 2), (2, 9), (6, 3, 5), (8,), (5, 3), (7, 4)]
    full = [draw(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
    sharded = list(map(cut, full, meshes, placements))
    sharded[3] = full[3].clone()  # one that is no DTensor
    return sharded, full


def check_layouts(index: int) -> None:
    check_everything(*layouts(), STRENGTHS[index])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("index", range(len(STRENGTHS)))
def test_every_layout(index, world):
    ranks(world).run(check_layouts, index)


def check_dtypes() -> None:
    for dtype in DTYPES:
        for strengths in ({"l1": 0.1, "l2": 0.3}, {"l1": 0.1, "l2_norm": 0.3, "group": "row"}):
            sharded, full = layouts(dtype)
            sharded, full = [nn.Parameter(p) for p in sharded], [nn.Parameter(p) for p in full]
            value, expected = fused_penalty(sharded, **strengths), fused_penalty(full, **strengths)
            assert value.dtype == expected.dtype
            assert torch.allclose(value, expected, rtol=4e-15, atol=0)
            for loss in (value, expected):
                loss.backward()
            prox_(sharded, **strengths, step=0.5)
            prox_(full, **strengths, step=0.5)
            if "l2_norm" not in strengths or dtype != torch.float64:
                assert_gradients_agree(sharded, full)
                assert_agree(sharded, full)
            assert_near([p.grad for p in sharded], [p.grad for p in full], rtol=1e-15)  # a norm has been added twice
            assert_near(sharded, full, rtol=1e-15)
    mixed = [p for dtype in DTYPES for p in layouts(dtype)[0]]
    assert fused_penalty(mixed).dtype == torch.float64
    total = sum(fused_penalty(layouts(dtype)[0]).double() for dtype in DTYPES)
    assert torch.allclose(fused_penalty(mixed), total, rtol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_dtypes(world):
    ranks(world).run(check_dtypes)


def check_trained_strengths() -> None:
    norms = (("l1", "l2", "l2_norm"), ("l2_norm",))
    for group, kinds in [("tensor", ("l1", "l2")), *itertools.product(("tensor", "row", "column"), norms)]:
        lists = [[nn.Parameter(p) for p in params] for params in layouts()]
        found = []
        for params in lists:
            strengths = {kind: torch.tensor(0.1 * (i + 1), requires_grad=True) for i, kind in enumerate(kinds)}
            value = fused_penalty(params, **strengths, group=group)
            (2 * value).backward()
            found.append([value.detach(), *(s.grad for s in strengths.values())])
        assert_near(*found, rtol=1e-6)
        assert_near(*([p.grad for p in params] for params in lists), rtol=1e-6)


def check_range() -> None:
    """Hard case 51: norms of pieces whose squares leave the range of float64."""
    for scale, group, is_trained in itertools.product(
        (1e200, 1e-200, 1e-307), ("tensor", "row", "column"), (False, True)
    ):
        found, lists = [], [[nn.Parameter(scale * p) for p in params] for params in layouts(torch.float64)]
        for params in lists:
            l2_norm = torch.tensor(0.3, dtype=torch.float64, requires_grad=True) if is_trained else 0.3
            value = fused_penalty(params, l2_norm=l2_norm, group=group)
            value.backward()
            found.append([value.detach() / scale, *([l2_norm.grad / scale] if is_trained else [])])
            (row,) = Regularizer(params, l2_norm=0.3, group=group).report().rows[-1:]
            assert abs(row["value"] / value.item() - 1) < 1e-12
        assert_near(*found, rtol=1e-13)
        assert_near(*([p.grad for p in params] for params in lists), rtol=1e-13)


@pytest.mark.parametrize("world", WORLDS)
def test_range(world):
    ranks(world).run(check_range)


@pytest.mark.parametrize("world", WORLDS)
def test_strengths_that_require_grad(world):
    ranks(world).run(check_trained_strengths)


def check_higher_derivatives() -> None:
    lists = [[nn.Parameter(p) for p in params] for params in layouts()]
    for params in lists:
        value = fused_penalty(params, l1=0.1, l2=0.3)
        grads = torch.autograd.grad(value.square(), params, create_graph=True)
        fused_penalty(grads, l1=0.2, l2=0.1).backward()
    assert_near(*([p.grad for p in params] for params in lists), rtol=1e-5)
    params = [nn.Parameter(p) for p in layouts()[0]]
    with pytest.raises(NotImplementedError, match="higher derivative of norms that are cut over processes"):
        torch.autograd.grad(fused_penalty(params, l2_norm=0.1), params, create_graph=True)


@pytest.mark.parametrize("world", WORLDS)
def test_higher_derivatives(world):
    ranks(world).run(check_higher_derivatives)


def check_collectives() -> list[tuple[int, ...]]:
    from torch.distributed.tensor.debug import CommDebugMode

    def count(function) -> int:
        with CommDebugMode() as mode:
            function()
        return mode.get_total_counts()

    counts = []
    for strengths in ({"l1": 0.1}, {"l2_norm": 0.1}, {"l2_norm": 0.1, "group": "row"}):
        params = [nn.Parameter(p) for p in layouts()[0]]
        held = []
        counts.append(
            (
                count(lambda ps=params, kw=strengths, out=held: out.append(fused_penalty(ps, **kw))),
                count(lambda out=held: out[0].backward()),
                count(lambda ps=params, kw=strengths: value_and_grad(ps, **kw)),
                count(lambda ps=params, kw=strengths: accumulate_grad_(ps, **kw)),
                count(lambda ps=params, kw=strengths: prox_(ps, **kw, step=0.1)),
            )
        )
    return counts


@pytest.mark.parametrize("world", WORLDS)
def test_one_collective_for_each_bucket_and_none_for_gradients(world):
    # Buckets: what all processes share; of four, also what pairs share. With norms of rows: the parameters whose rows
    # are cut, and the others; and of four the one whose rows are cut over pairs and shared by the pairs.
    plain, rows, cut_rows = (1, 2, 1) if world < 4 else (2, 5, 2)
    expected = [(plain, 0, plain, plain, 0), (plain, 0, plain, plain, plain), (rows, 0, rows, rows, cut_rows)]
    assert ranks(world).run(check_collectives) == [expected] * world


def check_modes() -> None:
    sharded, full = layouts()
    expected = fused_penalty(full, 0.1)
    with torch.no_grad():
        assert_same_bits([fused_penalty(sharded, 0.1)], [expected])
    with torch.inference_mode():
        assert_same_bits([fused_penalty(sharded, 0.1)], [expected])
    assert not fused_penalty(sharded, 0.1).requires_grad
    some = [nn.Parameter(p, requires_grad=i == 0) for i, p in enumerate(sharded)]
    value = fused_penalty((p for p in some), 0.1)
    value.backward()
    assert_same_bits([value], [expected])
    assert [p.grad is None for p in some] == [i > 0 for i in range(len(some))]
    with torch.inference_mode():
        frozen = [p.detach() for p in layouts()[0][1:]]
    value = fused_penalty([some[0], *frozen], 0.1)
    some[0].grad = None
    value.backward()
    assert_same_bits([value], [expected])
    assert some[0].grad is not None
    value = fused_penalty(some, l2=0.1)
    with torch.no_grad():
        some[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    value = fused_penalty(some, l2=0.1)
    prox_(some, 0.1, step=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
    before = some[0].grad._version
    accumulate_grad_(some, 0.1)
    assert some[0].grad._version > before


def check_loss_is_a_dtensor() -> None:
    """In tensor parallel code the loss may be one: a replicated one, or sums that are pending."""
    from torch.distributed.tensor import Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = nn.Parameter(cut(draw((5, 7)), mesh, [Shard(0)]))
    expected = nn.Parameter(draw((5, 7)))
    loss = (w**2).sum().redistribute(mesh, [Replicate()]) + 2 * fused_penalty(w, l1=0.1)
    loss.backward()
    ((expected**2).sum() + 2 * fused_penalty(expected, l1=0.1)).backward()
    assert_near([w.grad], [expected.grad], rtol=1e-6)


def check_compiled_code() -> None:
    trained = torch.tensor(0.1, requires_grad=True)
    for strengths in ({"l1": 0.1, "l2": 0.3}, {"l1": torch.tensor(0.1), "l2_norm": 0.3}, {"l2": trained}):
        torch._dynamo.reset()
        sharded, full = ([nn.Parameter(p) for p in params] for params in layouts())

        def penalty(params, strengths=strengths):
            return fused_penalty(params, **strengths)

        value, expected = torch.compile(penalty, backend="aot_eager", fullgraph=True)(sharded), penalty(full)
        (3 * value).backward()
        (3 * expected).backward()
        assert_same_bits([value], [expected])
        assert_gradients_agree(sharded, full)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("check", [check_modes, check_loss_is_a_dtensor])
def test_composes(check, world):
    ranks(world).run(check)


@pytest.mark.parametrize("world", first_quick(2, 3, 4))
def test_compiled_code(world):
    ranks(world).run(check_compiled_code)


def check_errors() -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    first = nn.Parameter(torch.ones(3))
    second = nn.Parameter(cut(draw((5, 7)), mesh, [Shard(0)]))

    def fails(params, kind, message, **strengths) -> None:
        for function in (fused_penalty, value_and_grad, accumulate_grad_, lambda *a, **k: prox_(*a, **k, step=0.1)):
            with pytest.raises(kind, match=message):
                function(params, **strengths)
        assert [first.grad, second.grad] == [None, None]
        assert_agree([first, second], [torch.ones(3), draw((5, 7))])

    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    fails([first, second, partial], ValueError, r"params\[2\] must be sharded or replicated, got Partial.*redistribute")
    integer = cut(torch.ones(4, dtype=torch.int64), mesh, [Shard(0)])
    fails([first, second, integer], TypeError, r"params\[2\] must be floating point, got torch.int64")
    fails([second, first, "w"], TypeError, r"params\[2\] must be a tensor, got str")
    fails([first, second], ValueError, "l1 must be finite", l1=-1.0)
    alone = DeviceMesh("cpu", [0])
    elsewhere = nn.Parameter(DTensor.from_local(torch.ones(2), alone, [Shard(0)]))
    if dist.get_rank() > 0:
        with pytest.raises(ValueError, match=r"params\[1\] must be on a mesh with this process"):
            fused_penalty([first, elsewhere])
        with pytest.raises(ValueError, match=r"accumulate_grad_: params\[1\] must be on a mesh with this process"):
            accumulate_grad_([first, elsewhere])
        with pytest.raises(ValueError, match=r"prox_: params\[1\] must be on a mesh with this process"):
            prox_([first, elsewhere], step=0.1)
    strength = DTensor.from_local(torch.tensor(0.1), mesh, [Replicate()])
    fails([first, second], TypeError, "l1 must be a plain tensor, .* got a DTensor; use `.full_tensor", l1=strength)
    with pytest.raises(TypeError, match=r"accumulate_grad_: scale must be a plain tensor"):
        accumulate_grad_([first, second], l1=0.1, scale=strength)
    with pytest.raises(ValueError, match=r"params\[1\] must not share memory with params\[0\]"):
        accumulate_grad_([second, second])
    with pytest.raises(ValueError, match=r"params\[1\] must not share memory with params\[0\]"):
        prox_([second, second], step=0.1)
    with pytest.raises(ValueError, match=r"accumulate_grad_: params\[1\] must be a leaf"):
        accumulate_grad_([first, second * 2])
    assert [first.grad, second.grad] == [None, None]
    assert_agree([second], [draw((5, 7))])
    assert_same_bits([fused_penalty([second, second])], [fused_penalty([draw((5, 7))] * 2)])


@pytest.mark.parametrize("world", WORLDS)
def test_errors_change_nothing(world):
    ranks(world).run(check_errors)


def check_pending_gradients() -> None:
    """Where a layer leaves its gradient as sums that are pending."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = nn.Parameter(cut(draw(5), mesh, [Replicate()]))
    w.grad = DTensor.from_local(torch.full((5,), float(dist.get_rank())), mesh, [Partial()])
    accumulate_grad_([w], l2=0.5)
    expected = sum(range(dist.get_world_size())) + draw(5)
    assert_agree([w.grad], [expected])
    assert w.grad.placements == w.placements


@pytest.mark.parametrize("world", WORLDS)
def test_pending_gradients(world):
    ranks(world).run(check_pending_gradients)


def check_report() -> None:
    sharded, full = layouts()
    for params in (sharded, full):
        prox_(params, l1=0.5, l2_norm=0.5, group="row", step=1.0)  # zeros, and rows of them
    names = [f"p{i}" for i in range(len(full))]
    rules = [("p[0-3]", {"l1": 0.1, "l2_norm": 0.2}), ("*", {"l2": 0.3, "l2_norm": 0.1, "group": "row"})]
    reports = [
        Regularizer([(name, nn.Parameter(p)) for name, p in zip(names, params, strict=True)], rules=rules).report()
        for params in (sharded, full)
    ]
    for got, expected in zip(*(report.rows for report in reports), strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert got[key] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), key


@pytest.mark.parametrize("world", WORLDS)
def test_report_is_of_the_whole(world):
    ranks(world).run(check_report)
