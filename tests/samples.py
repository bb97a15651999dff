"""What all tests draw from: dtypes, shapes, values, strengths, upstream gradients and layouts.

Values are random and depend on the position: constants would hide a wrong index. They come from NumPy, because
torch's own generator draws other numbers with other instruction sets.
"""

import math

import numpy as np
import pytest
import torch

from fused_reg._terms import GROUPS, Strengths

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL_DTYPES = (torch.float32, torch.float64)  # gradients have the loop's bits
HALF_DTYPES = (torch.bfloat16, torch.float16)  # gradients are rounded once

CHUNK = 16384  # elements: kChunkSize of csrc/summation.h
SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 255, 256, 257, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1)

# A small model's list: 0-dim, empty tensors, tails of every kind, more than one chunk.
SHAPES = ((), (0,), (3,), (17,), (5, 7), (0, 4), (257,), (64, 3, 3, 3), (CHUNK + 1,), (211, 300), (1,))

_DOUBLES = np.random.default_rng(7).uniform(0, 2, len(SHAPES)).tolist()
STRENGTHS = {
    "plain": {},
    "l1": {"l1": 0.0123456789},
    "l2": {"l2": 1.7654321e-3},
    "both": {"l1": 0.1, "l2": 1 / 3},
    "odd doubles": {"l1": math.pi * 1e-4, "l2": math.e * 1e-2},
    "zero l1": {"l1": 0.0, "l2": 0.3},
    "zero l2": {"l1": 0.7, "l2": 0.0},
    "int": {"l1": 2, "l2": 3},
    "tiny and large": {"l1": 1e-30, "l2": 12345.678},
    "per parameter": {"l1": _DOUBLES, "l2": _DOUBLES[::-1]},
    "per parameter, some zero": {
        "l1": [x * (i % 2) for i, x in enumerate(_DOUBLES)],
        "l2": [x * (i % 3 > 0) for i, x in enumerate(_DOUBLES)],
    },
    "one for all and per parameter": {"l1": 0.01, "l2": _DOUBLES},
}

UPSTREAMS = (1.0, 2.0, 0.0, -0.0, -2.0, 0.37, 1 / 3, -1e-30, 65536.0, math.inf, -math.inf, math.nan)


def numbers(l1=(), l2=(), l2_norm=(), step=(), group=None) -> Strengths:
    """As the operators take them."""
    return Strengths.of((l1, l2, l2_norm, step), GROUPS[group])


def first_quick(*values) -> list:
    """Values of a parameter: all but the first only repeat what it proves, and are for ``--long``."""
    return [values[0], *(pytest.param(value, marks=pytest.mark.long) for value in values[1:])]


def draw(shape, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    """Standard normal, with some zeros of both signs."""
    shape = (shape,) if isinstance(shape, int) else shape
    values = np.random.default_rng((seed, *shape)).standard_normal(math.prod(shape))
    values[3::97] = 0.0
    values[5::101] = -0.0
    return torch.from_numpy(values).reshape(shape).to(device, dtype)


def draw_list(dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[torch.Tensor]:
    return [draw(shape, dtype, device, seed) for seed, shape in enumerate(shapes)]


def mixed_list(device="cpu", shapes=SHAPES) -> list[torch.Tensor]:
    """Every dtype in turn."""
    return [draw(shape, DTYPES[i % 4], device, i) for i, shape in enumerate(shapes)]


def leaves(params) -> list[torch.Tensor]:
    """Leaves that require grad, over the same memory."""
    return [p.detach().requires_grad_() for p in params]


def _range(n: int, lowest: float, highest: float) -> torch.Tensor:
    """Both signs, exponents (base 10) uniform between the two."""
    rng = np.random.default_rng(n)
    return torch.from_numpy(10.0 ** rng.uniform(lowest, highest, n) * rng.choice([-1.0, 1.0], n))


def _around(n: int, x: float) -> torch.Tensor:
    return x * torch.from_numpy(np.random.default_rng(n).uniform(-1, 1, n))


# Contents on which sums go wrong, each with strengths for which the penalty fits float32:
# name, dtypes, n -> float64 values, l1, l2
CONTENTS = (
    ("0.1 everywhere", DTYPES, lambda n: torch.full((n,), 0.1, dtype=torch.float64), 0.3, 0.7),
    ("around 1e20", (*FULL_DTYPES, torch.bfloat16), lambda n: _around(n, 1e20), 1e-3, 1e-25),
    ("around 1e-20", (*FULL_DTYPES, torch.bfloat16), lambda n: _around(n, 1e-20), 1.0, 1e20),
    ("around 65504", DTYPES, lambda n: _around(n, 65504), 1.0, 1.0),
    ("float16 subnormals", DTYPES, lambda n: _around(n, 6e-5), 1.0, 1e5),
    ("float32 subnormals", (*FULL_DTYPES, torch.bfloat16), lambda n: _around(n, 1e-38), 1e9, 1e46),
    ("float32 range", (*FULL_DTYPES, torch.bfloat16), lambda n: _range(n, -44, 38), 1e-20, 1e-60),
    ("float32 range, small strengths", (torch.float32,), lambda n: _range(n, -44, 18), 1e-30, 1e-50),
    ("float64 range", (torch.float64,), lambda n: _range(n, -150, 150), 1e-40, 1e-30),
    ("one large, the rest small", DTYPES, lambda n: _around(n, 1e-3).index_fill_(0, torch.tensor(n // 2), 3e4), 1, 1),
    ("falling", DTYPES, lambda n: 1e3 / torch.arange(1, n + 1, dtype=torch.float64), 0.5, 0.25),
)


def _view(t: torch.Tensor, *shape: int) -> torch.Tensor:
    return t.reshape(shape)


# name -> (is dense: the gradient has the parameter's strides; dtype, device -> parameter)
LAYOUTS = {
    "contiguous": (True, lambda **k: draw((19, 33), **k)),
    "transposed": (True, lambda **k: draw((211, 300), **k).t()),
    "channels_last": (True, lambda **k: draw((6, 5, 4, 3), **k).to(memory_format=torch.channels_last)),
    "channels_last_3d": (True, lambda **k: draw((2, 5, 4, 3, 3), **k).to(memory_format=torch.channels_last_3d)),
    "permuted": (True, lambda **k: draw((3, 4, 5, 6), **k).permute(2, 0, 3, 1)),
    "size 1 with any stride": (True, lambda **k: draw((7, 5), **k).as_strided((7, 1, 5), (5, 99, 1))),
    "row of a matrix": (True, lambda **k: draw((9, 70), **k)[4]),
    "transposed block of rows": (True, lambda **k: draw((90, 70), **k)[3:77].t()),
    "empty and transposed": (True, lambda **k: draw((0, 5), **k).t()),
    "every second column": (False, lambda **k: draw((31, 46), **k)[:, ::2]),
    "every third row": (False, lambda **k: draw((31, 46), **k)[1::3]),
    "block": (False, lambda **k: draw((300, 211), **k)[5:290, 7:200]),
    "block of long rows": (False, lambda **k: draw((70, 900), **k)[3:69, 5:805]),
    "block of long rows in matrices": (False, lambda **k: draw((5, 9, 700), **k)[:, 2:8, :600]),
    "diagonal": (False, lambda **k: draw((40, 40), **k).diagonal()),
    "expanded scalar": (False, lambda **k: draw((), **k).expand(7, 3)),
    "expanded rows": (False, lambda **k: draw((33,), **k).expand(5, 33)),
    "expanded columns": (False, lambda **k: draw((33, 1), **k).expand(33, 600)),
    "overlapping windows": (False, lambda **k: draw((60,), **k).as_strided((20, 8), (2, 1))),
}


def many(count, device="cpu", seed=0) -> list[torch.Tensor]:
    """Small tensors of 0 to 9 elements, most of them at odd addresses."""
    sizes = [i * 7 % 10 for i in range(count)]
    return list(draw(sum(sizes), device=device, seed=seed).split(sizes))


def one_each(count) -> list[float]:
    """A strength per parameter, some of them 0."""
    return (np.random.default_rng(count).integers(0, 1000, count) / 1000 * (np.arange(count) % 7 > 0)).tolist()
