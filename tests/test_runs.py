"""Groups of several: ``("row", n)`` and ``("column", n)``, as the heads of attention, and ``("block", n)``, beside the
reference, and with the bits of the rows of a view."""

import copy
import json
import re

import pytest
import torch
from oracle import assert_same_bits, gradients
from ranks import ranks
from samples import DTYPES, draw, leaves
from torch import nn

from fused_reg import (
    Regularizer,
    accumulate_grad_,
    fused_penalty,
    largest_strength,
    optim,
    prox_,
    reference,
    regularized,
    value_and_grad,
)

SHAPES = ((6, 8), (12, 4, 3, 3), (6, 34), (12,), (0, 4), (4, 0), (), (36, 2_000), (6_000, 12))
GROUPS = (("row", 6), ("column", 2), ("block", 12), ("row", 1))
STRENGTHS = {"l1": 0.1, "l2": 0.2, "l2_norm": [0.5 + 0.1 * i for i in range(len(SHAPES))]}
LAYOUTS = {
    "contiguous": lambda p: p,
    "transposed": lambda p: p.transpose(0, -1).contiguous().transpose(0, -1) if p.ndim else p,
    "with gaps": lambda p: torch.stack([p, p], dim=-1)[..., 0],
}
CASES = [(group, layout) for group in GROUPS for layout in LAYOUTS if group[0] != "block" or layout == "contiguous"]
EVERY_CASE = pytest.mark.parametrize(("group", "layout"), CASES)


def drawn(group, layout="contiguous", device="cpu", dtype=torch.float64):
    """Tensors that such groups fill."""
    kind, n = group
    sizes = {"row": lambda s: (*s, 0)[0], "column": lambda s: (*s, 0, 0)[1], "block": lambda s: torch.Size(s).numel()}
    shapes = [s for s in SHAPES if sizes[kind](s) % n == 0]
    assert len(shapes) >= 5
    return [LAYOUTS[layout](draw(s, dtype, device, i)) for i, s in enumerate(shapes)]


def small(group):
    return leaves([p for p in drawn(group) if 0 < p.numel() < 1000])


def strengths_for(params):
    return {**STRENGTHS, "l2_norm": STRENGTHS["l2_norm"][: len(params)]}


def assert_near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@EVERY_CASE
def test_values_and_gradients(group, layout, device):
    params = drawn(group, layout, device)
    strengths = strengths_for(params)
    value, grads = value_and_grad(params, **strengths, group=group)
    expected, expected_grads = reference.value_and_grad(params, **strengths, group=group)
    assert_near([value, *grads], [expected, *expected_grads])
    by_autograd = gradients(fused_penalty, params, 0.37, **strengths, group=group)
    assert_near([*by_autograd], [0.37 * g for g in expected_grads])


@EVERY_CASE
def test_in_place(group, layout, device):
    params, others = (leaves([p.clone() for p in drawn(group, layout, device)]) for _ in range(2))
    strengths = strengths_for(params)
    for p, other in zip(params[::2], others[::2], strict=True):
        p.grad = draw(p.shape, p.dtype, p.device, 1)
        other.grad = p.grad.clone()
    value = accumulate_grad_(params, **strengths, group=group, scale=0.5)
    expected = reference.accumulate_grad_(others, **strengths, group=group, scale=0.5)
    assert_near([value, *(p.grad for p in params)], [expected, *(p.grad for p in others)])
    with torch.no_grad():
        prox_(params, **strengths, group=group, step=1.5)
        reference.prox_(others, **strengths, group=group, step=1.5)
    assert_near([p.detach() for p in params], [p.detach() for p in others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [("row", 6), ("block", 12)])
def test_bits_of_the_rows_of_a_view(group, dtype, device):
    kind, n = group
    params = [p for p in drawn(group, device=device, dtype=dtype) if p.ndim > 0 and p.numel() > 0]
    rows = [p.clone().reshape(p.shape[0] // n if kind == "row" else p.numel() // n, -1) for p in params]
    value, grads = value_and_grad(params, l1=0.1, l2_norm=0.3, group=group)
    expected, of_rows = value_and_grad(rows, l1=0.1, l2_norm=0.3, group="row")
    assert_same_bits([value, *(g.flatten() for g in grads)], [expected, *(g.flatten() for g in of_rows)])
    prox_(params, l1=0.1, l2_norm=0.3, group=group, step=2.0)
    prox_(rows, l1=0.1, l2_norm=0.3, group="row", step=2.0)
    assert_same_bits([p.flatten() for p in params], [row.flatten() for row in rows])


@pytest.mark.parametrize("group", GROUPS[:3])  # without norms of 0, where the reference has no second derivative
def test_trained_strengths_and_second_derivatives(group):
    params = small(group)
    strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    firsts = [
        torch.autograd.grad(f(params, l2=0.1, l2_norm=strength, group=group), [strength, *params], create_graph=True)
        for f in (fused_penalty, reference.fused_penalty)
    ]
    assert_near(firsts[0], firsts[1])
    seconds = [torch.autograd.grad(sum(g.square().sum() for g in grads), [strength, *params]) for grads in firsts]
    assert_near(seconds[0], seconds[1])


@pytest.mark.parametrize("group", GROUPS)
def test_in_compiled_code(group):
    params = small(group)
    compiled = torch.compile(lambda: fused_penalty(params, l2_norm=0.3, group=group), backend="aot_eager")
    expected = reference.fused_penalty(params, l2_norm=0.3, group=group)
    assert_near(torch.autograd.grad(compiled(), params), torch.autograd.grad(expected, params))
    assert_near(compiled().detach(), expected.detach())


class Attention(nn.Module):
    """With three heads of two features."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(5, 6), nn.Linear(6, 5)


def heads() -> tuple[Attention, Regularizer]:
    torch.manual_seed(0)
    net = Attention().double()
    net.query.weight.data[2:4] *= 0.01
    rules = [("query.weight", {"l2_norm": 0.5, "group": ("row", 2)})]
    regularized(net.out, l2_norm=0.3, group=("column", 2))
    return net, Regularizer(net, rules=rules)


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
@pytest.mark.parametrize("mode", ["grad", "prox"])
def test_heads(mode, make):
    net, regularizer = heads()
    other = copy.deepcopy(net)
    optimizer = make(net.parameters(), lr=0.1)
    attachment = regularizer.attach(optimizer, mode=mode)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    weights = [other.query.weight, other.out.weight]
    optimizer.step()
    for w, strength, group in zip(weights, (0.5, 0.3), (("row", 2), ("column", 2)), strict=True):
        own = {"l2_norm": strength, "group": group}
        grad = 1 + (reference.value_and_grad([w], **own)[1][0] if mode == "grad" else 0)
        with torch.no_grad():
            w -= 0.1 * grad
            if mode == "prox":
                reference.prox_([w], **own, step=0.1)
    assert_near([net.query.weight.detach(), net.out.weight.detach()], [w.detach() for w in weights])
    assert attachment.value > 0


def test_report_and_state():
    net, regularizer = heads()
    with torch.no_grad():
        regularizer.prox_(1.0)
    assert net.query.weight[2:4].eq(0).all()
    row = regularizer.report()["query.weight"]
    zeros = sum(bool(head.eq(0).all()) for head in net.query.weight.split(2))
    assert (row["group"], row["slices"], row["zero_slices"]) == (("row", 2), 3, zeros)
    expected = reference.fused_penalty([net.query.weight.detach()], l2_norm=0.5, group=("row", 2))
    assert row["value"] == pytest.approx(float(expected), rel=1e-12)
    assert 'group=("column", 2)' in repr(regularizer)
    assert 'group=("column", 2)' in repr(net.out)
    for state in (regularizer.state_dict(), json.loads(json.dumps(regularizer.state_dict()))):
        regularizer.load_state_dict(state)
    again = Regularizer.from_config(regularizer.get_config(), net)
    assert again.state_dict() == regularizer.state_dict()


def test_the_largest_strength():
    w = torch.zeros(4, 2, dtype=torch.float64, requires_grad=True)
    slope = torch.arange(8, dtype=torch.float64).reshape(4, 2)
    found = largest_strength([w], lambda: (w * slope).sum(), group=("row", 2))
    assert found == pytest.approx(float(slope[2:].norm()))
    message = 'largest_strength: params[0] must have a multiple of 3 rows, to have group=("row", 3), got 4'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        largest_strength([w], lambda: (w * slope).sum(), group=("row", 3))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (("row", 4), 'must have a multiple of 4 rows, to have group=("row", 4), got 6'),
        (("column", 3), 'must have a multiple of 3 columns, to have group=("column", 3), got 4'),
        (("block", 7), 'must have a multiple of 7 elements, to have group=("block", 7), got 24'),
    ],
)
def test_what_does_not_divide(group, message):
    params = [torch.ones(84, 21, requires_grad=True), torch.ones(6, 4, requires_grad=True)]
    for function in (fused_penalty, value_and_grad, accumulate_grad_):
        with pytest.raises(ValueError, match=f"^{re.escape(f'{function.__name__}: params[1] {message}')}$"):
            function(params, l2_norm=0.1, group=group)
    with pytest.raises(ValueError, match=f"^{re.escape(f'prox_: params[1] {message}')}$"):
        prox_(params, l2_norm=0.1, group=group, step=1.0)
    named = "Regularizer: params['w'] "
    with pytest.raises(ValueError, match=f"^{re.escape(named + message)}$"):
        Regularizer([("w", params[1])], l2_norm=0.1, group=group)
    net = nn.ParameterDict({"v": params[0], "w": params[1]})
    regularizer = Regularizer(net, l1=0.1, group=group, rules=[("v", {"l2_norm": 0.1})])  # w has no norms
    named = "set_strength: params['w'] "
    with pytest.raises(ValueError, match=f"^{re.escape(named + message)}$"):
        regularizer.set_strength(l2_norm=0.1, where="w")


def test_blocks_are_of_what_is_contiguous():
    w = torch.ones(4, 6).t()
    message = 'params[0] must be contiguous, to have group=("block", 4), got strides (1, 6)'
    with pytest.raises(ValueError, match=re.escape(message)):
        value_and_grad([w], l2_norm=0.1, group=("block", 4))
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.ones(6, 4).t()
    message = "params[0] and what belongs to it must be contiguous, to have blocks"
    with pytest.raises(ValueError, match=re.escape(message)):
        accumulate_grad_([p], l2_norm=0.1, group=("block", 4))
    assert p.grad.eq(1).all()


def _cut_lists(group, dim):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    full = draw((8, 6), torch.float64)
    cut = distribute_tensor(full.clone(), mesh, [Shard(dim)], src_data_rank=None)
    own = {"l1": 0.1, "l2_norm": 0.4, "group": group}
    value, (grad,) = value_and_grad([cut], **own)
    expected, (expected_grad,) = reference.value_and_grad([full], **own)
    prox_([cut], **own, step=2.0)
    reference.prox_([full], **own, step=2.0)
    assert_near([value, grad.full_tensor(), cut.full_tensor()], [expected, expected_grad, full])
    cut_row, whole_row = (Regularizer([nn.Parameter(p)], l2_norm=0.1, group=group).report()["0"] for p in (cut, full))
    assert (cut_row["slices"], cut_row["zero_slices"]) == (whole_row["slices"], whole_row["zero_slices"])


CUT_BETWEEN = [(("row", 2), 0), (("row", 2), 1), (("column", 3), 0), (("column", 3), 1), (("block", 4), 0)]
CUT_WITHIN = [(("row", 8), 0), (("column", 2), 1), (("block", 6), 1), (("block", 16), 0)]


@pytest.mark.parametrize(("group", "dim"), CUT_BETWEEN)
def test_shards(group, dim):
    ranks(2).run(_cut_lists, group, dim)


@pytest.mark.parametrize(("group", "dim"), CUT_WITHIN)
def test_shards_that_cut_groups(group, dim):
    message = f"value_and_grad: params[0] must be sharded between groups of {group[1]}, got ("
    with pytest.raises(AssertionError, match=re.escape(message)):
        ranks(2).run(_cut_lists, group, dim)
