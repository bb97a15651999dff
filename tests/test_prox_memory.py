"""The proximal step in memory: in place, in any layout, and not at all where the input is wrong."""

import re

import pytest
import torch
from oracle import assert_same_bits, bits
from samples import DTYPES, FULL_DTYPES, LAYOUTS, draw, draw_list, leaves
from test_prox import assert_all_optimal, stepped

import fused_reg
from fused_reg import fused_penalty, prox_

ALL = {"l1": 0.2, "l2": 0.3, "l2_norm": 0.9}
EVERY_GROUP = pytest.mark.parametrize("group", ["tensor", "row"])


def refuses(error, text):
    return pytest.raises(error, match=f"^prox_: {re.escape(text)}$")


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_GROUP
def test_in_place(group, dtype, requires_grad, device):
    """The same memory, a version later, still a leaf, with the ``.grad`` it had; whatever it requires."""
    params = [p.requires_grad_(requires_grad) for p in draw_list(dtype, device)]
    params[3].grad = draw(params[3].shape, dtype, device, seed=9) if requires_grad else None
    grad = None if params[3].grad is None else params[3].grad.clone()
    before = [(p.data_ptr(), p._version, p.stride()) for p in params]
    expected = stepped([p.detach() for p in params], **ALL, group=group, step=0.5)
    assert prox_(params, **ALL, group=group, step=0.5) is None
    assert_same_bits(params, expected)
    for p, (address, version, stride) in zip(params, before, strict=True):
        assert (p.data_ptr(), p.stride(), p.is_leaf, p.requires_grad) == (address, stride, True, requires_grad)
        assert p._version == version + 1
    assert grad is None or torch.equal(params[3].grad, grad)


def test_autograd_notices(device):
    """A graph that still needs the old values says so."""
    (w,) = leaves([draw(10, device=device)])
    penalty = fused_penalty(w, l1=0.1)
    prox_(w, l1=0.1, step=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_within_modes(device):
    """Under no_grad, inference_mode and autocast, and of tensors made there."""
    w = draw(100, device=device)
    (expected,) = stepped([w], **ALL, step=0.5)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16)):
        with mode:
            assert_same_bits(stepped([w], **ALL, step=0.5), [expected])
    with torch.inference_mode():
        made_there = w.clone()
    prox_(made_there, **ALL, step=0.5)
    assert_same_bits([made_there], [expected])


def memory_of(layout, dtype, device):
    """A view of that layout, and all of the memory behind it."""
    view = LAYOUTS[layout][1](dtype=dtype, device=device)
    size = view.untyped_storage().nbytes() // view.element_size()
    return view, view.as_strided((size,), (1,), 0)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if not name.startswith(("expanded", "overlapping"))])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", ["tensor", "row", None])
def test_layouts(group, dtype, layout, device):
    """Hard cases 10, 11: dense permutations and slices with gaps; the gaps keep what they hold."""
    view, memory = memory_of(layout, dtype, device)
    w, gaps = view.clone(), torch.ones_like(memory, dtype=torch.bool)
    gaps.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    kept = memory[gaps].clone()
    other = draw(5, dtype, device)
    before = view.data_ptr(), view._version
    if group is None:
        prox_([other, view], l1=0.2, l2=0.3, step=0.5)
        assert_same_bits([view], stepped([w.contiguous()], l1=0.2, l2=0.3, step=0.5))
    else:
        prox_([other, view], **ALL, group=group, step=0.5)
        assert_all_optimal([view], [w], 0.5, group, **ALL)
    assert (view.data_ptr(), view._version) == (before[0], before[1] + 1)
    assert_same_bits([memory[gaps]], [kept])
    assert not w.numel() or not torch.equal(view, w)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith(("expanded", "overlapping"))])
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_several_elements_in_one_place(dtype, layout, device):
    """Hard case 12: an error, and nothing is written."""
    view, memory = memory_of(layout, dtype, device)
    first = draw(20, dtype, device)
    before = bits(memory), bits(first), view._version, first._version
    strides = list(view.stride())
    rule = f"must have memory for each of its elements, got a tensor with several in one place (strides {strides})"
    for params, index in (([view], 0), ([first, view], 1)):
        with refuses(ValueError, f"params[{index}] {rule}"):
            prox_(params, **ALL, step=0.5)
    assert (bits(memory), bits(first), view._version, first._version) == before


def test_interleaved_strides_that_do_not_overlap(device):
    """Hard case 12: only what really overlaps is an error."""
    memory = draw(100, device=device)
    w = memory.as_strided((3, 4), (2, 3))  # 0 2 4, and 3, 6, 9 further: 0 3 6 9 2 5 8 11 4 7 10 13
    assert len(set(torch.arange(100).as_strided((3, 4), (2, 3)).flatten().tolist())) == 12
    (expected,) = stepped([w.clone()], **ALL, step=0.5)
    prox_(w, **ALL, step=0.5)
    assert_same_bits([w], [expected])
    evens, odds = memory[50::2], memory[51::2]
    expected = stepped([evens.clone(), odds.clone()], **ALL, step=0.5)
    prox_([evens, odds], **ALL, step=0.5)
    assert_same_bits([evens, odds], expected)


def test_same_tensor_twice(device):
    """Hard case 8."""
    params = draw_list(torch.float32, device)
    before = [bits(p) for p in params]
    with refuses(ValueError, "params[11] must not be the same tensor as params[4]"):
        prox_([*params, params[4]], l1=0.1, step=0.1)
    with refuses(ValueError, "params[1] must not be the same tensor as params[0]"):
        prox_([params[4], params[4]], l1=0.1, step=0.1)
    assert [bits(p) for p in params] == before
    prox_([*params, params[1]], l1=0.1, step=0.1)  # of no elements


def test_overlapping_views(device):
    """Hard case 9: also of another dtype, also where only one element is shared."""
    memory = draw(64, device=device)
    other = draw(3, device=device, seed=1)
    before = bits(memory), bits(other)
    square = memory.view(8, 8)
    pairs = (
        (memory[:33], memory[32:]),
        (memory, memory[3]),
        (memory.view(2, 32), memory.view(32, 2)),
        (memory.detach(), memory),
        (square[:, 3], square[3]),
        (memory[::3], memory[::5]),
        (memory.view(torch.float16)[:2], memory[:5]),
    )
    for pair in pairs:
        for one, two in (pair, pair[::-1]):
            with refuses(ValueError, "params[3] must not share memory with params[1]"):
                prox_([other, one, other.clone(), two], l1=0.1, step=0.1)
    assert (bits(memory), bits(other)) == before
    prox_([memory[:32], memory[32:]], l1=0.1, step=0.1)  # neighbours


# Views of a [60, 90] matrix that lie between one another.
INTERLEAVED = {
    "columns": lambda m: m.unbind(1),
    "blocks of columns": lambda m: m.split(7, dim=1),
    "every third row and fifth column": lambda m: [m[i::3, j::5] for i in range(3) for j in range(5)],
    "two dimensions of six": lambda m: (
        m.view(3, 20, 9, 10)[:, :, ::2].unbind(3) + m.view(3, 20, 9, 10)[:, :, 1::2].unbind(1)
    ),
    "diagonals": lambda m: [m.as_strided((59,), (91,), i) for i in range(31)],
    "rows and columns": lambda m: [*m[:30].unbind(0), *m[30:].unbind(1)],
}


@pytest.mark.parametrize("views", INTERLEAVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interleaved_views(dtype, views, device):
    """Hard case 50: taken as if they were tensors of their own; and one element that two of them share is found."""
    memory = draw((60, 90), dtype, device)
    params = list(INTERLEAVED[views](memory))
    expected = stepped([p.clone() for p in params], **ALL, step=0.5)
    prox_(params, **ALL, step=0.5)
    assert_same_bits(params, expected)
    before, last = bits(memory), len(params)
    for i in (0, last // 2, last - 1):
        place = params[i].storage_offset() + sum(
            (n - 1) * s for n, s in zip(params[i].shape, params[i].stride(), strict=True)
        )
        one = memory.as_strided((1,), (1,), place)
        with refuses(ValueError, f"params[{last}] must not share memory with params[{i}]"):
            prox_([*params, one], **ALL, step=0.5)
        with refuses(ValueError, f"params[{i + 1}] must not share memory with params[0]"):
            prox_([one, *params], **ALL, step=0.5)
    assert bits(memory) == before


def test_the_first_conflict_is_named(device):
    """Wherever the tensors lie: the first that shares memory with an earlier one, and the first such."""
    memory = draw((6, 8), device=device)
    for rows in (memory.unbind(0), memory.unbind(0)[::-1]):
        with refuses(ValueError, "params[3] must not share memory with params[0]"):
            prox_([*rows[:3], memory, memory.t(), *rows], l1=0.1, step=0.1)
        with refuses(ValueError, "params[2] must not be the same tensor as params[1]"):
            prox_([rows[4], rows[0], rows[0], memory], l1=0.1, step=0.1)


def test_lists(device):
    """Hard cases 1, 2: generators are read once; an empty list is nothing to do; a tensor is one parameter."""
    prox_([], l1=0.1, step=0.1)
    prox_(iter(()), l1=0.1, l2_norm=[], step=[])
    params = draw_list(torch.float32, device)
    expected = stepped(params, **ALL, step=0.5)
    copies = [p.clone() for p in params]
    prox_((p for p in copies), **ALL, step=0.5)
    assert_same_bits(copies, expected)
    copies = {str(i): p.clone() for i, p in enumerate(params)}
    prox_(copies.values(), **ALL, step=0.5)
    assert_same_bits(list(copies.values()), expected)
    model = torch.nn.ParameterList(p.clone() for p in params)
    prox_(model, **ALL, step=0.5)
    assert_same_bits(list(model), expected)
    one = params[9].clone()
    prox_(one, **ALL, step=0.5)
    assert_same_bits([one], [expected[9]])
    empty = torch.empty(0, 3, device=device)
    prox_([empty, empty], **ALL, step=0.5)


def test_many_tensors(device):
    """Hard case 6: one call, or one for each."""
    params = list(draw(20_000, torch.float32, device).split([i % 5 for i in range(10_000)]))
    l1 = [i % 7 / 10 for i in range(len(params))]
    together = stepped(params, l1=l1, l2_norm=0.1, step=0.5)
    for i in range(0, 10_000, 97):
        assert_same_bits([together[i]], stepped([params[i]], l1=l1[i], l2_norm=0.1, step=0.5))


FLOATS = "must be float32, float64, bfloat16 or float16"
STRENGTH = "must be a float, a 0-dim tensor or a sequence with one per parameter"
WRONG = (
    ({"step": -1.0}, ValueError, "step must be finite and >= 0, got -1.0"),
    ({"step": float("nan")}, ValueError, "step must be finite and >= 0, got nan"),
    ({"step": float("inf")}, ValueError, "step must be finite and >= 0, got inf"),
    ({"step": True}, TypeError, f"step {STRENGTH}, got bool"),
    ({"step": "0.1"}, TypeError, f"step {STRENGTH}, got str"),
    ({"step": None}, TypeError, f"step {STRENGTH}, got None"),
    ({"step": [0.1]}, ValueError, "step must have one strength per parameter (3), got 1"),
    ({"step": [0.1, -0.1, 0.1]}, ValueError, "step[1] must be finite and >= 0, got -0.1"),
    ({"l1": -1.0}, ValueError, "l1 must be finite and >= 0, got -1.0"),
    ({"l2": float("nan")}, ValueError, "l2 must be finite and >= 0, got nan"),
    ({"l2_norm": float("inf")}, ValueError, "l2_norm must be finite and >= 0, got inf"),
    ({"l2_norm": True}, TypeError, f"l2_norm {STRENGTH}, got bool"),
    ({"l2_norm": [0.1, 0.1, "x"]}, TypeError, "l2_norm[2] must be a float or a 0-dim tensor, got str"),
    ({"l2_norm": torch.ones(2)}, ValueError,
     "l2_norm must be 0-dim or have one strength per parameter (3), got shape (2,)"),
    ({"l1": torch.tensor(1)}, TypeError, "l1 must be floating point, got torch.int64"),
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
    before, expected = [bits(p) for p in params], stepped(params, **ALL, step=0.5)
    with refuses(error, text):
        prox_(params, **{**ALL, "step": 0.5, **wrong})
    assert [(bits(p), p._version) for p in params] == [(b, 0) for b in before]
    prox_(params, **ALL, step=0.5)
    assert_same_bits(params, expected)


def test_wrong_tensor_step_shape(device):
    with refuses(ValueError, "step must be 0-dim or have one strength per parameter (2), got shape (3,)"):
        prox_([torch.ones(2), torch.ones(2)], step=torch.ones(3))


def test_step_is_required():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'step'"):
        prox_([torch.ones(2)], l1=0.1)


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda: 3, TypeError, "must be a tensor, got int"),
        (lambda: None, TypeError, "must be a tensor, got NoneType"),
        (lambda: ("w", torch.ones(2)), TypeError,
         "must be a tensor, got a (name, tensor) pair; drop the names, as `.parameters()` does"),
        (lambda: torch.ones(3, dtype=torch.int64), TypeError, "must be floating point, got torch.int64"),
        (lambda: torch.ones(3, dtype=torch.complex64), TypeError, "must be floating point, got torch.complex64"),
        (lambda: torch.ones(3).to(torch.float8_e5m2), TypeError, f"{FLOATS}, got torch.float8_e5m2"),
        (lambda: torch.eye(3).to_sparse(), TypeError, "must be dense (torch.strided), got torch.sparse_coo"),
    ],
)  # fmt: skip
def test_wrong_parameters(wrong, error, text, device):
    """Hard cases 3, 19: nothing written, wherever it stands in the list."""
    wrong = wrong()
    wrong = wrong.to(device) if isinstance(wrong, torch.Tensor) else wrong
    params = [draw(n, device=device, seed=n) for n in (3, 40)]
    before = [bits(p) for p in params]
    for index in range(3):
        with refuses(error, f"params[{index}] {text}"):
            prox_([*params[:index], wrong, *params[index:]], l1=0.1, step=0.5)
    assert [(bits(p), p._version) for p in params] == [(b, 0) for b in before]


def test_module(device):
    with refuses(TypeError, "params must be tensors, got the module Linear; pass its `.parameters()`"):
        fused_reg.prox_(torch.nn.Linear(2, 1).to(device), l1=0.1, step=0.1)


def test_views_of_a_trained_parameter(device):
    """A slice of a parameter: some rows only. Autograd allows it, because nothing is recorded."""
    layer = torch.nn.Linear(5, 4).to(device)
    before, version = layer.weight.detach().clone(), layer.weight._version
    prox_(layer.weight[1:3], l2_norm=1e6, group="row", step=1.0)
    assert not layer.weight[1:3].any()
    assert torch.equal(layer.weight[[0, 3]], before[[0, 3]])
    assert layer.weight.grad_fn is None
    assert layer.weight._version == version + 1


def test_negated_view(device):
    """Hard case 15: among others, and the checks look at its memory, too."""
    memory = draw((10, 2), torch.float32, device)
    w, other = torch.view_as_complex(memory).conj().imag, draw(5, device=device)
    assert w.is_neg()
    params = [other, w]
    for group in ("tensor", "row"):
        values = [other.clone(), w.resolve_neg().clone()]
        version, real = memory._version, memory[:, 0].clone()
        prox_(params, **ALL, group=group, step=0.5)
        assert_all_optimal([other, w.resolve_neg()], values, 0.5, group, **ALL)
        assert memory._version == version + 1
        assert torch.equal(memory[:, 0], real)
    with refuses(ValueError, "params[1] must not share memory with params[0]"):
        prox_([w, memory[3]], **ALL, step=0.5)
