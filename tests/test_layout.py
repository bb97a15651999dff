"""Strides, and the layout of gradients (hard cases 10-14)."""

import pytest
import torch
from oracle import assert_same_bits, assert_value, gradients, loop_gradients
from samples import DTYPES, FULL_DTYPES, LAYOUTS, draw, leaves

from fused_reg import fused_penalty, reference, value_and_grad

EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)
DENSE = [name for name, (dense, _) in LAYOUTS.items() if dense]
NOT_DENSE = [name for name, (dense, _) in LAYOUTS.items() if not dense]


def make(layout, dtype, device):
    return LAYOUTS[layout][1](dtype=dtype, device=device)


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", DTYPES)
def test_value(dtype, layout, device):
    """Hard cases 10, 11: every logical element counts once, an expanded one as often as it appears."""
    w = make(layout, dtype, device)
    for params in ([w], [draw(5, dtype, device), w, draw(3, dtype, device, seed=1)]):
        assert_value(fused_penalty(params, l1=0.1, l2=0.3), params, 0.1, 0.3)
        assert_value(value_and_grad(params, l1=0.1, l2=0.3)[0], params, 0.1, 0.3)


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_gradient(upstream, dtype, layout, device):
    """Hard cases 10, 11: the loop's, of every logical element."""
    params = [draw(5, dtype, device), make(layout, dtype, device), draw(3, dtype, device, seed=1)]
    strengths = {"l1": [0.1, 0.2, 0.3], "l2": [0.3, 0.7, 0.9]}
    expected = loop_gradients(params, upstream, **strengths)
    assert_same_bits(gradients(fused_penalty, params, upstream, **strengths), expected)
    if upstream == 1:
        assert_same_bits(value_and_grad(params, **strengths)[1], expected)


@EVERY_LAYOUT
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_gradient_of_the_memory_behind(dtype, layout, device):
    """Hard cases 9, 11: through the view to the leaf, where overlapping elements add up."""
    (memory,) = leaves([draw((300, 300), dtype, device)])
    w = make(layout, dtype, device)
    view = memory.as_strided(w.shape, w.stride(), w.storage_offset())
    penalty = fused_penalty(view, l1=0.1)
    (actual,) = torch.autograd.grad(penalty, memory)
    (expected,) = torch.autograd.grad(reference.loop(view, l1=0.1), memory)
    assert_same_bits([actual], [expected])


@pytest.mark.parametrize(("group", "shape", "expanded"), [("column", (1, 64), (10, 64)), ("row", (64, 1), (64, 100))])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_groups_that_are_one_element(dtype, group, shape, expanded, device):
    """Hard cases 10, 11: groups that lie side by side, of elements that are no distance apart."""
    w = draw(shape, dtype, device).expand(expanded)
    values = [value_and_grad([p], l1=0.1, l2=0.3, l2_norm=0.2, group=group) for p in (w, w.contiguous())]
    assert_same_bits([values[0][0], *values[0][1]], [values[1][0], *values[1][1]])


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_gradient_has_the_parameters_strides(dtype, layout, device):
    """Hard case 10: from every way to a gradient, and in `.grad`."""
    w = make(layout, dtype, device)
    (leaf,) = leaves([w])
    for upstream in (None, 0.37):
        grads = gradients(fused_penalty, [w], upstream, l1=0.1, l2=0.3)
        assert grads[0].stride() == w.stride()
    assert value_and_grad(w, l1=0.1)[1][0].stride() == w.stride()
    fused_penalty(leaf, l2=0.3).backward()
    assert leaf.grad.stride() == w.stride()


@pytest.mark.parametrize("layout", NOT_DENSE)
def test_other_gradients_are_dense(layout, device):
    """Hard case 11: own memory, no element of it shared."""
    w = make(layout, torch.float32, device)
    for grad in (value_and_grad(w, l1=0.1)[1][0], gradients(fused_penalty, [w], l1=0.1)[0]):
        assert grad.shape == w.shape
        assert grad.untyped_storage().nbytes() == grad.nbytes
        assert sorted(zip(grad.stride(), grad.shape, strict=True))[0][0] == 1


def _operators_of(function) -> set[str]:
    with torch.autograd.profiler.profile() as profile:
        function()
    return {event.key for event in profile.key_averages()}


COPIES = {"aten::clone", "aten::copy_", "aten::contiguous"}


@pytest.mark.parametrize("layout", DENSE)
def test_dense_is_not_copied(layout, device):
    """Hard case 10: neither the parameter nor its gradient on the way to `.grad`."""
    (leaf,) = leaves([make(layout, torch.float32, device)])

    def step():
        fused_penalty(leaf, l1=0.1, l2=0.3).backward()

    operators = _operators_of(step)
    assert any("fused_reg" in name for name in operators)
    assert not operators & COPIES
    assert leaf.grad is not None


def test_the_profile_sees_copies(device):
    """What the test above rests on."""
    w = make("every second column", torch.float32, device)
    assert _operators_of(w.contiguous) & COPIES


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("dtype", FULL_DTYPES)
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_grad_with_other_strides(upstream, dtype, device):
    """Hard case 14: accumulated into a `.grad` whose strides differ from its parameter's."""
    w, grad = draw((30, 40), dtype, device), draw((40, 30), dtype, device, seed=1).t()
    (leaf,) = leaves([w])
    leaf.grad = grad.clone(memory_format=torch.preserve_format)
    assert leaf.grad.stride() != leaf.stride()
    (fused_penalty(leaf, l1=0.1, l2=0.3) * upstream).backward()
    assert_same_bits([leaf.grad], [grad.cpu() + loop_gradients([w], upstream, l1=0.1, l2=0.3)[0]])


def test_layouts_of_one_list(device):
    """All of them at once, with strengths that tell them apart."""
    params = [make(layout, DTYPES[i % 2], device) for i, layout in enumerate(LAYOUTS)]
    l1 = [0.01 * (i + 1) for i in range(len(params))]
    l2 = [0.5 / (i + 1) for i in range(len(params))]
    assert_value(fused_penalty(params, l1=l1, l2=l2), params, l1, l2)
    expected = loop_gradients(params, 0.37, l1=l1, l2=l2)
    assert_same_bits(gradients(fused_penalty, params, 0.37, l1=l1, l2=l2), expected)


def test_table_says_which_layouts_are_dense():
    """``dense``: some order of the dimensions has the strides of contiguous memory."""
    for name, (dense, make_one) in LAYOUTS.items():
        w = make_one(dtype=torch.float32, device="cpu")
        assert (torch.empty_like(w).stride() == w.stride()) == dense, name
