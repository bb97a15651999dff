"""accumulate_grad_ writes nothing where something is wrong: one sentence, and the next call works."""

import re
import warnings

import pytest
import torch
from oracle import assert_same_bits, bits, loop_gradients
from samples import LAYOUTS, draw, draw_list, leaves, numbers
from test_accumulate_grad import expected_grads, with_grads

from fused_reg import _ops, accumulate_grad_

BOTH = {"l1": 0.1, "l2": 1 / 3}
OVERLAPPING = [name for name in LAYOUTS if name.startswith(("expanded", "overlapping"))]


def refuses(error, text):
    return pytest.raises(error, match=f"^accumulate_grad_: {re.escape(text)}$")


def unchanged(params):
    return [(bits(p), p._version, p.grad is None or (bits(p.grad), p.grad._version)) for p in params]


@pytest.mark.parametrize("layout", OVERLAPPING)
def test_gradient_with_several_elements_in_one_place(layout, device):
    """Hard case 12: an error."""
    grad = LAYOUTS[layout][1](dtype=torch.float32, device=device)
    first, p = with_grads([draw(9, device=device), draw(grad.shape, device=device)])
    p.grad = grad
    before = bits(grad), bits(first.grad)
    with refuses(
        ValueError,
        "params[1].grad must have memory for each of its elements, got a tensor with several in one place "
        f"(strides {list(grad.stride())})",
    ):
        accumulate_grad_([first, p], **BOTH)
    assert (bits(grad), bits(first.grad)) == before


def test_same_tensor_twice(device):
    """Hard case 8: with and without a ``.grad``, and as another view of it."""
    params = with_grads(draw_list(torch.float32, device))
    before = unchanged(params)
    # Both share memory, the parameters and their gradients: the message names one of the pairs.
    both = r"^accumulate_grad_: params\[11\] must not be the same tensor as params\[4\]$"
    with pytest.raises(ValueError, match=both):
        accumulate_grad_([*params, params[4]], **BOTH)
    params[4].grad = None
    with refuses(ValueError, "params[11] must not be the same tensor as params[4]"):
        accumulate_grad_([*params, params[4]], **BOTH)
    assert params[4].grad is None
    with refuses(ValueError, "params[1] must not share memory with params[0]"):
        accumulate_grad_([params[8], params[8].detach()], **BOTH)
    params[4].grad = draw(params[4].shape, device=device, seed=54)
    assert unchanged(params) == before


def test_overlapping_parameters(device):
    """Hard case 9."""
    memory = draw((8, 8), device=device)
    for one, two in ((memory[2], memory[:, 3]), (memory[:5], memory[4:]), (memory, memory.t())):
        pair = leaves([one, two])
        with refuses(ValueError, "params[1] must not share memory with params[0]"):
            accumulate_grad_(pair, **BOTH)
        assert pair[0].grad is pair[1].grad is None
    disjoint = leaves([memory[::2], memory[1::2]])
    accumulate_grad_(disjoint, **BOTH)
    assert_same_bits([p.grad for p in disjoint], loop_gradients(disjoint, **BOTH))


def test_aliasing_gradients(device):
    """Hard case 16: of its own parameter, of another one, of another gradient; whole or in part."""
    v, w, x = with_grads([draw(12, device=device, seed=i) for i in range(3)])
    memory = draw(20, device=device, seed=9)

    def refused(text):
        before = [bits(t) for t in (v, w, x, v.grad, w.grad, x.grad)]
        with refuses(ValueError, text):
            accumulate_grad_([v, w, x], **BOTH)
        assert [bits(t) for t in (v, w, x, v.grad, w.grad, x.grad)] == before

    w.grad = w.detach()
    refused("params[1].grad must not share memory with params[1]")
    w.grad = x.detach()
    refused("params[1].grad must not share memory with params[2]")
    w.grad = v.detach()
    refused("params[1].grad must not share memory with params[0]")
    w.grad = x.grad
    refused("params[2].grad must not be the same tensor as params[1].grad")
    w.grad = x.grad.flip(0)[:]
    accumulate_grad_([v, w, x], **BOTH)
    w.grad, x.grad = memory[:12], memory[8:]
    refused("params[2].grad must not share memory with params[1].grad")
    w.grad = memory[:8].new_zeros(12)
    accumulate_grad_([v, w, x], **BOTH)
    flat = torch.zeros(24, device=device)  # a bucket, as DDP's gradient_as_bucket_view
    w.grad, x.grad = flat[:12], flat[12:]
    accumulate_grad_([v, w, x], **BOTH)
    assert_same_bits([flat], [torch.cat(loop_gradients([w, x], **BOTH)) + 0.0])


def test_interleaved_parameters_and_gradients(device):
    """Hard case 50: columns of one matrix, with gradients that are columns of another, or of the same."""
    memory = draw((9, 40), device=device)
    params = leaves(memory[:, :20].unbind(1))
    for p, grad in zip(params, memory[:, 20:].unbind(1), strict=True):
        p.grad = grad
    gradients = loop_gradients(params, **BOTH)
    expected = [p.grad + g.to(device) for p, g in zip(params, gradients, strict=True)]
    accumulate_grad_(params, **BOTH)
    assert_same_bits([p.grad for p in params], expected)
    for grad, text in (
        (memory[:, 27], "params[7].grad must not share memory with params[3].grad"),
        (memory[:, 5], "params[3].grad must not share memory with params[5]"),
    ):
        params[3].grad = grad
        with refuses(ValueError, text):
            accumulate_grad_(params, **BOTH)


def test_modes_are_known(device):
    """Of the operator, which Python gives them."""
    w, grad = draw(5, device=device), torch.zeros(5, device=device)
    for mode in (-1, 3):
        with pytest.raises(ValueError, match=rf"^modes\[0\] must be 0, 1 or 2, got {mode}$"):
            _ops.accumulate_grad_([w], [grad], [mode], 1.0, None, *numbers((0.1,)))
    assert not grad.any()


def test_sparse_gradient(device):
    """Hard case 19: an error that says what to do; and then it works."""
    embedding = torch.nn.Embedding(6, 3, sparse=True).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        embedding(torch.tensor([1, 4], device=device)).sum().backward()
        first = with_grads([draw(5, device=device)])[0]
        before = unchanged([first])
        with refuses(
            TypeError,
            "params[1].grad must be dense (torch.strided), got torch.sparse_coo; "
            "build the embedding with sparse=False, use p.grad = p.grad.to_dense(), or attach a Regularizer with "
            "lazy_rows=True",
        ):
            accumulate_grad_([first, embedding.weight], **BOTH)
        assert unchanged([first]) == before
        embedding.weight.grad = embedding.weight.grad.to_dense()
    before = embedding.weight.grad.clone()
    accumulate_grad_([first, embedding.weight], **BOTH)
    assert_same_bits([embedding.weight.grad], [before + loop_gradients([embedding.weight], **BOTH)[0].to(device)])


def test_not_a_leaf(device):
    """Its ``.grad`` would reach no parameter."""
    first, w = with_grads([draw(5, device=device), draw(5, device=device)])
    before = unchanged([first])
    with pytest.raises(ValueError, match=r"^accumulate_grad_: params\[1\] must be a leaf, as a parameter is, got the "):
        accumulate_grad_([first, w * 2], **BOTH)
    with pytest.raises(ValueError, match=r"params\[0\] must be a leaf"):
        accumulate_grad_(w[:3], **BOTH)
    assert unchanged([first]) == before


STRENGTH = "must be a float, a 0-dim tensor or a sequence with one per parameter"
SCALE = "scale must be a float or a 0-dim"
WRONG = (
    ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    ({"scale": float("-inf")}, ValueError, "scale must be finite, got -inf"),
    ({"scale": 10**400}, ValueError, "scale must be finite, got inf"),
    ({"l1": torch.tensor([1.0]).to_sparse()}, TypeError, "l1 must be dense (torch.strided), got torch.sparse_coo"),
    ({"scale": True}, TypeError, f"{SCALE} tensor, got bool"),
    ({"scale": "2"}, TypeError, f"{SCALE} tensor, got str"),
    ({"scale": None}, TypeError, f"{SCALE} tensor, got NoneType"),
    ({"scale": [1.0]}, TypeError, f"{SCALE} tensor, got list"),
    ({"scale": torch.ones(1)}, ValueError, f"{SCALE} floating point tensor, got torch.float32 of shape (1,)"),
    ({"scale": torch.tensor(2)}, ValueError, f"{SCALE} floating point tensor, got torch.int64 of shape ()"),
    ({"l1": -0.1}, ValueError, "l1 must be finite and >= 0, got -0.1"),
    ({"l2": float("nan")}, ValueError, "l2 must be finite and >= 0, got nan"),
    ({"l2_norm": True}, TypeError, f"l2_norm {STRENGTH}, got bool"),
    ({"l2_norm": "0.1"}, TypeError, f"l2_norm {STRENGTH}, got str"),
    ({"l2": [0.1]}, ValueError, "l2 must have one strength per parameter (3), got 1"),
    ({"l1": [0.1, 0.2, float("inf")]}, ValueError, "l1[2] must be finite and >= 0, got inf"),
    (
        {"group": "x"},
        ValueError,
        'group must be "tensor", "row", "column", or a pair of "row", "column" or "block" and n >= 1, got \'x\'',
    ),
)  # fmt: skip


@pytest.mark.parametrize(("wrong", "error", "text"), WRONG, ids=lambda x: str(x)[:40])
def test_wrong_arguments(wrong, error, text, device):
    """Hard cases 25, 26: one sentence, nothing written, and the next call works."""
    params = [draw(n, device=device, seed=n) for n in (3, 40, 5)]
    trained = with_grads(params)
    before = unchanged(trained)
    with refuses(error, text):
        accumulate_grad_(trained, **{**BOTH, **wrong})
    assert unchanged(trained) == before
    accumulate_grad_(trained, **BOTH)
    assert_same_bits([p.grad for p in trained], expected_grads(params, **BOTH))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (3, "must be a tensor, got int"),
        (None, "must be a tensor, got NoneType"),
        (
            torch.ones(3, dtype=torch.int32),
            "must be floating point, got torch.int32; of a quantized model pass the parameters that require grad",
        ),
        (torch.ones(3, dtype=torch.complex64), "must be floating point, got torch.complex64"),
        (torch.eye(3).to_sparse(), "must be dense (torch.strided), got torch.sparse_coo"),
        (torch.nn.UninitializedParameter(), "must be initialized, got UninitializedParameter; run the module once so "
         "that it knows its shapes"),
    ],
    ids=lambda x: str(x)[:30].replace("\n", " "),
)  # fmt: skip
def test_wrong_parameters(wrong, text, device):
    """Hard cases 3, 19: wherever it stands in the list, nothing is written."""
    wrong = wrong.to(device) if type(wrong) is torch.Tensor else wrong
    trained = with_grads([draw(n, device=device, seed=n) for n in (3, 40)])
    trained[1].grad = None
    before = unchanged(trained)
    for index in range(3):
        with refuses(TypeError, f"params[{index}] {text}"):
            accumulate_grad_([*trained[:index], wrong, *trained[index:]], **BOTH)
    assert unchanged(trained) == before


def test_module(device):
    with refuses(TypeError, "params must be tensors, got the module Linear; pass its `.parameters()`"):
        accumulate_grad_(torch.nn.Linear(2, 1).to(device), **BOTH)
