"""``python -m fused_reg``: what is installed, and whether it computes what the reference does."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import fused_reg
from fused_reg import _ops, reference

# What the value may differ by, relative, from the reference: one rounding of the result's dtype.
_VALUE_TOLERANCE = {torch.float32: 2**-23, torch.float64: 4e-15}


def _versions() -> list[tuple[str, str]]:
    info = _ops.library.build_info()
    return [
        ("fused_reg", fused_reg.__version__),
        ("torch, built with", info["torch"]),
        ("torch, running", torch.__version__),
        ("compiler", info["compiler"]),
        ("CUDA architectures", info["cuda_architectures"] or "CPU only"),
        ("CPU capability", info["cpu_capability"]),
        ("threads", str(torch.get_num_threads())),
    ]


def _devices() -> list[torch.device]:
    cuda = range(torch.cuda.device_count()) if _ops.library.build_info()["cuda_architectures"] else ()
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in cuda)]


def _sample(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """A list with the hard parts: tails, an empty tensor, a transposed one, a chunk boundary, a zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (17,), (16385,), (300, 500)]
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params[-1] = params[-1].t()
    params[2][3] = 0.0
    return [p.to(device, dtype) for p in params]


def _failures(dtype: torch.dtype, device: torch.device) -> list[str]:
    params = _sample(dtype, device)
    l1, l2 = 0.25, [0.5, 1.0, 0.0, 0.125, 0.03125]
    value, grads = fused_reg.value_and_grad(params, l1, l2)
    expected, expected_grads = reference.value_and_grad([p.cpu() for p in params], l1, l2)

    failures = []
    error = ((value.cpu() - expected).abs() / expected).item()
    if not error <= _VALUE_TOLERANCE[value.dtype]:
        failures.append(f"value {value.item()!r}, expected {expected.item()!r}")
    for i, (grad, expected_grad) in enumerate(zip(grads, expected_grads, strict=True)):
        # The strengths are powers of two: three roundings at the most, of the sum of two terms.
        tolerance = 2 * torch.finfo(dtype).eps * expected_grad.double().abs() + torch.finfo(dtype).tiny
        wrong = ~((grad.cpu().double() - expected_grad.double()).abs() <= tolerance)
        if wrong.any():
            failures.append(f"gradient of params[{i}] is wrong in {int(wrong.sum())} of {wrong.numel()} elements")
    return failures


def main() -> int:
    """Print the versions and a line per device and dtype; 0 if all of them agree with the reference, else 1."""
    for name, value in _versions():
        print(f"{name:20} {value}")
    status = 0
    for device in _devices():
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            failures = _failures(dtype, device)
            print(f"self-check {device} {dtype}: {'; '.join(failures) or 'ok'}")
            status |= bool(failures)
    return status


if __name__ == "__main__":
    sys.exit(main())
