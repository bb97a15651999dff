"""``group="column"``: the slices along dimension 1 are the rows of the tensor with dimensions 0 and 1 exchanged, and
all of what is computed has the bits of these. Without a dimension 1 a tensor is one slice."""

import pytest
import torch
from oracle import assert_same_bits, gradients
from samples import DTYPES, draw, leaves

from fused_reg import Regularizer, accumulate_grad_, fused_penalty, optim, prox_, reference, value_and_grad

SHAPES = (
    *((5, 7), (33, 65), (300, 211), (6, 5, 3, 3), (2, 1, 4), (1, 9), (0, 4), (4, 0), (3, 20_000)),
    *((40_000, 2), (20_000, 3), (3_001, 8), (16, 700)),  # few columns, and short ones
    *((16_385, 19), (70, 2_000), (1_850, 9, 3, 3)),  # several strips
)
STRENGTHS = ({"l2_norm": 0.3}, {"l1": 0.1, "l2": 0.2, "l2_norm": [0.1 * i for i in range(len(SHAPES))]})
LAYOUTS = {
    "contiguous": lambda p: p,
    "transposed": lambda p: p.transpose(0, 1).contiguous().transpose(0, 1),
    "with gaps": lambda p: torch.stack([p, p], dim=-1)[..., 0],
}


def exchanged(tensors):
    return [t.transpose(0, 1) for t in tensors]


@pytest.fixture(params=LAYOUTS)
def params(request, device):
    return [LAYOUTS[request.param](draw(s, DTYPES[i % 4], device, i)) for i, s in enumerate(SHAPES)]


@pytest.mark.parametrize("strengths", STRENGTHS, ids=len)
def test_values_and_gradients(strengths, params):
    value, grads = value_and_grad(params, **strengths, group="column")
    expected, expected_grads = value_and_grad(exchanged(params), **strengths, group="row")
    assert_same_bits([value, *grads], [expected, *exchanged(expected_grads)])
    by_autograd = gradients(fused_penalty, params, 0.37, **strengths, group="column")
    of_rows = gradients(fused_penalty, exchanged(params), 0.37, **strengths, group="row")
    assert_same_bits(by_autograd, exchanged(of_rows))


@pytest.mark.parametrize("strengths", STRENGTHS, ids=len)
def test_in_place(strengths, params):
    trained = leaves([p.clone() for p in params])
    rows = leaves([t.clone() for t in exchanged(params)])
    for p, row in zip(trained[::2], rows[::2], strict=True):
        p.grad = draw(p.shape, p.dtype, p.device, 1)
        row.grad = p.grad.transpose(0, 1).clone()
    value = accumulate_grad_(trained, **strengths, group="column", scale=0.5)
    expected = accumulate_grad_(rows, **strengths, group="row", scale=0.5)
    assert_same_bits([value, *(p.grad for p in trained)], [expected, *exchanged([p.grad for p in rows])])
    with torch.no_grad():
        prox_(trained, **strengths, group="column", step=0.9)
        prox_(rows, **strengths, group="row", step=0.9)
    assert_same_bits([p.detach() for p in trained], exchanged([p.detach() for p in rows]))


@pytest.mark.parametrize("group", ["row", "column", None])
def test_gradients_and_states_that_lie_otherwise(group, device):
    strength = {"l2": 0.2} if group is None else {"l2_norm": 0.3, "group": group}
    results = []
    for layout in LAYOUTS.values():
        params = leaves([draw(s, DTYPES[i % 4], device, i) for i, s in enumerate(SHAPES)])
        for i, p in enumerate(params):
            p.grad = layout(draw(p.shape, p.dtype, device, i + 1))
        accumulate_grad_(params, **strength)
        sgd = optim.SGD(params, lr=0.1, momentum=0.9)
        for p in params:
            sgd.state[p]["momentum_buffer"] = layout(torch.full_like(p, 0.5))
        Regularizer(params, **strength).attach(sgd, mode="prox")
        sgd.step()
        buffers = [sgd.state[p]["momentum_buffer"] for p in params]
        results.append([t.detach() for t in (*params, *(p.grad for p in params), *buffers)])
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_trained_strengths_and_second_derivatives(device):
    w = draw((4, 6), torch.float64, device)
    v = draw((4, 6), torch.float64, device, 1)
    results = []
    for group, change in (("column", lambda t: t), ("row", lambda t: t.transpose(0, 1))):
        strength = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        p = change(w).clone().requires_grad_()
        value = fused_penalty(p, l1=0.1, l2_norm=strength, group=group)
        (grad,) = torch.autograd.grad(value, p, create_graph=True)
        second, of_strength = torch.autograd.grad((grad * change(v)).sum() + value, (p, strength))
        results.append([value.detach(), change(grad.detach()), change(second), of_strength])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_a_tensor_without_columns_is_one(device):
    for shape in ((), (7,), (0,)):
        w = draw(shape, device=device)
        with torch.no_grad():
            column, whole = (fused_penalty(w, l2_norm=0.7, group=group) for group in ("column", "tensor"))
        assert_same_bits([column], [whole])


def test_the_reference(device):
    w = torch.tensor([[3.0, 0.0], [4.0, 5.0]], device=device, requires_grad=True)
    for function in (fused_penalty, reference.fused_penalty, reference.loop):
        assert function(w, l2_norm=1.0, group="column").item() == 10


def test_a_regularizer(device):
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0]], device=device)
    regularizer = Regularizer([("w", torch.nn.Parameter(weight))], l2_norm=2.0, group="column")
    assert 'group="column"' in repr(regularizer)
    (group, row, _) = regularizer.report().rows
    assert (row["value"], row["slices"], row["zero_slices"], row["group"]) == (10, 2, 1, "column")
    assert group["zero_slices"] == 1
    state = regularizer.state_dict()
    regularizer.load_state_dict(state)
    with pytest.raises(ValueError, match="group of 'w' must be 'row' as here, got 'column'"):
        Regularizer([("w", torch.nn.Parameter(weight))], l2_norm=2.0, group="row").load_state_dict(state)


@pytest.mark.filterwarnings("ignore")  # what torch's compiler warns of itself
def test_in_compiled_code():
    w = draw((5, 7)).requires_grad_()
    compiled = torch.compile(lambda: fused_penalty(w, l2_norm=0.3, group="column"), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    expected = fused_penalty(w, l2_norm=0.3, group="column")
    assert_same_bits([compiled().detach()], [expected.detach()])
    assert_same_bits(torch.autograd.grad(compiled(), w), torch.autograd.grad(expected, w))
