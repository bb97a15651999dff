"""Thousands of seeded lists, and the hashes of what is computed of them: ``golden.csv``, which test_golden.py holds.

``PYTHONPATH=tests python -m golden`` writes the file anew. A change of it is a change of what users get, and a line in
the CHANGELOG.
"""

import csv
import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from oracle import bits, gradients
from samples import CHUNK, DTYPES, leaves
from samples import numbers as as_given

from fused_reg import Regularizer, _ops, accumulate_grad_, fused_penalty, prox_, value_and_grad

FILE = Path(__file__).with_name("golden.csv")
KINDS = ("value", "gradient", "accumulated", "proximal step", "norms", "report")
SMOOTH = 512  # the blocks of 0.1; from here on, lists have smooth_l1, too,
CONCAVE = SMOOTH + 32  # and from here on mcp or scad, or proximal steps with constraints
BLOCKS = CONCAVE + 32  # lines of the file
LISTS = 8  # of each

_SMALL = ((), (0,), (1,), (3,), (17,), (64,), (257,), (5, 7), (0, 4), (9, 64), (33, 65), (1, 3000), (3000, 1))
_SHAPES = (*_SMALL, (6, 5, 3, 3))
_LARGE = ((CHUNK,), (CHUNK + 1,), (2 * CHUNK + 77,), (211, 300), (3, CHUNK + 5))
# Exponents of two between which the magnitudes of each dtype lie: ordinary, small, large, everywhere.
_EXPONENTS = {
    torch.float32: ((-2, 2), (-149, -120), (90, 127), (-149, 127)),
    torch.float64: ((-2, 2), (-1074, -900), (700, 1023), (-1074, 1023)),
    torch.bfloat16: ((-2, 2), (-133, -120), (90, 127), (-133, 127)),
    torch.float16: ((-2, 2), (-24, -12), (10, 15), (-24, 15)),
}
_SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0)


class Draw:
    """One list and all that is done with it. The numbers are from bits alone, by operations that are exact: another
    machine, another libm, another NumPy and another torch draw the same."""

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.rng = np.random.RandomState(seed)  # whose stream NumPy keeps
        self.device = device
        dtype = self.one_of((*DTYPES, None))
        count = self.rng.randint(1, 7)
        self.params = [self.tensor(dtype or self.one_of(DTYPES)) for _ in range(count)]
        self.strengths = self.some_strengths()
        self.grads = [self.like(p) if self.rng.randint(2) else None for p in self.params]
        self.scale, self.step = self.positive(), self.strength()
        if seed >= SMOOTH * LISTS:
            self.strengths["smooth_l1"] = self.strength()
            self.strengths |= {"beta": self.strength()} if self.rng.randint(4) else {}
        self.constraints = {}
        if seed >= CONCAVE * LISTS:
            self.add_concave()

    def one_of(self, items):
        return items[self.rng.randint(len(items))]

    def tensor(self, dtype: torch.dtype) -> torch.Tensor:
        shape = self.one_of(_LARGE if self.rng.randint(24) == 0 else _SHAPES)
        return self.laid_out(self.numbers(math.prod(shape), dtype).to(self.device).reshape(shape))

    def numbers(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        low, high = self.one_of(_EXPONENTS[dtype][: self.one_of((1, 4))])
        fractions = self.rng.randint(-(1 << 31), 1 << 31, count, np.int64) / float(1 << 31)
        numbers = np.ldexp(fractions, self.rng.randint(low, high + 1, count))
        for place in self.rng.randint(0, max(count, 1), self.one_of((0, 0, 3)) if count else 0):
            numbers[place] = self.one_of(_SPECIAL[: self.one_of((2, 7))])
        return torch.from_numpy(np.asarray(numbers)).to(dtype)

    def laid_out(self, t: torch.Tensor) -> torch.Tensor:
        layout = self.rng.randint(6)
        if layout == 0 and t.dim() > 1:
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == 1 and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if layout == 2 and t.dim() > 0:  # every second element
            return torch.stack([t, t], dim=-1)[..., 0]
        if layout == 3:  # where no vector load is aligned
            return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].reshape(t.shape)
        return t

    def like(self, p: torch.Tensor) -> torch.Tensor:
        dtype = p.dtype if self.rng.randint(4) else self.one_of(DTYPES)
        return self.laid_out(self.numbers(p.numel(), dtype).to(self.device).reshape(p.shape))

    def positive(self) -> float:
        return math.ldexp(self.rng.randint(1, 1 << 24), self.rng.randint(-34, -20))

    def strength(self):
        """A number, a tensor of one, or one each, some of them 0."""
        each = [self.positive() * self.rng.randint(0, 3) for _ in self.params]
        as_tensor = torch.float64 if self.rng.randint(2) else torch.float32
        kind = self.rng.randint(5)
        if kind < 2:
            return self.positive()
        return (torch.tensor(each[0], dtype=as_tensor), torch.tensor(each, dtype=as_tensor), each)[kind - 2]

    def some_strengths(self) -> dict:
        given = {kind: self.strength() for kind in ("l1", "l2", "l2_norm") if self.rng.randint(5) < 3}
        return given | {"group": self.one_of(("tensor", "row"))} if "l2_norm" in given else given

    def add_concave(self) -> None:
        kind, number = self.one_of(("mcp", "scad", "box", "max_norm")), self.positive()
        if kind == "box":
            self.constraints = {"lower": self.one_of((0.0, -number, -math.inf)), "upper": number}
        elif kind == "max_norm":
            self.constraints = {"max_norm": number, "group": self.one_of(("tensor", "row", "column"))}
        else:
            shape, bound = {"mcp": ("mcp_gamma", 1.5), "scad": ("scad_a", 2.5)}[kind]
            self.strengths |= {kind: self.strength()} | ({shape: bound + number} if self.rng.randint(2) else {})

    def shrunk(self) -> dict:
        """The arguments of a proximal step, without what has none together."""
        left = dict(self.strengths)
        if left.keys() & {"mcp", "scad"} or "max_norm" in self.constraints:
            for key in ("smooth_l1", "beta"):
                left.pop(key, None)
        if left.keys() & {"mcp", "scad", "smooth_l1"} or "lower" in self.constraints:
            for key in ("l2_norm", "group"):
                left.pop(key, None)
        return left | self.constraints

    def results(self) -> dict[str, list[torch.Tensor]]:
        """By kind, what is computed."""
        params, strengths = self.params, self.strengths
        value, grads = value_and_grad(params, **strengths)
        trained, stepped = leaves([p.clone() for p in params]), [p.clone() for p in params]
        for p, grad in zip(trained, self.grads, strict=True):
            p.grad_dtype = None  # any
            p.grad = None if grad is None else grad.clone()
        accumulated = accumulate_grad_(trained, **strengths, scale=self.scale)
        prox_(stepped, **self.shrunk(), step=self.step)
        with torch.no_grad():
            values = [value, fused_penalty(params, **strengths)]
        return {
            "value": values,
            "gradient": [*grads, *gradients(fused_penalty, params, self.scale, **strengths)],
            "accumulated": [accumulated, *(p.grad for p in trained)],
            "proximal step": stepped,
            "norms": [_ops.norms(params, *as_given(group=group)) for group in ("tensor", "row")],
            "report": self.report(),
        }

    def report(self) -> list[torch.Tensor]:
        numbers = {k: s for k, s in self.strengths.items() if isinstance(s, float) or k == "group"}
        for term, shape in (("smooth_l1", "beta"), ("mcp", "mcp_gamma"), ("scad", "scad_a")):
            if term not in numbers:
                numbers.pop(shape, None)
        if not numbers.keys() & {"l1", "l2", "l2_norm", "smooth_l1", "mcp", "scad"}:
            numbers = {"l2": 1.0}
        if "l2_norm" not in numbers:
            numbers.pop("group", None)
        rows = Regularizer(leaves(self.params), **numbers).report().rows
        kinds = ("elements", "value", "norm", "zeros", "slices", "zero_slices")
        return [torch.tensor([float(row.get(kind, 0)) for kind in kinds], dtype=torch.float64) for row in rows]


def _digest(tensors) -> bytes:
    """Of the bits; any NaN is the same NaN, whose sign is the instruction's."""
    return hashlib.sha256(b"".join(bits(t.detach().masked_fill(t.isnan(), math.nan)) for t in tensors)).digest()


def hashes(block: int, device: torch.device | str = "cpu") -> list[str]:
    """One for each kind, of the lists of a block."""
    results = [Draw(seed, device).results() for seed in range(block * LISTS, (block + 1) * LISTS)]
    return [hashlib.sha256(b"".join(_digest(r[kind]) for r in results)).hexdigest()[:8] for kind in KINDS]


def recorded() -> list[list[str]]:
    with FILE.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == KINDS
    return lines


if __name__ == "__main__":
    with FILE.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([KINDS, *map(hashes, range(BLOCKS))])
