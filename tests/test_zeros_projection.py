"""The projection that reaches an aim: the very smallest become zero, whatever is equal, infinite or NaN, in pieces on
the host and as on a GPU."""

import itertools

import pytest
import torch
from oracle import assert_same_bits
from test_zeros_aim import clones, weights, without_smallest, zeros_in
from torch import nn

from fused_reg import Regularizer
from fused_reg.regularizer import projection
from fused_reg.regularizer import smallest as ranking
from fused_reg.regularizer.smallest import smallest
from fused_reg.schedules import PatternRamp


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_are_found_whatever_is_equal(seed):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randint(6, (40,), generator=generator).double()
    whole[seed] = torch.nan  # larger than all
    whole[seed + 7] = torch.inf
    keys = [whole[:5].bfloat16(), whole[5:5], whole[5:30], whole[30:].float()]
    order = whole.argsort(stable=True)
    for count in range(40):
        expected = torch.zeros(40, dtype=torch.bool)
        expected[order[:count]] = True
        masks = smallest(keys, count)
        assert [m.shape for m in masks] == [k.shape for k in keys]
        assert torch.equal(torch.cat(masks), expected)


def long_lists():
    """Of values that differ, of few that repeat, of zeros mostly, in order; NaN and infinity; of mixed dtypes."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(3000, generator=generator)
    odd = whole.clone()
    odd[:7] = torch.nan
    odd[7:12] = -torch.inf
    yield "all differ", [whole[:1000], whole[1000:1000], whole[1000:].reshape(40, 50)]
    yield "few values", [whole.mul(2).round()]
    yield "mostly zeros", [torch.where(whole > 1, whole, 0)]
    yield "sorted", [whole.abs().sort().values]
    yield "not finite", [odd]
    yield "bfloat16", [whole[:1500].bfloat16(), whole[1500:].bfloat16()]
    yield "mixed", [whole[:1500].bfloat16(), whole[1500:].double()]
    yield "transposed", [whole.reshape(50, 60).t()]


@pytest.fixture(params=[True, False], ids=["on the host", "as on a GPU"])
def in_short_pieces(request, monkeypatch):
    monkeypatch.setattr(projection, "_PIECE", 128)
    monkeypatch.setattr(ranking, "_SAMPLE", 100)
    if not request.param:
        monkeypatch.setattr(projection._devices, "is_at_hand", lambda tensor: False)


@pytest.mark.usefixtures("in_short_pieces")
@pytest.mark.parametrize(("name", "tensors"), [pytest.param(*own, id=own[0]) for own in long_lists()])
def test_long_lists_in_pieces_or_on_a_device(name, tensors):
    for share in (0.001, 0.3, 0.77, 0.995):
        params = [nn.Parameter(t.clone()) for t in tensors]
        Regularizer(params, zeros=share).prox_(0.0)
        own = [t.double() for t in tensors]  # in which all are compared
        expected = without_smallest(own, round(share * 3000))
        for p, x, t in zip(params, expected, tensors, strict=True):
            assert_same_bits([p.detach()], [x.to(t.dtype)])


@pytest.mark.usefixtures("in_short_pieces")
@pytest.mark.parametrize("group", ["tensor", "row", "column"])
@pytest.mark.parametrize("shapes", [[(20, 4)], [(20, 4), (30, 2)], [(300, 4), (40, 2)]], ids=str)
def test_more_nan_than_may_stay(group, shapes):
    """Hard case 23: NaN stays, and all else becomes zero, which is as near to the aim as can be; also infinity."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in params:
        half = p.data[:, 1::2] if group == "column" else p.data[1::2]
        half.fill_(torch.nan)
        p.data[0, 0] = torch.inf
    expected = [torch.where(p.isnan(), p, 0).detach() for p in params]
    Regularizer(params, zeros=0.7, group=group).prox_(0.0)
    assert_same_bits([p.detach() for p in params], expected)


@pytest.mark.usefixtures("in_short_pieces")
@pytest.mark.parametrize("length", [240, 2400])
@pytest.mark.parametrize("zeros", ["2:4", PatternRamp("2:4", steps=4)], ids=str)
def test_more_nan_than_a_pattern_lets_stay(zeros, length):
    """Hard case 23: three of four in every other run. The ramp is at 0.875 of what the pattern leaves out, and more of
    that is NaN."""
    w = nn.Parameter(torch.randn((length // 8, 8), generator=torch.Generator().manual_seed(0)))
    expected = w.detach().clone().view(-1, 4)
    w.data.view(-1, 4)[1::2, 1:] = expected[1::2, 1:] = torch.nan
    expected[1::2, 0] = 0
    sizes = expected[::2].abs()
    expected[::2] = expected[::2].masked_fill(sizes < sizes.sort().values[:, 2:3], 0)
    regularizer = Regularizer([w], zeros=zeros)
    regularizer.step = 2
    regularizer.prox_(0.0)
    assert_same_bits([w.detach()], [expected.view_as(w)])


def test_it_is_the_nearest_point_with_so_many_zeros():
    w = nn.Parameter(torch.tensor([0.3, -0.1, 2.0, -0.2, 0.7]))
    x = w.detach().clone()
    Regularizer([w], zeros=0.4).prox_(0.1)
    distances = {
        kept: (x - x * torch.tensor([float(i in kept) for i in range(5)])).square().sum().item()
        for kept in itertools.combinations(range(5), 3)
    }
    best = min(distances, key=distances.get)
    assert w.nonzero().flatten().tolist() == list(best)
    assert (x - w.detach()).square().sum().item() == pytest.approx(distances[best])


@pytest.mark.parametrize("is_at_hand", [True, False], ids=["on the host", "as on a GPU"])
@pytest.mark.parametrize(
    "given", [{"zeros": 0.5}, {"zeros": 0.5, "group": "row"}, {"zeros": "1:2"}, {"zeros": lambda step: 0.3}]
)
def test_a_step_that_a_gpu_knows_to_be_none(given, is_at_hand, monkeypatch):
    if not is_at_hand:
        monkeypatch.setattr(projection._devices, "is_at_hand", lambda tensor: False)
    model = nn.Linear(8, 8)
    before = clones(model)
    entries = Regularizer(model, weights_only=True, **given)._table.entries
    projection.Projection(entries).project_(torch.ones(()))
    assert_same_bits(clones(model), before)
    projection.Projection(entries).project_(torch.zeros(()))
    assert zeros_in(weights(model)) == (19 if callable(given["zeros"]) else 32)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.77, 0.95])
def test_a_sample_says_where_to_look(share, monkeypatch):
    """So that few of many elements are compared with each other, and not all of them after all."""
    found, calls = [], []

    def between(*args):
        found.append(own(*args))
        return found[-1]

    def key(piece):
        calls.append(len(piece))
        return piece.abs()

    own = ranking._between
    monkeypatch.setattr(ranking, "_between", between)
    monkeypatch.setattr(ranking, "_SAMPLE", 2**10)
    whole = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    count = round(share * len(whole))
    limit, *_ = ranking.largest_of(whole.split(2**14), key, count)
    assert limit == whole.abs().sort().values[count - 1]
    ((below, values),) = found
    assert below < count <= below + len(values)
    assert len(values) < len(whole) / 5
    assert len(calls) == 2 * 16  # of the sample, and of all
