"""The truth the tests compare with: exact values in float64, and comparison to the bit.

Never ``torch.linalg.vector_norm`` or ``torch._foreach_norm`` of float32 CPU tensors: they are several percent off.
"""

import math
from collections import defaultdict
from fractions import Fraction

import numpy as np
import torch

from fused_reg import reference

# Relative, of the true value: the promises of the docs. The absolute part is the rounding of a subnormal result.
VALUE_TOLERANCE = {torch.float32: Fraction(6, 10**8), torch.float64: Fraction(4, 10**15)}
SUBNORMAL_ROUNDING = {torch.float32: Fraction(1, 2**150), torch.float64: Fraction(1, 2**1075)}

_INTEGER = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
_SLICE = 1 << 20


def per_parameter(strength, count: int) -> list[float]:
    if strength is None:
        return [0.0] * count
    if isinstance(strength, torch.Tensor):
        strength = strength.tolist()
    return [float(s) for s in strength] if hasattr(strength, "__len__") else [float(strength)] * count


def exact_sum(t: torch.Tensor, degree: int) -> Fraction:
    """``sum |w| ** degree`` to 2e-16 relative, whatever the exponents: w is first divided by a power of two."""
    flat = t.detach().cpu().reshape(-1)
    if flat.numel() == 0:
        return Fraction(0)
    exponent = math.frexp(float(flat.abs().max()))[1]
    partial = []
    for begin in range(0, flat.numel(), _SLICE):
        w = np.ldexp(np.abs(flat[begin : begin + _SLICE].double().numpy()), -exponent)
        w = w if degree == 1 else w * w
        partial += w.tolist() if flat.numel() <= _SLICE else [w.sum()]
    return Fraction(math.fsum(partial)) * Fraction(2) ** (degree * exponent)


def exact_norms(t: torch.Tensor, group: str) -> Fraction:
    """The sum of the groups' norms, to 4e-16 relative; each group is first divided by a power of two of its own."""
    if t.numel() == 0:
        return Fraction(0)
    rows = len(t) if group == "row" and t.ndim > 0 else 1
    w = np.abs(t.detach().cpu().double().numpy().reshape(rows, -1))
    exponents = np.frexp(w.max(axis=1))[1]
    w = np.ldexp(w, -exponents[:, None])
    roots = defaultdict(list)
    for exponent, squares in zip(exponents.tolist(), w * w, strict=True):
        roots[exponent].append(math.sqrt(math.fsum(squares.tolist())))
    return sum((Fraction(math.fsum(r)) * Fraction(2) ** exponent for exponent, r in roots.items()), Fraction(0))


def exact_penalty(params, l1=None, l2=None, l2_norm=None, group="tensor") -> Fraction:
    if l1 is None and l2 is None and l2_norm is None:
        l2 = 1.0
    columns = (per_parameter(strength, len(params)) for strength in (l1, l2, l2_norm))
    total = Fraction(0)
    for p, a, b, c in zip(params, *columns, strict=True):
        total += Fraction(a) * exact_sum(p, 1) if a else 0
        total += Fraction(b) * exact_sum(p, 2) if b else 0
        total += Fraction(c) * exact_norms(p, group) if c else 0
    return total


def assert_near(value: torch.Tensor, exact: Fraction) -> None:
    """``value`` is finite and within the promised distance of the true penalty."""
    assert math.isfinite(value.item())
    error = abs(Fraction(value.item()) - exact)
    allowed = VALUE_TOLERANCE[value.dtype] * exact + SUBNORMAL_ROUNDING[value.dtype]
    if error > allowed:
        raise AssertionError(f"{value.item()!r} is not {float(exact)!r}: {float(error / exact):.2g} off")


def assert_value(value: torch.Tensor, params, l1=None, l2=None, l2_norm=None, group="tensor") -> None:
    """The value of this penalty: near the truth, 0-dim, of the right dtype."""
    assert value.shape == ()
    assert value.dtype == (torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32)
    assert_near(value, exact_penalty(params, l1, l2, l2_norm, group))


def bits(t: torch.Tensor) -> bytes:
    """The elements' bits, in logical order."""
    return t.detach().cpu().contiguous().view(_INTEGER[t.dtype]).numpy().tobytes()


def assert_same_bits(actual, expected) -> None:
    """The same bits in every element, the sign of zeros included; any NaN equals any NaN."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        a, e = a.detach().cpu().contiguous(), e.detach().cpu().contiguous()
        integer = _INTEGER[a.dtype]
        wrong = (a.view(integer) != e.view(integer)) & ~(a.isnan() & e.isnan())
        if wrong.any():
            at = int(wrong.reshape(-1).nonzero()[0])
            got, want = a.reshape(-1)[at].item(), e.reshape(-1)[at].item()
            raise AssertionError(
                f"tensor {i}, element {at} of {a.numel()}: {got!r} is not {want!r} ({int(wrong.sum())} wrong)"
            )


def gradients(function, params, upstream=None, **strengths) -> tuple[torch.Tensor, ...]:
    """The gradient of ``function(leaves over params)``; ``upstream`` is a float, taken in the output's dtype."""
    params = [p.detach().requires_grad_() for p in params]
    out = function(params, **strengths)
    if upstream is not None:
        upstream = torch.full((), upstream, dtype=out.dtype, device=out.device)
    return torch.autograd.grad(out, params, upstream, allow_unused=True, materialize_grads=True)


def loop_gradients(params, upstream=None, **strengths) -> tuple[torch.Tensor, ...]:
    """Those of the hand-written loop: the contract, on the CPU, whose bits every device must give."""
    strengths = {name: s.cpu() if isinstance(s, torch.Tensor) else s for name, s in strengths.items()}
    return gradients(reference.loop, [p.detach().cpu() for p in params], upstream, **strengths)


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbours of ``dtype`` at the float64 values ``x``."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(x.abs().clamp(min=info.smallest_normal).numpy())
    return torch.as_tensor(np.ldexp(info.eps, exponent - 1))
