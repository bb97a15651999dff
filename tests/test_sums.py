"""The sums beside the penalty, which reports and strengths' gradients are made of: per parameter, per group, zeros."""

import math

import pytest
import torch
from oracle import exact_norms, exact_sum
from samples import DTYPES, LAYOUTS, SIZES, draw, draw_list, mixed_list, numbers

from fused_reg import _ops, _terms

TERMS = len(_terms.TERMS) - 1  # that are sums over elements


def with_zeros(n, dtype, device) -> torch.Tensor:
    """Some zeros of both signs, NaN and the smallest subnormal, which is none."""
    w = draw(n, dtype, device)
    w[::5] = 0.0
    w[2::7] = -0.0
    w[4::11] = math.nan
    w[1::9] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return w


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_counts(dtype, device):
    params = [with_zeros(n, dtype, device) for n in (0, *range(1, 140), *SIZES, 100_003)]
    sums = _ops.sums(params, True, *numbers())
    assert (sums.dtype, sums.shape) == (torch.float64, (len(params), TERMS + 1))
    assert sums[:, -1].tolist() == [int((p == 0).sum()) for p in params]


def test_zero_counts_of_layouts(device):
    params = [make(dtype=DTYPES[i % 4], device=device) for i, (_, make) in enumerate(LAYOUTS.values())]
    assert _ops.sums(params, True, *numbers())[:, -1].tolist() == [int((p == 0).sum()) for p in params]


def relative_error(number: float, exact) -> float:
    return 0.0 if number == exact else abs(float(number / exact) - 1)


@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_term_sums(dtype, device):
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    sums = _ops.sums(params, False, *numbers())
    assert (sums.dtype, sums.shape) == (torch.float64, (len(params), TERMS))
    for p, row in zip(params, sums[:, :2].tolist(), strict=True):
        for degree, number in enumerate(row, start=1):
            assert relative_error(number, exact_sum(p, degree)) < 4e-15


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, None], ids=str)
def test_group_norms(dtype, rows, device):
    """Those of all groups, in order; an empty parameter has none."""
    params = mixed_list(device) if dtype is None else draw_list(dtype, device)
    groups = [g for p in params if p.numel() for g in (p if rows and p.ndim else [p])]
    norms = _ops.norms(params, *numbers(group="row" if rows else "tensor"))
    assert (norms.dtype, norms.shape) == (torch.float64, (len(groups),))
    for group, number in list(zip(groups, norms.tolist(), strict=True))[::13]:
        assert relative_error(number, exact_norms(group, "tensor")) < 4e-15


def test_they_are_of_tensors(device):
    params = [draw((400, 8), device=device)]
    with pytest.raises(ValueError, match="sums: group must be 0, for sums are of tensors, got 2"):
        _ops.sums(params, False, *numbers(group="row"))
