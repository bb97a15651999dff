"""accumulate_grad_ in memory: which ``.grad`` is written, and how."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from oracle import assert_same_bits, assert_value, loop_gradients
from samples import DTYPES, FULL_DTYPES, LAYOUTS, draw, draw_list, leaves, mixed_list
from test_accumulate_grad import expected_grads, with_grads

from fused_reg import accumulate_grad_, fused_penalty, reference, value_and_grad

BOTH = {"l1": 0.1, "l2": 1 / 3}
NORMS = {"l1": 0.1, "l2_norm": 0.5}
EVERY_TERMS = pytest.mark.parametrize("strengths", [BOTH, NORMS], ids=["l1+l2", "l1+l2_norm"])
OVERLAPPING = [name for name in LAYOUTS if name.startswith(("expanded", "overlapping"))]
SEPARATE = [name for name in LAYOUTS if name not in OVERLAPPING]


def make(layout, dtype, device):
    return LAYOUTS[layout][1](dtype=dtype, device=device)


@EVERY_TERMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_missing_gradients(dtype, strengths, device):
    """Hard case 22: written fresh; between others that are there."""
    params = draw_list(dtype, device)
    trained = with_grads(params)
    for p in trained[::2]:
        p.grad = None
    before = [p.grad for p in trained]
    accumulate_grad_(trained, **strengths, scale=2.0)
    alone = leaves(params)
    accumulate_grad_(alone, **strengths, scale=2.0)
    assert_same_bits([p.grad for p in trained[::2]], [p.grad for p in alone[::2]])
    for p, grad in zip(trained[1::2], before[1::2], strict=True):
        assert p.grad is grad  # the same object
    for p in (*alone, *trained):
        assert (p.grad.shape, p.grad.dtype, p.grad.stride()) == (p.shape, p.dtype, p.stride())
        assert p.grad.is_leaf
        assert not p.grad.requires_grad
    if strengths == BOTH and dtype in FULL_DTYPES:
        assert_same_bits([p.grad for p in alone], loop_gradients(params, 2.0, **BOTH))


@pytest.mark.parametrize("layout", SEPARATE)
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_TERMS
def test_fresh_gradient_has_memory_of_its_own(strengths, dtype, layout, device):
    """Hard cases 10, 22, 32: the parameter's strides where these are dense; no later call writes there."""
    (p,) = leaves([make(layout, dtype, device)])
    accumulate_grad_(p, **strengths)
    grad, copy = p.grad, p.grad.clone()
    assert grad.untyped_storage().nbytes() >= grad.nbytes
    assert grad.stride() == torch.empty_like(p).stride()
    if LAYOUTS[layout][0]:
        assert grad.stride() == p.stride()
    p.grad = None
    accumulate_grad_(p, **strengths, scale=-7.0)
    assert p.numel() == 0 or p.grad.data_ptr() != grad.data_ptr()
    fused_penalty(p, **strengths).backward()
    assert_same_bits([grad], [copy])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FULL_DTYPES)
def test_layouts_of_the_parameter(dtype, layout, device):
    """Hard cases 10, 11: gradients of all logical elements, also of an expanded parameter, which is only read."""
    w = make(layout, dtype, device)
    (p,), (fresh,) = leaves([w]), leaves([w])
    p.grad = draw(w.shape, dtype, device, seed=50)
    value = accumulate_grad_([fresh], **BOTH)
    assert_same_bits([fresh.grad], loop_gradients([w], **BOTH))
    assert_value(value, [w], **BOTH)
    assert_value(accumulate_grad_([p], **BOTH), [w], **BOTH)
    assert_same_bits([p.grad], expected_grads([w], **BOTH))


@pytest.mark.parametrize("layout", SEPARATE)
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_TERMS
def test_layouts_of_the_gradient(strengths, dtype, layout, device):
    """Hard case 14: other strides than the parameter's, gaps between the elements; the gaps keep what they hold."""
    grad = make(layout, dtype, device)
    memory = grad.as_strided((grad.untyped_storage().nbytes() // grad.element_size(),), (1,), 0)
    gaps = torch.ones_like(memory, dtype=torch.bool)
    gaps.as_strided(grad.shape, grad.stride(), grad.storage_offset()).fill_(False)
    kept = memory[gaps].clone()
    w = draw(grad.shape, dtype, device, seed=4)
    (p,), (contiguous,) = leaves([w]), leaves([w])
    p.grad, contiguous.grad = grad, grad.clone(memory_format=torch.contiguous_format)
    version = grad._version
    value = accumulate_grad_([p], **strengths)
    assert p.grad is grad
    assert grad._version == version + 1
    accumulate_grad_([contiguous], **strengths)
    assert_same_bits([memory[gaps]], [kept])
    if strengths == BOTH:
        assert_same_bits([p.grad], [contiguous.grad])
        assert_value(value, [w], **BOTH)
    else:
        torch.testing.assert_close(p.grad, contiguous.grad)


@EVERY_TERMS
def test_requires_grad_false(strengths, device):
    """Hard case 22: skipped, whatever ``.grad`` it has, and counted."""
    params = with_grads(draw_list(torch.float32, device))
    frozen = params[3]
    frozen.grad = grad = draw(frozen.shape, device=device, seed=77)
    frozen.requires_grad_(False)
    params[8].requires_grad_(False)
    params[8].grad = None
    kept = grad.clone()
    value = accumulate_grad_(params, **strengths)
    assert_same_bits([value], [fused_penalty([p.detach() for p in params], **strengths)])
    assert frozen.grad is grad
    assert_same_bits([grad], [kept])
    assert params[8].grad is None
    others = [p for i, p in enumerate(params) if i not in (3, 8)]
    alone = leaves(others)
    for i, p in enumerate(draw_list(torch.float32, device)):
        if i not in (3, 8):
            alone[i - (i > 3) - (i > 8)].grad = draw(p.shape, device=device, seed=50 + i)
    accumulate_grad_(alone, **strengths)
    assert_same_bits([p.grad for p in others], [p.grad for p in alone])
    none = [p.detach() for p in params]
    with pytest.warns(UserWarning, match="no parameter requires grad"):
        assert_same_bits([accumulate_grad_(none, **strengths)], [value])
    assert all(p.grad is None for p in none)


@EVERY_TERMS
def test_version_and_graph(strengths, device):
    """Autograd notices that ``.grad`` changed; nothing is recorded, whatever the mode."""
    params = with_grads(mixed_list(device))
    grads = [p.grad for p in params]
    versions = [(p._version, p.grad._version) for p in params]
    product = (grads[2].requires_grad_() ** 2).sum()
    value = accumulate_grad_(params, **strengths)
    assert value.grad_fn is None
    assert not value.requires_grad
    assert [(p._version, p.grad._version) for p in params] == [(v, g + 1) for v, g in versions]
    assert all(p.grad is g and g.grad_fn is None for p, g in zip(params, grads, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_within_modes(device):
    """Under no_grad, inference_mode and autocast: the same."""
    params = draw_list(torch.float32, device)
    expected = expected_grads(params, **BOTH)
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16)):
        trained = with_grads(params)
        with mode:
            value = accumulate_grad_(trained, **BOTH)
        assert_same_bits([value, *(p.grad for p in trained)], [fused_penalty(params, **BOTH), *expected])


@pytest.mark.parametrize(
    ("dtype", "wider"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("kind", ["that dtype", "any"])
def test_wider_gradients(kind, dtype, wider, device):
    """A parameter that accumulates in a wider dtype: added there, in full."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    params = [draw(n, dtype, device, seed=n) for n in (5, 1000, 40_000)]
    trained = leaves(params)
    for p in trained:
        p.grad_dtype = wider if kind == "that dtype" else None
        p.grad = draw(p.shape, wider, device, seed=50)
    value = accumulate_grad_(trained, **BOTH, scale=0.37)
    assert_value(value, params, **BOTH)
    for p, w in zip(trained, params, strict=True):
        assert p.grad.dtype == wider
        assert_same_bits([p.grad], expected_grads([w.to(wider)], 0.37, **BOTH))
        p.grad = None
    accumulate_grad_(trained, **BOTH)  # a fresh one: as autograd, the parameter's own gradient, cast
    expected = value_and_grad(params, **BOTH)[1]
    fresh_dtype = wider if kind == "that dtype" else dtype
    assert_same_bits([p.grad for p in trained], [g.to(fresh_dtype) for g in expected])


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.bfloat16, torch.float16)],
)
def test_narrower_gradients(dtype, narrow, device):
    """A gradient that cannot hold the parameter's: added in a dtype that holds both, rounded once; twice in a row."""
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no Tensor.grad_dtype")
    both = torch.promote_types(dtype, narrow)
    (w,) = params = [draw(1000, dtype, device)]
    (p,) = trained = leaves(params)
    p.grad_dtype = narrow
    assert_same_bits([accumulate_grad_(trained, **BOTH)], [fused_penalty(params, **BOTH)])
    first = p.grad.clone()
    assert_same_bits([first], [value_and_grad(params, **BOTH)[1][0].to(narrow)])
    accumulate_grad_(trained, **BOTH)
    assert_same_bits([p.grad], [(first.to(both) + value_and_grad([w.to(both)], **BOTH)[1][0]).to(narrow)])


def test_lists(device):
    """Hard cases 1, 2, 4."""
    empty = accumulate_grad_([], **BOTH)
    assert (empty.item(), empty.dtype, empty.shape) == (0, torch.float32, ())
    assert accumulate_grad_(iter(()), l1=[], scale=3) == 0
    params = draw_list(torch.float32, device)
    expected = expected_grads(params, **BOTH)
    trained = with_grads(params)
    for kind in (iter, tuple, lambda ps: dict(enumerate(ps)).values(), lambda ps: (p for p in ps)):
        trained = with_grads(params)
        accumulate_grad_(kind(trained), **BOTH)
        assert_same_bits([p.grad for p in trained], expected)
    one = with_grads(params[9:10], seed=59)[0]
    accumulate_grad_(one, **BOTH)
    assert_same_bits([one.grad], expected[9:10])
    nothing = leaves([torch.empty(0, 3, device=device), torch.empty(2, 0, device=device)])
    assert accumulate_grad_(nothing, **NORMS, group="row") == 0
    assert [p.grad.shape for p in nothing] == [(0, 3), (2, 0)]


def resident_kilobytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


@pytest.mark.skipif(not torch.sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("fresh", [True, False])
@EVERY_TERMS
def test_memory_is_flat(strengths, fresh, device):
    """Hard case 38: 10,000 calls leave no object and no memory behind."""
    params = with_grads([draw((60, 40), device=device), draw(4096, device=device, seed=1)])

    def calls(count):
        for _ in range(count):
            if fresh:
                for p in params:
                    p.grad = None
            accumulate_grad_(params, **strengths)

    calls(2000)
    gc.collect()
    objects, before = len(gc.get_objects()), resident_kilobytes()
    calls(10_000)
    assert resident_kilobytes() - before < 4000  # 10,000 gradients of one parameter would be 80,000
    gc.collect()
    assert len(gc.get_objects()) <= objects + 20


@EVERY_TERMS
def test_eight_python_threads(strengths, device):
    """Hard case 33: at once, over shared parameters' copies with gradients of their own."""
    params = [*mixed_list(device), draw(200_001, device=device), draw(100_000, torch.bfloat16, device)]
    start = threading.Barrier(8)

    def work(_=None):
        results = []
        for _ in range(3):
            trained = with_grads(params)
            trained[-1].grad = None
            results.append([accumulate_grad_(trained, **strengths), *(p.grad for p in trained)])
        return results

    expected = work()[0]

    def at_once(_):
        start.wait(60)
        return work()

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(at_once, range(8)):
            for result in results:
                assert_same_bits(result, expected)


def test_penalty_once_per_step_of_several_micro_batches(device):
    """The recurring bug: added in every micro-batch. Here it is one call a step, or 1/n in each of n."""
    x, y = draw((32, 6), torch.float64, device), draw((32, 1), torch.float64, device, seed=1)
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 1).to(device, torch.float64)

    def backward(rows):
        (torch.nn.functional.mse_loss(net(x[rows]), y[rows]) * len(x[rows]) / 32).backward()

    backward(slice(None))
    (reference.loop(net.parameters(), **BOTH)).backward()
    expected = [p.grad for p in net.parameters()]
    for calls in (1, 4):
        net.zero_grad()
        for i in range(4):
            backward(slice(8 * i, 8 * i + 8))
            if calls == 4 or i == 3:
                accumulate_grad_(net.parameters(), **BOTH, scale=1 / calls)
        torch.testing.assert_close([p.grad for p in net.parameters()], expected)


def test_a_negated_gradient(device):
    """Hard case 15: the right sign, in the memory that is there."""
    p = torch.nn.Parameter(draw(5, device=device))
    memory = torch.full((5,), -2.0, device=device)
    p.grad = grad = torch._neg_view(memory)
    accumulate_grad_([p], l1=1.0)
    assert p.grad is grad
    assert_same_bits([grad.resolve_neg(), -memory], [2 + p.detach().sign()] * 2)


def test_a_gradient_from_inference_mode_serves_the_next_backward(device):
    p = torch.nn.Parameter(draw(5, device=device))
    with torch.inference_mode():
        accumulate_grad_([p], l1=1.0)
    p.sum().backward()
    assert_same_bits([p.grad], [1 + p.detach().sign()])
