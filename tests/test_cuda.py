"""What a GPU promises beyond the CPU: the CPU's bits (more: test_golden.py), tables of every length, out of memory."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracle import assert_same_bits, gradients
from samples import CHUNK, DTYPES, draw, leaves, many, mixed_list, numbers, one_each

from fused_reg import _ops, fused_penalty, value_and_grad

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

BOTH = {"l1": 0.1, "l2": 1 / 3}
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element

# Bytes of a list's table, and what the arguments of a kernel hold of it (csrc/cuda/table.h).
ENTRY, STRENGTH_PAIR, CALL = 24, 16, 80
TABLES = SMALL_TABLE, MEDIUM_TABLE, LARGE_TABLE = 4096 - CALL, 12288 - CALL, 32760 - CALL


# The same bits


def as_integers(t):
    return t.detach().reshape(-1).view(INTEGER[t.element_size()])


def test_a_thousand_runs(cuda):
    """Of the value, and of the value with the gradients, to the bit."""
    sizes = (300_001, 0, 17, CHUNK, 1, 123_456, 3 * CHUNK - 1, 2_000_000)
    params = [draw(n, DTYPES[i % 4], cuda, seed=i) for i, n in enumerate(sizes)]
    value, grads = value_and_grad(params, **BOTH)
    values, wrong = [], torch.zeros((), dtype=torch.int64, device=cuda)
    for _ in range(1000):
        again, others = value_and_grad(params, **BOTH)
        values += [fused_penalty(params, **BOTH), again]
        for grad, other in zip(grads, others, strict=True):
            wrong += (as_integers(grad) != as_integers(other)).sum()
    assert wrong.item() == 0
    assert_same_bits([torch.stack(values)], [value.expand(2000)])


def random_lists(count):
    """(parameters on the CPU, the same at the same alignment in the memory of another device, strengths)."""
    rng = np.random.default_rng(11)
    memory = {dtype: draw(120_000, dtype, seed=i) for i, dtype in enumerate(DTYPES)}
    copies = {dtype: memory[dtype].cuda() for dtype in DTYPES}
    for _ in range(count):
        dtypes = DTYPES if rng.random() < 0.4 else (DTYPES[rng.integers(4)],)
        places = []
        for _ in range(rng.integers(1, 10)):
            size = int(4 ** rng.uniform(0, 8)) - 1 if rng.random() < 0.9 else int(rng.integers(0, 100_000))
            begin = int(rng.integers(0, 120_000 - size))
            places.append((dtypes[rng.integers(len(dtypes))], begin, begin + size))
        strengths = {}
        for name in ("l1", "l2"):
            kind = rng.integers(4)
            values = 10.0 ** rng.uniform(-8, 3, len(places)) * (rng.random(len(places)) < 0.9)
            if kind:
                strengths[name] = values.tolist() if kind == 1 else float(values[0])
        yield *([where[d][a:b] for d, a, b in places] for where in (memory, copies)), strengths


def test_a_thousand_random_lists_have_the_bits_of_the_cpu(cuda):
    """At most 1 ulp is promised of the value; the order of summation is the same, and so are the bits."""
    distances = []
    for params, copies, strengths in random_lists(1000):
        value, grads = value_and_grad(params, **strengths)
        there, grads_there = value_and_grad(copies, **strengths)
        assert there.is_cuda
        assert_same_bits([fused_penalty(copies, **strengths)], [there])
        distances.append(abs(as_integers(there.cpu()).item() - as_integers(value).item()))
        assert there.dtype == value.dtype
        assert_same_bits(grads_there, grads)
        actual = gradients(fused_penalty, copies, 0.37, **strengths)
        assert_same_bits(actual, gradients(fused_penalty, params, 0.37, **strengths))
    assert max(distances) <= 1
    assert sum(distances) == 0


def test_term_sums_have_the_bits_of_the_cpu(cuda):
    for params in (mixed_list(), [torch.empty(0)], [draw(3_000_001), *many(2000, "cpu")]):
        sums = _ops.sums([p.to(cuda) for p in params], True, *numbers())
        assert_same_bits([sums], [_ops.sums(params, True, *numbers())])


# Tables of every length


def assert_as_on_the_cpu(params, strengths) -> None:
    copies = [p.cpu() for p in params]
    value, grads = value_and_grad(params, **strengths)
    expected, expected_grads = value_and_grad(copies, **{k: _on_the_cpu(s) for k, s in strengths.items()})
    assert_same_bits([fused_penalty(params, **strengths)], [expected])
    assert_same_bits([value, _joined(grads)], [expected, _joined(expected_grads)])


def _on_the_cpu(strength):
    return strength.cpu() if isinstance(strength, torch.Tensor) else strength


def _joined(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


LIMITS = [  # with a pair of strengths for each, with one for all
    limit for table in TABLES for limit in (table // (ENTRY + STRENGTH_PAIR), (table - STRENGTH_PAIR) // ENTRY)
]


@pytest.mark.parametrize("count", [limit + i for limit in LIMITS for i in range(-8, 9)])
def test_counts_around_the_limits_of_a_table(count, cuda):
    params = many(count, cuda, seed=count)
    each = one_each(count)
    assert_as_on_the_cpu(params, {"l1": 0.1, "l2": 0.3})
    assert_as_on_the_cpu(params, {"l1": each, "l2": each[::-1]})
    assert_as_on_the_cpu(params, {"l1": torch.tensor(each, device=cuda), "l2": 0.3})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(40_000, 8), (20_001, 96), (5_000, 768), (5_000, 1024)])
def test_rows_side_by_side(shape, offset, dtype, cuda):
    """More than there are warps, so that each takes some at a time, where their vectors are whole."""
    rows = draw(offset + math.prod(shape), dtype).to(cuda)[offset:].view(shape)
    params = [draw((3, 40_000), device=cuda), rows, draw((77, 5), device=cuda)]
    assert_as_on_the_cpu(params, {"l1": 0.1, "l2_norm": [0.3, 0.7, 0.2], "group": "row"})


@pytest.mark.parametrize("count", [5_000, 10_000])
def test_long_lists(count, cuda):
    """Hard case 6; and a large tensor among the small ones."""
    params = many(count, cuda)
    params[count // 2] = draw(500_000, device=cuda)
    each = one_each(count)
    assert_as_on_the_cpu(params, BOTH)
    assert_as_on_the_cpu(params, {"l1": each, "l2": torch.tensor(each[::-1], dtype=torch.float64, device=cuda)})


def test_long_tables_are_told_apart(cuda):
    """More lists than tables are kept, in turn; and the same memory with other sizes, strengths and contents."""
    lists = [many(2000, cuda, seed=i) for i in range(6)]
    expected = [[fused_penalty([p.cpu() for p in params], l1=l1) for l1 in (0.1, 0.2)] for params in lists]
    for _ in range(3):
        for params, values in zip(lists, expected, strict=True):
            assert_same_bits([fused_penalty(params, l1=l1) for l1 in (0.1, 0.2)], values)
    memory = _joined(lists[0])
    for shift in range(3):
        sizes = [(i + shift) % 4 for i in range(1500)]
        memory.mul_(1.5)
        assert_as_on_the_cpu(list(memory[: sum(sizes)].split(sizes)), BOTH)
    strength = torch.tensor(0.5, device=cuda)
    for value in (0.5, 0.25, 0.0):
        strength.fill_(value)
        assert_same_bits([fused_penalty(lists[0], l1=strength)], [fused_penalty(lists[0], l1=value)])


@pytest.mark.parametrize("count", [1, 200, 3000])
@pytest.mark.parametrize("full", [(), (0,), (-1,), (0, -1)])
def test_empty_tensors_in_tables(full, count, cuda):
    """Hard case 4: all of them empty, all but the first, all but the last."""
    params = [torch.empty((0, 3), device=cuda) for _ in range(count)]
    for place in full:
        params[place] = draw(CHUNK + 5, device=cuda, seed=place % 2)
    assert_as_on_the_cpu(params, {"l1": 0.1, "l2": one_each(count)})


# Memory


@contextmanager
def at_most(more: int):
    """This process can take at most so many bytes more of the device's memory."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


MEBI = 1 << 20


def test_out_of_memory_half_way(cuda):
    """Hard case 35: memory for some of the gradients only. Nothing has changed, and the next call works."""
    params = [draw(16 * MEBI, device=cuda, seed=i) for i in range(3)]
    fused_penalty(params[0][:9], **BOTH)
    checksums = [as_integers(p).sum().item() for p in params]
    trained = leaves(params)
    before = torch.cuda.memory_allocated()
    with at_most(100 * MEBI):
        for call in (value_and_grad, fused_penalty):
            with pytest.raises(torch.OutOfMemoryError):
                call(trained, **BOTH)
            assert torch.cuda.memory_allocated() == before
        value = fused_penalty(params, **BOTH)
        value_of_one, (grad,) = value_and_grad(params[:1], **BOTH)
    assert all(p.grad is None for p in trained)
    assert [as_integers(p).sum().item() for p in params] == checksums
    copies = [p.cpu() for p in params]
    assert_same_bits([value], [fused_penalty(copies, **BOTH)])
    expected = value_and_grad(copies[:1], **BOTH)
    assert_same_bits([value_of_one, grad], [expected[0], *expected[1]])
    assert_same_bits(value_and_grad(params, **BOTH)[1][:1], expected[1])


def test_out_of_memory_in_the_backward(cuda):
    """Hard case 35: where a second backward needs gradients of its own."""
    trained = leaves([draw(16 * MEBI, device=cuda, seed=i) for i in range(2)])
    penalty = fused_penalty(trained, **BOTH)
    first = torch.autograd.grad(penalty, trained, retain_graph=True)
    checksums = [as_integers(g).sum().item() for g in first]
    with at_most(100 * MEBI), pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(penalty, trained, retain_graph=True)
    assert [as_integers(g).sum().item() for g in first] == checksums
    second = torch.autograd.grad(penalty, trained)
    assert [as_integers(g).sum().item() for g in second] == checksums


def test_memory_is_flat(cuda):
    """Hard case 38: what is allocated on the device comes back, the tables of long lists but for a few."""
    short, long = leaves(mixed_list(cuda)), leaves(many(2000, cuda))
    l1 = torch.tensor(0.1, device=cuda, requires_grad=True)

    def work(i):
        (0.37 * fused_penalty(short, **BOTH)).backward()
        torch.autograd.grad(fused_penalty(short, l1=l1, l2=0.3), short)
        fused_penalty(long, l1=0.001 * i)
        value_and_grad(long, l1=0.001 * i)

    for i in range(20):
        work(i)
    before = torch.cuda.memory_allocated()
    for i in range(200):
        work(i)
    assert torch.cuda.memory_allocated() <= before + 64 * 1024


# Under compute-sanitizer: every kernel, dtype and kind of table, with as few of torch's own kernels as can be


def _small_parts(device):
    """Every dtype, aligned and not, sizes around a block, a chunk and a vector; no kernel of torch."""
    sizes = (CHUNK, 1032, CHUNK + 3, 1024, 7, 0, 1)
    params = []
    for seed, dtype in enumerate(DTYPES):
        for offset in (0, 1):
            memory = draw(offset + sum(sizes), dtype, seed=seed).to(device)
            params += memory[offset:].split(sizes)
    return params


def _tables(device):
    parts = _small_parts(device)
    each = one_each(len(parts))
    long = draw(1320).to(device).split(1)
    half = torch.tensor(0.3, dtype=torch.bfloat16).to(device)
    return [
        (parts, numbers((0.1,), (1 / 3,))),
        (parts, numbers(torch.tensor(each).to(device), half)),
        ([*parts, *long[:200]], numbers((0.1,))),
        ([*parts, *long], numbers((0.1,), (1 / 3,))),
    ]


def _norms_and_in_place(params, given, factor):
    """Values, norms, gradients and proximal steps with and without norms, of copies of the parameters."""
    out = []
    for group in range(3):
        own = given.having(step=(0.5,), l2_norm=(0.3,) if group else ())._replace(group=group)
        grads, written = [p.clone() for p in params], [p.clone() for p in params]
        modes = [1 + i % 2 for i in range(len(params))]
        value = _ops.accumulate_grad_(params, grads, modes, 1.0, factor, *own)
        _ops.prox_(written, None, (), *own)
        out += [value, *grads, *written]
        out += [_ops.norms(params, *numbers()._replace(group=group))] if group else []
    return out


@pytest.mark.sanitizer
@pytest.mark.parametrize("table", range(4), ids=["small", "strengths on the device", "large", "on the device"])
def test_every_kernel(table, cuda):
    results = {}
    for device in (torch.device("cpu"), cuda):
        params, given = _tables(device)[table]
        upstream = torch.tensor(0.37).to(device)
        value, *_ = _ops.penalty(params, (), *given)
        both, grads, _ = _ops.penalty(params, [True] * len(params), *given)
        fresh = _ops.penalty_grad(upstream, params, [True] * len(params), None, (), *given)
        kept = [g.cpu() for g in grads]
        _ops.rescale_grad_(upstream, params, grads, [True] * len(params), None, (), *given)
        results[device.type] = [value, both, *kept, *fresh, *grads, _ops.sums(params, True, *given)]
        results[device.type] += _norms_and_in_place(params, given, upstream)
    assert_same_bits(results["cuda"], results["cpu"])
