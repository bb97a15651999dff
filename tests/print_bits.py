"""Prints the bits of values and gradients over all dtypes, terms and passes, as JSON; run by test_bits.py."""

import hashlib
import json
import math

import torch
from oracle import bits, gradients
from samples import CHUNK, DTYPES, draw

from fused_reg import _ops, fused_penalty, value_and_grad

SIZES = (1, 5, 31, 257, CHUNK + 3, CHUNK, 2 * CHUNK + 77)
STRENGTHS = (
    {"l1": 0.1},
    {"l2": 1 / 3},
    {"l1": 0.1, "l2": 1 / 3},
    {"l1": [0.0, 0.1, 0.2, 0.3, 1e-9, 7.0, 0.0], "l2": 1e-3},
)


def _digest(tensors) -> str:
    return hashlib.sha256(b"".join(bits(t) for t in tensors)).hexdigest()


def contents(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    ordinary = [draw(n, dtype, seed=i) for i, n in enumerate(SIZES)]
    info = torch.finfo(dtype)
    edges = torch.tensor(
        [0.0, -0.0, info.tiny, -info.tiny / 4, info.smallest_normal * info.eps, info.max, -info.max / 3, 1.0],
        dtype=torch.float64,
    )
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -0.0], dtype=torch.float64)
    return {
        "ordinary": ordinary,
        "subnormal": [w * info.smallest_normal for w in ordinary],
        "edges": [edges.repeat(n)[:n].to(dtype) for n in SIZES],
        "special": [special.repeat(n)[:n].to(dtype) for n in SIZES],
    }


def all_bits() -> dict[str, str]:
    out = {}
    for dtype in DTYPES:
        for name, params in contents(dtype).items():
            for i, strengths in enumerate(STRENGTHS):
                case = f"{dtype} {name} {i}"
                value, grads = value_and_grad(params, **strengths)
                out[f"{case} value"] = bits(fused_penalty(params, **strengths)).hex()
                out[f"{case} value with gradient"] = bits(value).hex()
                out[f"{case} gradient"] = _digest(grads)
                out[f"{case} gradient for 0.37"] = _digest(gradients(fused_penalty, params, 0.37, **strengths))
    return out


if __name__ == "__main__":
    print(json.dumps({"capability": _ops.library.build_info()["cpu_capability"], "bits": all_bits()}))
