"""Prints the bits of values and gradients over all dtypes, terms and passes, as JSON; run by test_bits.py."""

import hashlib
import json
import math

import torch
from oracle import bits, gradients
from samples import CHUNK, DTYPES, draw, leaves

from fused_reg import _ops, accumulate_grad_, fused_penalty, prox_, value_and_grad

SIZES = (1, 5, 31, 257, CHUNK + 3, CHUNK, 2 * CHUNK + 77)
STRENGTHS = (
    {"l1": 0.1},
    {"l2": 1 / 3},
    {"l1": 0.1, "l2": 1 / 3},
    {"l1": [0.0, 0.1, 0.2, 0.3, 1e-9, 7.0, 0.0], "l2": 1e-3},
    {"l2_norm": 0.3},
    {"l1": 0.1, "l2": 1e-3, "l2_norm": [0.5, 0.1, 0.2, 0.0, 1e-9, 7.0, 1.0], "group": "row"},
)
RESULTS = 6  # for each dtype, content and strengths


def _digest(tensors) -> str:
    """Of the bits; any NaN is the same NaN, whose sign is the instruction's."""
    return hashlib.sha256(b"".join(bits(t.detach().masked_fill(t.isnan(), math.nan)) for t in tensors)).hexdigest()


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


def _accumulated(params, **strengths) -> list[torch.Tensor]:
    """The value and gradients, every second of which was there before."""
    trained = leaves(params)
    for i, p in enumerate(trained[::2]):
        p.grad = draw(p.shape, p.dtype, seed=60 + i)
    value = accumulate_grad_(trained, **strengths, scale=0.37)
    return [value, *(p.grad for p in trained)]


def _stepped(params, **strengths) -> list[torch.Tensor]:
    copies = [p.clone() for p in params]
    prox_(copies, **strengths, step=0.9)
    return copies


def all_bits() -> dict[str, str]:
    out = {}
    for dtype in DTYPES:
        for name, vectors in contents(dtype).items():
            for i, strengths in enumerate(STRENGTHS):
                # Rows: five of each size, as far as they go.
                in_rows = [w[: len(w) // 5 * 5].reshape(5, len(w) // 5) for w in vectors]
                params = in_rows if strengths.get("group") == "row" else vectors
                case = f"{dtype} {name} {i}"
                value, grads = value_and_grad(params, **strengths)
                out[f"{case} value"] = bits(fused_penalty(params, **strengths)).hex()
                out[f"{case} value with gradient"] = bits(value).hex()
                out[f"{case} gradient"] = _digest(grads)
                out[f"{case} gradient for 0.37"] = _digest(gradients(fused_penalty, params, 0.37, **strengths))
                out[f"{case} accumulated"] = _digest(_accumulated(params, **strengths))
                out[f"{case} proximal step"] = _digest(_stepped(params, **strengths))
    return out


if __name__ == "__main__":
    print(json.dumps({"capability": _ops.library.build_info()["cpu_capability"], "bits": all_bits()}))
