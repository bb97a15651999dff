"""The memory of gradients: theirs alone while anything refers to it, and not growing (hard cases 32, 38)."""

import copy
import gc
import io
import pickle
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, gradients, loop_gradients
from samples import DTYPES, draw, leaves

from fused_reg import fused_penalty, reference, value_and_grad

# Below and above 64 KB, from which on the memory of gradients is used again, and above 32 MB.
SIZES = (1000, 16_384, 40_000, 16_384, 300_000)
LARGE = 9_000_000

STATM = Path("/proc/self/statm")


def step_params(step, device, dtype=torch.float32, sizes=SIZES):
    return [draw(n, dtype, device, seed=100 * step + i) for i, n in enumerate(sizes)]


def memory(t: torch.Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def assert_disjoint(tensors) -> None:
    spans = sorted(memory(t) for t in tensors if t.numel())
    for (_, end), (begin, _) in pairwise(spans):
        assert end <= begin


def take_gradients(params, way):
    if way == "value_and_grad":
        return value_and_grad(params, l1=0.1, l2=0.3)[1]
    if way == "grad":
        return gradients(fused_penalty, params, l1=0.1, l2=0.3)
    if way == "rescaled grad":
        return gradients(fused_penalty, params, 0.37, l1=0.1, l2=0.3)
    some = leaves(params)
    fused_penalty(some, l1=0.1, l2=0.3).backward()
    return [p.grad for p in some]


WAYS = ("value_and_grad", "grad", "rescaled grad", ".grad")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_held_gradients_do_not_change(dtype, way, device):
    """Hard case 32: gradients of many steps, all kept, each right until the end and none in another's memory."""
    held, expected = [], []
    for step in range(6):
        grads = take_gradients(step_params(step, device, dtype), way)
        # Every second one is let go of, and its memory may be used again.
        kept = [g for i, g in enumerate(grads) if (i + step) % 2]
        held += kept
        expected += [g.clone() for g in kept]
        del grads
        value_and_grad(step_params(50 + step, device, dtype), l2=7.0)
    assert_same_bits(held, expected)
    assert_disjoint(held)


HOLDERS = {
    "slice": lambda g: g[3:50],
    "transposed view": lambda g: g.view(-1, 8).t(),
    "detached": lambda g: g.detach(),
    "data": lambda g: g.data,
    "other dtype": lambda g: g.view(torch.int32),
    "numpy": lambda g: g.numpy(),
    "numpy slice": lambda g: g.numpy()[5:],
    "storage": lambda g: g.untyped_storage(),
    "dlpack": lambda g: torch.from_dlpack(g),
    "set_": lambda g: torch.empty(0).set_(g.untyped_storage(), 7, (90,), (2,)),
    "saved by autograd": lambda g: torch.ones_like(g).requires_grad_() * g,
    "parameter": lambda g: torch.nn.Parameter(g),
}


def _content(holder) -> bytes:
    if isinstance(holder, torch.Tensor):
        return holder.detach().clone().numpy().tobytes()
    return holder.tobytes() if isinstance(holder, np.ndarray) else bytes(holder.tolist())


@pytest.mark.parametrize("size", [16_384, 40_000])
@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_refers_to_a_gradient_keeps_its_memory(name, size):
    """Hard case 32: the tensor itself is gone."""
    grad = value_and_grad(draw(size), l1=0.1, l2=0.3)[1][0]
    holder = HOLDERS[name](grad)
    before = _content(holder)
    del grad
    for step in range(5):
        value_and_grad([draw(size, seed=step), draw(size, seed=9)], l2=3.0)
    assert _content(holder) == before


@pytest.mark.parametrize("size", [1000, 40_000])
@pytest.mark.parametrize("upstream", [1.0, 0.37])
def test_grad_is_not_written_by_later_steps(upstream, size, device):
    """Hard case 32: the alias that a user keeps of `.grad` stays; `.grad` itself accumulates."""
    w = draw(size, device=device)
    (leaf,) = leaves([w])
    once = loop_gradients([w], upstream, l1=0.1, l2=0.3)[0]
    penalty = fused_penalty(leaf, l1=0.1, l2=0.3)
    (upstream * penalty).backward(retain_graph=True)
    alias, kept = leaf.grad.detach(), leaf.grad
    assert_same_bits([leaf.grad], [once])
    leaf.grad = None
    (upstream * penalty).backward(retain_graph=True)
    assert_disjoint([leaf.grad, alias, leaf])
    (upstream * penalty).backward()
    assert_same_bits([leaf.grad, alias, kept], [once + once, once, once])
    leaf.grad.zero_()
    fused_penalty(leaf, l1=0.1, l2=0.3).backward()
    assert_same_bits([leaf.grad, alias], [loop_gradients([w], l1=0.1, l2=0.3)[0], once])


def test_gradients_of_one_call_are_disjoint(device):
    """Hard case 32: also where one tensor stands in the list twice, and apart from the parameters."""
    w = draw(40_000, device=device)
    params = [w, w, w[:20_000], *step_params(0, device)]
    assert_disjoint([w, *params[3:], *value_and_grad(params, l1=0.1)[1]])
    some = leaves(params)
    fused_penalty(some, l1=0.1).backward()
    assert_disjoint([w, *params[3:], *(p.grad for p in some)])


def test_gradient_in_a_training_loop(device):
    """Hard case 32: with each way to clear gradients, and momentum buffers that start as clones of them."""
    for set_to_none in (True, False):
        params = leaves(step_params(0, device))
        loop_params = leaves([p.detach().clone() for p in params])
        params = leaves([p.detach().clone() for p in params])
        for function, some in ((fused_penalty, params), (reference.loop, loop_params)):
            optimizer = torch.optim.SGD(some, lr=0.1, momentum=0.9)
            for _ in range(5):
                optimizer.zero_grad(set_to_none=set_to_none)
                function(some, l1=0.01, l2=0.1).backward()
                optimizer.step()
        assert_same_bits(params, loop_params)


@pytest.mark.parametrize("size", [1000, 40_000])
def test_resized_gradient(size):
    """Hard case 32: larger, smaller, and through the storage."""
    for new_size in (size + 1, 3 * size, size // 2, 0):
        grad = value_and_grad(w := draw(size), l1=0.1, l2=0.3)[1][0]
        before = grad.clone()
        grad.resize_(new_size)
        other = value_and_grad([draw(size, seed=1), draw(size, seed=2)], l2=3.0)[1]
        kept = min(size, new_size)
        assert_same_bits([grad[:kept]], [before[:kept]])
        assert_disjoint([grad, w, *other])
        grad.fill_(5)
        assert_same_bits(other, value_and_grad([draw(size, seed=1), draw(size, seed=2)], l2=3.0)[1])
    grad.untyped_storage().resize_(0)
    del grad
    value_and_grad(draw(size), l2=1.0)


@pytest.mark.parametrize("size", [1000, 40_000])
def test_copied_gradient(size):
    """Hard case 32: deepcopy, pickle, `torch.save`, `share_memory_`."""
    grad = value_and_grad(draw(size), l1=0.1, l2=0.3)[1][0]
    before = grad.clone()
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    shared = value_and_grad(draw(size), l1=0.1, l2=0.3)[1][0].share_memory_()
    assert shared.is_shared()
    copies = [copy.deepcopy(grad), pickle.loads(pickle.dumps(grad)), torch.load(file), shared]
    assert_disjoint([grad, *copies])
    grad.zero_()
    value_and_grad(draw(size, seed=1), l2=3.0)
    assert_same_bits(copies, [before] * len(copies))


def test_deepcopy_of_a_parameter_with_a_gradient(device):
    (leaf,) = leaves([draw(40_000, device=device)])
    fused_penalty(leaf, l1=0.1).backward()
    twin = copy.deepcopy(leaf)
    assert_same_bits([twin.grad], [leaf.grad])
    assert_disjoint([twin, twin.grad, leaf, leaf.grad])


def test_gradient_swapped_into_a_parameter(device):
    """`p.data = grad`: the memory of a gradient becomes a parameter's."""
    (leaf,) = leaves([draw(40_000, device=device)])
    leaf.data = value_and_grad(leaf, l2=0.5)[1][0]
    expected = leaf.detach().clone()
    for step in range(4):
        value_and_grad(draw(40_000, device=device, seed=step), l2=3.0)
    assert_same_bits([leaf], [expected])
    assert_same_bits(value_and_grad(leaf, l2=0.5)[1], [expected])


def test_many_threads_take_and_release_gradients():
    """Hard cases 32, 33: gradients made in one thread and released in another."""
    errors, handed_over = [], []
    lock = threading.Lock()

    def work(seed):
        sizes = (16_384, 40_000, 16_384 + 8 * seed, 70_001)
        expected = [draw(n, seed=seed) for n in sizes]
        for step in range(20):
            grads = value_and_grad(expected, l2=0.5)[1]
            with lock:
                handed_over.append((grads[step % 4], expected[step % 4]))
                taken = handed_over.pop(0) if len(handed_over) > 10 else (grads[0], expected[0])
            if not (torch.equal(*taken) and all(map(torch.equal, grads, expected))):
                errors.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(torch.equal(grad, expected) for grad, expected in handed_over)


def _resident() -> int:
    return int(STATM.read_text().split()[1]) * 4096


needs_proc = pytest.mark.skipif(not STATM.exists(), reason="reads /proc/self/statm")


def _growth(work, warm_up: int, count: int) -> int:
    for _ in range(warm_up):
        work()
    gc.collect()
    before = _resident()
    for _ in range(count):
        work()
    gc.collect()
    return _resident() - before


@needs_proc
def test_memory_is_flat():
    """Hard case 38: 20,000 calls; a leak of one small tensor in each would be megabytes."""
    params = leaves([torch.ones(3), torch.ones(2)])

    def work():
        fused_penalty(params, l1=0.1, l2=[0.2, 0.3]).backward()
        (0.5 * fused_penalty(params[0], l2=0.5)).backward()
        fused_penalty(params[0].detach(), l2=0.5)
        value_and_grad(params, l1=0.1)

    assert _growth(work, 500, 5_000) < 1 << 20


@needs_proc
@pytest.mark.slow
def test_memory_is_flat_over_100_000_calls():
    """Hard case 38: every call there is, errors included."""
    params = leaves([torch.ones(3), torch.ones(2)])
    l1 = torch.tensor(0.1, requires_grad=True)

    def work():
        fused_penalty(params, l1=0.1).backward()
        fused_penalty(params, l1=l1, l2=[0.1, l1]).backward()
        torch.autograd.grad(fused_penalty(params, l2=0.1), params, create_graph=True)
        value_and_grad(params, l1=0.1)
        with pytest.raises(TypeError):
            fused_penalty([params[0], torch.ones(2, dtype=torch.int64)])

    assert _growth(work, 1000, 20_000) < 2 << 20


@needs_proc
def test_memory_of_gradients_is_bounded():
    """Hard case 38: lists of changing sizes, held and released out of order, never keep more than their peak needs."""
    rng = np.random.default_rng(0)
    held = []

    def work():
        sizes = rng.integers(10_000, 400_000, 6)  # up to 10 MB
        held.append(value_and_grad([torch.ones(int(n)) for n in sizes], l1=0.1)[1])
        if len(held) > 3:
            held.pop(int(rng.integers(0, 3)))

    assert _growth(work, 30, 150) < 60 << 20


def test_large_gradients_are_right_when_used_again(device):
    """Above 32 MB the system may take what is released; what comes back is written whole."""
    w = draw(LARGE, device=device)
    expected = 2 * w
    for _ in range(3):
        (grad,) = value_and_grad(w, l2=1.0)[1]
        assert torch.equal(grad, expected)
        del grad
