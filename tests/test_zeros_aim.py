"""``zeros`` of a `Regularizer`: the smallest weights or groups are zero, so many as the aim says, at every step of
every optimizer; and the others are as the step left them."""

import copy
import io
import pickle
import re

import pytest
import torch
from optim_cases import ONE_EACH, backward, named, net, train
from oracle import assert_same_bits
from torch import nn

from fused_reg import Regularizer, optim
from fused_reg.schedules import CubicRamp, PatternRamp

RAMP = CubicRamp(0.0, 0.8, steps=8, delay=2)


def clones(model):
    return [p.detach().clone() for p in model.parameters()]


def weights(model):
    return [p for p in model.parameters() if p.ndim > 1]


def zeros_in(params):
    return sum(int((p == 0).sum()) for p in params)


def without_smallest(tensors, count):
    """The tensors with the first ``count`` of their elements, sorted by size, at zero."""
    flat = torch.cat([t.flatten() for t in tensors])
    flat[flat.abs().argsort(stable=True)[:count]] = 0
    return [x.view_as(t) for x, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.004, 0.5, 0.8, 0.99])
def test_elements_of_all_or_of_each(share, dtype):
    for per in (None, "parameter"):
        model = net(dtype)
        before = clones(model)
        names = [name for name, p in model.named_parameters() if round(share * p.numel()) not in (0, p.numel())]
        own = [p for name, p in model.named_parameters() if name in names]
        Regularizer(model, zeros=share, zeros_per=per, include=names).prox_(0.5)
        pools = [own] if per is None else [[p] for p in own]
        start = [b for (name, _), b in zip(model.named_parameters(), before, strict=True) if name in names]
        by_pool = [start] if per is None else [[b] for b in start]
        for pool, old in zip(pools, by_pool, strict=True):
            assert_same_bits(
                [p.detach() for p in pool], without_smallest(old, round(share * sum(map(torch.numel, old))))
            )


def norms_of(weight, dim, n=1):
    """Of runs of n slices along a dimension."""
    slices = weight.detach().double().movedim(dim, 0)
    return slices.reshape(slices.shape[0] // n, -1).norm(dim=1)


@pytest.mark.parametrize(
    ("group", "dims"),
    [("row", (0, 0)), ("column", (1, 1)), ("output", (0, 1)), ("input", (1, 0)), (("row", 2), (0, 0))],
    ids=str,
)
@pytest.mark.parametrize("is_weighed", [False, True])
def test_groups(group, dims, is_weighed):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.ConvTranspose2d(8, 4, 5))
    n = group[1] if isinstance(group, tuple) else 1
    before, own = clones(model), weights(model)
    norms = [norms_of(w, dim, n) for w, dim in zip(own, dims, strict=True)]
    sizes = [w.numel() // len(x) for w, x in zip(own, norms, strict=True)]
    weighed = [x / s**0.5 if is_weighed else x for x, s in zip(norms, sizes, strict=True)]
    flat = torch.cat(weighed)
    count = round(0.6 * len(flat))
    is_zero = torch.zeros(len(flat), dtype=torch.bool)
    is_zero[flat.argsort()[:count]] = True
    given = {"group_weights": "sqrt_size"} if is_weighed else {}
    regularizer = Regularizer(model, zeros=0.6, group=group, weights_only=True, **given)
    regularizer.prox_(0.1)
    found = [norms_of(w, dim, n) for w, dim in zip(own, dims, strict=True)]
    assert torch.equal(torch.cat(found) == 0, is_zero)
    for w, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(torch.where(w == 0, 0, old), w.detach())
    rows = [row for row in regularizer.report().rows if row["level"] == "parameter"]
    assert sum(row["zero_slices"] for row in rows) == count
    groups = [row for row in regularizer.report().rows if row["level"] == "group"]
    assert {row["zeros_reached"] for row in groups} == {count / len(flat)}


def test_blocks():
    w = nn.Parameter(torch.tensor([[1.0, 1.0, 3.0, 3.0], [2.0, 2.0, 0.5, 0.5]]))
    Regularizer([w], zeros=0.5, group=("block", 2)).prox_(0.1)
    assert w.tolist() == [[0, 0, 3, 3], [2, 2, 0, 0]]


OURS = [pytest.param(getattr(optim, name), given, id=f"ours-{name}") for name, given in ONE_EACH]
THEIRS = [pytest.param(getattr(torch.optim, name), given, id=name) for name, given in ONE_EACH]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("make", "given"), [*OURS, *THEIRS])
def test_every_optimizer_follows_the_ramp_and_holds_the_aim(make, given, seed):
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    optimizer = make(model.parameters(), **given)
    size = sum(w.numel() for w in weights(model))
    regularizer = Regularizer(model, zeros=RAMP, weights_only=True)
    regularizer.attach(optimizer, mode="prox")
    reached = []
    for i in range(30):
        backward(model, 100 * seed + i)
        optimizer.step()
        assert zeros_in(weights(model)) == round(RAMP(i) * size)
        reached.append(regularizer.report()["group 0"]["zeros_reached"])
    assert all(abs(share - 0.8) < 0.01 for share in reached[10:])
    assert regularizer.step == 30


@pytest.mark.parametrize(("name", "given"), named(ONE_EACH))
@pytest.mark.parametrize("mode", ["prox", "preconditioned"])
def test_the_aim_follows_the_step_and_its_penalty(name, given, mode):
    """The same in two: the penalty's step, and then its largest elements alone."""
    model, other = net(), net()
    optimizer, plain = (getattr(optim, name)(m.parameters(), **given) for m in (model, other))
    regularizer = Regularizer(model, l1=0.002, zeros=0.6)
    attachment = regularizer.attach(optimizer, mode=mode)
    penalty = Regularizer(other, l1=0.002).attach(plain, mode=mode)
    for i in range(4):
        backward(model, i)
        optimizer.step()
        backward(other, i)
        plain.step()
        count = round(0.6 * sum(p.numel() for p in other.parameters()))
        for p, x in zip(other.parameters(), without_smallest(clones(other), count), strict=True):
            p.data.copy_(x)
        assert_same_bits([p.detach() for p in model.parameters()], [p.detach() for p in other.parameters()])
        assert attachment.value == penalty.value > 0


def test_what_a_step_leaves_alone_is_left_alone():
    model = net()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = Regularizer(model, zeros=0.8, weights_only=True)
    regularizer.attach(optimizer, mode="prox")
    before = clones(model)
    optimizer.step()  # without a gradient it is none
    assert_same_bits(clones(model), before)
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    optimizer.step()
    assert zeros_in([model[2].weight]) == 48
    assert_same_bits([p.detach() for p in model.parameters()][:2], before[:2])
    model[0].weight.requires_grad_(True)
    model[0].weight.grad = torch.zeros_like(model[0].weight)
    model[2].weight.grad = None  # 48 of 60 are zero by now
    optimizer.step()
    assert (zeros_in([model[0].weight]), zeros_in([model[2].weight])) == (160, 48)
    few = nn.Parameter(torch.tensor([[1.0], [2.0]]))  # of which 0.8 is all
    optimizer = torch.optim.SGD([few, model[2].weight], lr=0.1)
    Regularizer([few, model[2].weight], zeros=0.8).attach(optimizer, mode="prox")
    few.grad = torch.zeros_like(few)
    optimizer.step()
    assert few.tolist() == [[0.0], [2.0]]


def test_a_step_that_a_scaler_skips_zeroes_nothing():
    model = net(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    regularizer = Regularizer(model, zeros=RAMP, weights_only=True)
    regularizer.attach(optimizer, mode="prox")
    regularizer.step = 5
    before = clones(model)
    backward(model, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    assert regularizer.step == 5
    assert_same_bits(clones(model), before)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_pattern(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 3, 3, bias=False), nn.Linear(8, 5, bias=False))
    model[1].weight.data[:, :4] = 1  # of equal ones the first two stay
    before = clones(model)
    regularizer = Regularizer(model, zeros=PatternRamp("2:4", steps=10) if share < 1 else "2:4")
    regularizer.step = {0.0: 0, 0.4: 2, 1.0: 7}[share]
    share = PatternRamp("2:4", steps=10)(2) if share == 0.4 else share
    regularizer.prox_(0.1)
    runs = torch.cat([p.detach().reshape(-1, 4) for p in model.parameters()])
    start = torch.cat([b.reshape(-1, 4) for b in before])
    rest = start.abs().argsort(dim=1, descending=True, stable=True)[:, 2:]
    allowed = torch.zeros_like(start, dtype=torch.bool).scatter(1, rest, True)
    sizes = start.abs()[allowed].sort().values
    count = round(share * len(sizes))
    assert int((runs == 0).sum()) == count
    assert not (runs == 0)[~allowed].any()
    assert start[runs == 0].abs().sum() == pytest.approx(sizes[:count].sum().item())
    assert torch.equal(torch.where(runs == 0, 0, start), runs)
    row = regularizer.report()["group 0"]
    assert row["zeros_aim"] == pytest.approx(share / 2)
    assert row["zeros_reached"] == pytest.approx(count / start.numel())


def test_two_of_four_is_what_sparse_kernels_take():
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    torch.manual_seed(0)
    layer = nn.Linear(64, 32).bfloat16()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    regularizer = Regularizer(layer, zeros=PatternRamp("2:4", steps=3), weights_only=True)
    regularizer.attach(optimizer, mode="prox")
    for i in range(5):
        optimizer.zero_grad()
        layer(torch.randn(8, 64, generator=torch.Generator().manual_seed(i)).bfloat16()).square().sum().backward()
        optimizer.step()
    weight = layer.weight.detach()
    assert int((weight == 0).sum()) == weight.numel() // 2
    packed = sparse_semi_structured_from_dense_cutlass(weight)
    assert packed[0].shape == (32, 32)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)


def test_rules_have_pools_of_their_own():
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10), nn.Linear(10, 8), nn.Linear(8, 4))
    rules = [("1.*", {"zeros": 0.5}), ("2.*", {"zeros": "1:2"}), ("3.*", {"zeros": 0.0, "l1": 0.1})]
    regularizer = Regularizer(model, zeros=0.8, weights_only=True, rules=rules)
    regularizer.prox_(0.0)
    assert [zeros_in([w]) for w in weights(model)] == [160, 100, 40, 0]
    assert [line.strip() for line in repr(regularizer).splitlines()[1:5]] == [
        "zeros=0.8: 1 parameter, 200 elements: 0.weight",
        "zeros=0.5: 1 parameter, 200 elements: 1.weight",
        'zeros="1:2": 1 parameter, 80 elements: 2.weight',
        "l1=0.1: 1 parameter, 32 elements: 3.weight",
    ]


@pytest.mark.parametrize("zeros", [0.5, CubicRamp(0.0, 0.5, steps=1)], ids=str)
def test_a_rule_with_the_share_of_others_has_a_pool_of_its_own(zeros):
    model = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(4)))
    for i, w in enumerate(model.parameters()):
        nn.init.uniform_(w, i + 1, i + 2)
    rules = [("1.*", {"zeros": zeros}), ("2.*", {"zeros": zeros}), ("3.*", {"l2": 0.0})]
    regularizer = Regularizer(model, zeros=zeros, rules=rules)
    regularizer.step = 1
    regularizer.prox_(0.0)
    assert [zeros_in([w]) for w in model.parameters()] == [100, 50, 50, 0]


def test_groups_and_elements_are_counted_apart():
    model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 10))
    Regularizer(model, zeros=0.5, weights_only=True, rules=[("1.*", {"group": "row"})]).prox_(0.0)
    first, second = weights(model)
    assert zeros_in([first]) == 100
    assert int((second == 0).all(1).sum()) == 5
    assert zeros_in([second]) == 100


def test_what_is_reported():
    model = net()
    regularizer = Regularizer(model, l2=0.5, zeros=RAMP, weights_only=True, rules=[("2.*", {"l2": 0.25})])
    regularizer.step = 4
    regularizer.prox_(0.0)
    count = round(RAMP(4) * 260)
    report = regularizer.report()
    for name in ("group 0", "group 1"):  # which reach it together
        assert (report[name]["zeros_aim"], report[name]["zeros_reached"]) == (RAMP(4), count / 260)
    assert report.total["zeros"] == count
    assert "zeros_aim" not in report["0.weight"]
    assert report.scalars()["regularizer/group 1/zeros_reached"] == count / 260
    assert re.search(r"aim\n.* 46.2 of 46.2 %\n", str(report))
    assert "zeros=0.4625 (schedule)" in repr(regularizer)
    assert "aim" not in str(Regularizer(model, l2=0.5).report())


def test_it_goes_on_from_a_checkpoint():
    def begin():
        model = net()
        optimizer = optim.Adam(model.parameters(), lr=0.01)
        regularizer = Regularizer(model, zeros=RAMP)
        regularizer.attach(optimizer, mode="prox")
        return model, optimizer, regularizer

    model, optimizer, regularizer = begin()
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, regularizer)], file)
    train(model, optimizer, range(5, 12))
    file.seek(0)
    again = begin()
    for x, state in zip(again, torch.load(file, weights_only=True), strict=True):
        x.load_state_dict(state)
    train(*again[:2], range(5, 12))
    assert_same_bits(clones(again[0]), clones(model))
    assert zeros_in(model.parameters()) == round(0.8 * 283)


@pytest.mark.parametrize("zeros", [0.7, RAMP, "2:4", PatternRamp("1:4", steps=5)], ids=str)
def test_copies_and_configurations(zeros):
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False))
    is_share = zeros in (0.7, RAMP)
    regularizer = Regularizer(model, zeros=zeros, zeros_per="parameter" if is_share else None)
    regularizer.step = 3
    config = Regularizer.from_config(regularizer.get_config(), copy.deepcopy(model))
    config.step = 3
    own, other = copy.deepcopy((model, regularizer)), pickle.loads(pickle.dumps((model, regularizer)))
    for again in (config, own[1], other[1]):
        assert repr(again) == repr(regularizer)
        again.prox_(0.0)
    regularizer.prox_(0.0)
    found = [dict(x.named_parameters()) for x in (regularizer, config, own[1], other[1])]
    for name, p in found[0].items():
        assert (p == 0).any()
        assert all(torch.equal(p, x[name]) for x in found[1:])


def test_a_module_that_changes_keeps_its_aim():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4))
    regularizer = Regularizer(model, zeros=RAMP, weights_only=True)
    regularizer.step = 10
    model[1] = nn.Linear(10, 6)
    with pytest.warns(UserWarning, match="it follows its module"):
        regularizer.prox_(0.0)
    assert zeros_in(weights(model)) == round(0.8 * 160)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its compiler, of itself
def test_in_a_compiled_step():
    model, other = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for m, optimizer in zip((model, other), optimizers, strict=True):
        Regularizer(m, zeros=RAMP).attach(optimizer, mode="prox")
    step = torch.compile(lambda: optimizers[0].step(), backend="eager")
    for i in range(12):
        backward(model, i)
        step()
        backward(other, i)
        optimizers[1].step()
    assert_same_bits(clones(model), clones(other))
    assert zeros_in(model.parameters()) == round(0.8 * 283)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_by_hand_in_compiled_code():
    model, other = net(), net()
    own, by_hand = Regularizer(model, l1=0.01, zeros=RAMP), Regularizer(other, l1=0.01, zeros=RAMP)
    step = torch.compile(lambda: own.prox_(0.1), backend="eager")
    for _ in range(12):
        step()
        own.advance()
        by_hand.prox_(0.1)
        by_hand.advance()
        assert_same_bits(clones(model), clones(other))
    assert zeros_in(model.parameters()) == round(0.8 * 283)
    with pytest.raises(RuntimeError, match="prox_: zeros must be reached outside of compiled code"):
        torch.compile(lambda: own.prox_(0.1), backend="eager", fullgraph=True)()


def test_a_ramp_by_hand_that_nobody_advances():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = Regularizer(model, zeros=RAMP)
    for i in range(2):
        regularizer.prox_(0.1)
        backward(model, i)
        optimizer.step()
    with pytest.warns(UserWarning, match="a schedule stands at step 0"):
        regularizer.prox_(0.1)


def test_channels_of_a_convolution_with_groups() -> None:
    conv = torch.nn.Conv2d(4, 8, 3, groups=2, bias=False)
    regularizer = Regularizer(conv, zeros=0.75, group="input")
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    regularizer.attach(optimizer, mode="prox")
    conv(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    channels = conv.weight.detach().unflatten(0, (2, 4))  # each has two in each of the groups
    assert (channels == 0).all((1, 3, 4)).sum() == 3
    assert regularizer.report()["group 0"]["zeros_reached"] == 0.75
