"""``python -m fused_reg``: what is installed, and whether it computes what the reference does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fused_reg
from fused_reg import _devices, _ops, reference

# What the value may differ by, relative, from the reference: one rounding of the result's dtype.
_VALUE_TOLERANCE = {torch.float32: 2**-23, torch.float64: 4e-15}


def _versions() -> list[tuple[str, str]]:
    info = _ops.library.build_info()
    return [
        ("fused_reg", fused_reg.__version__),
        ("torch, built with", info["torch"]),
        ("torch, running", torch.__version__),
        ("compiler", info["compiler"]),
        ("CUDA architectures", info.get("cuda_architectures", "CPU only")),
        ("CPU capability", info["cpu_capability"]),
        ("threads", str(torch.get_num_threads())),
    ]


def _sample(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A list with the hard parts: tails, an empty tensor, a transposed one, a chunk boundary, a zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (17,), (16385,), (300, 500)]
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params[-1] = params[-1].t()
    params[2][3] = 0.0
    return [p.to(device, dtype) for p in params]


@torch.no_grad()
def _failures(dtype: torch.dtype, device: torch.device) -> list[str]:
    params = _sample(dtype, device)
    host = [p.cpu() for p in params]
    l1, l2 = 0.25, [0.5, 1.0, 0.0, 0.125, 0.03125]
    value, grads = fused_reg.value_and_grad(params, l1, l2)
    expected, expected_grads = reference.value_and_grad(host, l1, l2)
    norms, expected_norms = (f(p, l2_norm=0.5, group="row") for f, p in _pairs("fused_penalty", params, host))

    failures = []
    for name, got, want in (("value", value, expected), ("value with l2_norm", norms, expected_norms)):
        error = ((got.cpu() - want).abs() / want).item()
        if not error <= _VALUE_TOLERANCE[value.dtype]:
            failures.append(f"{name} {got.item()!r}, expected {want.item()!r}")
    failures += _differences("gradient", grads, expected_grads)
    for function, given in _pairs("prox_", params, host):
        function(given, l1, l2, step=0.5)
    return failures + _differences("proximal step", params, host)


def _pairs(name: str, params: list[Tensor], host: list[Tensor]) -> list[tuple[Callable[..., Any], list[Tensor]]]:
    """A function and its reference, each with its list."""
    return [(getattr(fused_reg, name), params), (getattr(reference, name), host)]


def _differences(what: str, tensors: Sequence[Tensor], expected: Sequence[Tensor]) -> list[str]:
    failures = []
    for i, (got, want) in enumerate(zip(tensors, expected, strict=True)):
        # The strengths are powers of two: three roundings at the most.
        tolerance = 2 * torch.finfo(got.dtype).eps * want.double().abs() + torch.finfo(got.dtype).tiny
        wrong = ~((got.cpu().double() - want.double()).abs() <= tolerance)
        if wrong.any():
            failures.append(f"{what} of params[{i}] is wrong in {int(wrong.sum())} of {wrong.numel()} elements")
    return failures


def main() -> int:
    """Print the versions and a line per device and dtype; 0 if all of them agree with the reference, else 1."""
    for name, value in _versions():
        print(f"{name:20} {value}")
    status = 0
    for device in _devices.present():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            failures = _failures(dtype, device)
            print(f"self-check {device} {dtype}: {'; '.join(failures) or 'ok'}")
            status |= bool(failures)
    return status


if __name__ == "__main__":
    sys.exit(main())
