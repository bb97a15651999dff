"""``zeros`` of groups: the rows with the smallest norms become zero, whatever is equal, infinite or NaN, and whatever
the memory is; also where a step is not as the last one was."""

import pytest
import torch
from oracle import assert_same_bits
from test_zeros_aim import clones
from torch import nn

from fused_reg import Regularizer, _devices


def without_rows(w, share):
    """With its smallest rows at zero: of equal ones the first; NaN stays."""
    norms = w.double().reshape(len(w), -1).norm(dim=1)
    count = min(round(share * len(w)), len(w) - 1, len(w) - int(norms.isnan().sum()))
    return w.index_fill(0, norms.argsort(stable=True)[:count], 0)


def tensors(dtype):
    """Of few rows and of many, whose lengths are multiples of 16 bytes and are not; with rows that are equal."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((7, 3), (40, 8), (16, 2, 3, 4), (300, 16), (5, 1), (300, 5)):
        w = torch.randint(1, 9, shape, generator=generator).to(dtype)
        w[3], w[1] = w[0], w[2].neg()
        yield w


ODD = [(torch.nan, 0), (torch.nan, 3), (torch.inf, 2), (-torch.inf, 4), (0.0, 1)]


@pytest.mark.parametrize("is_at_hand", [True, False], ids=["on the host", "as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_odd", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 0.99])
def test_each_parameter_by_its_rows(share, has_odd, dtype, is_at_hand, monkeypatch):
    if not is_at_hand:
        monkeypatch.setattr(_devices, "is_at_hand", lambda tensor: False)
    params = [nn.Parameter(w) for w in tensors(dtype)]
    for p in params if has_odd else ():
        for value, row in ODD:
            p.data[row, -1:] = value
    before = [p.detach().clone() for p in params]
    Regularizer(params, zeros=lambda step: share, zeros_per="parameter", group="row").prox_(0.1)
    assert_same_bits([p.detach() for p in params], [without_rows(w, share) for w in before])


@pytest.mark.parametrize("rows", [40, 300])
def test_all_together(rows):
    w = torch.randint(1, 9, (rows, 6), generator=torch.Generator().manual_seed(1)).double()
    params = [nn.Parameter(part.clone()) for part in w.split([3, rows - 20, 17])]
    Regularizer(params, zeros=0.7, group="row").prox_(0.1)
    assert_same_bits([torch.cat([p.detach() for p in params])], [without_rows(w, 0.7)])


@pytest.mark.parametrize("offset", range(9))
def test_memory_that_begins_anywhere(offset):
    memory = torch.randn(9 + 8 * 12)
    before = memory.clone()
    w = nn.Parameter(memory[offset : offset + 96].view(8, 12))
    Regularizer([w], zeros=0.5, group="row").prox_(0.1)
    assert_same_bits([w.detach()], [without_rows(before[offset : offset + 96].view(8, 12), 0.5)])
    assert_same_bits([memory[:offset], memory[offset + 96 :]], [before[:offset], before[offset + 96 :]])


def test_norms_that_are_equal_when_they_are_weighed():
    """They are compared as quotients, of which some are equal where the norms differ in the last bit."""
    small = torch.linspace(1.5, 1.9, 50).double()
    large = small.nextafter(torch.full_like(small, 2.0))
    i = int((small / 2**0.5 == large / 2**0.5).nonzero()[0])
    for given, zero in (({}, 1), ({"group_weights": "sqrt_size"}, 0)):
        params = [nn.Parameter(torch.tensor([[large[i], 0], [small[i], 0]])) for _ in range(2)]
        Regularizer(params, zeros=0.5, zeros_per="parameter", group="row", **given).prox_(0.1)
        assert [p[:, 0].tolist().index(0) for p in params] == [zero, zero]


def attached(share=0.5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = Regularizer(model, zeros=share, zeros_per="parameter", group="row")
    regularizer.attach(optimizer, mode="prox")
    return model, optimizer


def step(model, optimizer):
    """One that leaves the weights; returns what they should be."""
    expected = [without_rows(w, 0.5) for w in clones(model)]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return expected


@pytest.mark.parametrize(
    "change",
    [
        lambda p: torch.randn(p.shape),
        lambda p: torch.randn(12, 3),
        lambda p: torch.randn(p.shape).double(),
        lambda p: torch.randn(p.shape[::-1]).t(),
        lambda p: p.detach().reshape(-1, 2),
        lambda p: p.detach().t(),
    ],
    ids=["others", "another shape", "another type", "another layout", "the same memory", "the same transposed"],
)
def test_weights_that_are_exchanged_between_steps(change):
    model, optimizer = attached()
    step(model, optimizer)
    for p in model.parameters():
        p.data = torch.randn(p.shape)
    step(model, optimizer)
    for p in model.parameters():
        p.data = change(p)
        p.grad = None
    expected = step(model, optimizer)
    assert_same_bits(clones(model), expected)


def test_a_ramp_of_steps_that_are_kept():
    shares = [0.0, 0.25, 0.25, 0.75, 0.5, 0.5]
    model, optimizer = attached(lambda i: shares[i])
    generator = torch.Generator().manual_seed(3)
    for share in shares[:-1]:
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        expected = [without_rows(w, share) for w in clones(model)]
        step(model, optimizer)
        assert_same_bits(clones(model), expected)


def test_the_smallest_of_a_step_beside_those_of_the_last():
    """The same, others in one parameter, NaN, nothing but NaN, and equal ones."""
    sizes = (8, 3), (100, 4), (80, 600)
    generator = torch.Generator().manual_seed(4)
    params = [nn.Parameter(torch.randperm(n, generator=generator)[:, None].repeat(1, m) + 1.0) for n, m in sizes]
    start = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.1)
    Regularizer(params, zeros=0.5, zeros_per="parameter", group="row").attach(optimizer, mode="prox")
    steps = [([], 0.0), ([], 0.0), ([99], 0.5), ([3, 60], torch.nan), (range(100), torch.nan), ([], 0.0)]
    steps += [([49, 50], value) for value in (50.0, 51.0, 50.5, 50.5)]
    for rows, value in steps:
        for p, w in zip(params, start, strict=True):
            p.data.copy_(w)
            p.grad = torch.zeros_like(p)
        params[1].data[list(rows)] = value
        expected = [without_rows(p.detach(), 0.5) for p in params]
        optimizer.step()
        assert_same_bits([p.detach() for p in params], expected)


def test_a_parameter_that_is_empty_for_a_step():
    params = [nn.Parameter(torch.arange(1.0, 9).reshape(4, 2)), nn.Parameter(torch.ones(4, 2))]
    regularizer = Regularizer(params, zeros=lambda step: 0.5, zeros_per="parameter", group="row")
    params[1].data = torch.empty(0, 2)
    regularizer.prox_(0.1)
    assert (params[0] == 0).all(1).tolist() == [True, True, False, False]


def test_steps_in_inference_mode_and_outside():
    model, optimizer = attached()
    for is_on in (True, False, True):
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape))
        expected = [without_rows(w, 0.5) for w in clones(model)]
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with torch.inference_mode(is_on):
            optimizer.step()
        assert_same_bits(clones(model), expected)
