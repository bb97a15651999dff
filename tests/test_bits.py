"""The same bits for any thread count, repeated runs and memory alignment (docs, Numerics); test_golden.py has the
instruction sets."""

import pytest
import torch
from oracle import assert_same_bits, bits, gradients
from samples import CHUNK, DTYPES, draw, draw_list, leaves, mixed_list
from samples import STRENGTHS as LIST_STRENGTHS

from fused_reg import fused_penalty, value_and_grad

THREADS = (1, 2, 3, 7)


def _large_list(dtype, device):
    """Enough for seven threads, with chunks that no equal share ends at."""
    sizes = (300_001, 0, 17, CHUNK, 1, 123_456, 3 * CHUNK - 1, 77)
    return [draw(n, dtype, device, seed) for seed, n in enumerate(sizes)]


def _results(params, **strengths):
    value, grads = value_and_grad(params, **strengths)
    return [fused_penalty(params, **strengths), value, *grads, *gradients(fused_penalty, params, 0.37, **strengths)]


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_thread_counts(dtype, device, threads):
    """Hard case 33; ``None`` is a list of all dtypes."""
    params = _large_list(dtype, device) if dtype else mixed_list(device, ((300_001,), (0,), (17,), (123, 456), (77,)))
    results = []
    for count in THREADS:
        threads(count)
        results.append(_results(params, l1=0.1, l2=1 / 3))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
@pytest.mark.parametrize("group", ["tensor", "row"])
def test_thread_counts_with_norms(group, dtype, device, threads):
    """Hard case 33; accumulate_grad_ and prox_ are in their own files."""
    shapes = ((300_001,), (0,), (17,), (123, 456), (CHUNK,), (700, 77), (5, 40_000))
    params = [draw(s, dtype or DTYPES[i % 4], device, i) for i, s in enumerate(shapes)]
    results = []
    for count in THREADS:
        threads(count)
        results.append(_results(params, l1=0.1, l2_norm=1 / 3, group=group))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_runs(dtype, device):
    params = _large_list(dtype, device)
    first = _results(params, l1=0.1, l2=1 / 3)
    for _ in range(3):
        assert_same_bits(_results(params, l1=0.1, l2=1 / 3), first)


@pytest.mark.parametrize("strengths", LIST_STRENGTHS.values(), ids=LIST_STRENGTHS)
def test_every_pass_gives_the_same_value(strengths, device):
    for dtype in DTYPES:
        params = draw_list(dtype, device)
        value = fused_penalty(params, **strengths)
        assert_same_bits([value_and_grad(params, **strengths)[0]], [value])
        assert_same_bits([fused_penalty(leaves(params), **strengths)], [value])
        some = [p.detach().requires_grad_(i % 3 == 0) for i, p in enumerate(params)]
        assert_same_bits([fused_penalty(some, **strengths)], [value])


@pytest.mark.parametrize("offset", range(16))
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_offsets(dtype, offset, device):
    """Hard case 13: parameters that no vector load is aligned to, with gradients that are aligned."""
    for size in (1, 3, 17, 257, CHUNK + 1, 50_000):
        aligned = draw(size, dtype, device)
        memory = torch.full((offset + size + 5,), float("nan"), dtype=dtype, device=device)
        shifted = memory[offset : offset + size]
        shifted.copy_(aligned)
        assert_same_bits(_results([shifted], l1=0.1, l2=1 / 3), _results([aligned], l1=0.1, l2=1 / 3))
        assert memory[:offset].isnan().all()
        assert memory[offset + size :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_permuted_memory_is_summed_in_memory_order(dtype, device):
    """A dense permutation has the value of its memory, to the bit: nothing was copied into another order."""
    w = draw((211, 300), dtype, device)
    assert_same_bits([fused_penalty(w.t(), l1=0.1, l2=0.3)], [fused_penalty(w.reshape(-1), l1=0.1, l2=0.3)])


def test_bits_tell_apart():
    """What the comparisons above rest on."""
    assert bits(torch.tensor(0.0)) != bits(torch.tensor(-0.0))
    assert bits(torch.tensor([1.0, 2.0]).flip(0)) == bits(torch.tensor([2.0, 1.0]))
    with pytest.raises(AssertionError, match=r"tensor 1, element 2 of 3: -0\.0 is not 0\.0 \(1 wrong\)"):
        assert_same_bits([torch.ones(1), torch.tensor([1.0, 0.0, -0.0])], [torch.ones(1), torch.tensor([1.0, 0, 0])])
