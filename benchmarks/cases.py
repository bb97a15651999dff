"""The kinds of work, and the parameter lists: shapes of real networks, in `cases.json`, as counts and what repeats."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# What bounds a GPU's work, by the call that measures the bandwidth.
READ, COPY, UPDATE, SCALE = "read: x.sum()", "copy: y.copy_(x)", "read-modify-write: y.add_(x)", "scale: x.mul_(a)"


class Mode(NamedTuple):
    """A kind of work."""

    title: str
    passes: int  # the bytes that must be moved at least, per byte of parameter
    grad: str | None = None  # fresh: `.grad` is None, and freed within the time; present: there is one to add to
    roofline: str | None = None


MODES = {
    "value": Mode("value", 1, None, READ),
    "value_and_grad": Mode("value and gradient without autograd", 2, None, COPY),
    "fresh": Mode("forward + backward, .grad None", 2, "fresh", COPY),
    "present": Mode("forward + backward, .grad present", 3, "present", UPDATE),
    "norm_value": Mode("sum of norms, value", 1, None, READ),
    "norm_fresh": Mode("sum of norms, forward + backward", 3, "fresh", UPDATE),  # no gradient before all norms
    "prox": Mode("proximal step", 2, None, SCALE),
    "step": Mode("optimizer step", 3),  # with Adam's moments more
    "compiled_fresh": Mode("compiled training step, .grad None", 2, "fresh"),
    "compiled_present": Mode("compiled training step, .grad present", 3, "present"),
}
NORM_MODES, COMPILED_MODES = ("norm_value", "norm_fresh"), ("compiled_fresh", "compiled_present")

# The spread of the weights: about that of a trained network's.
_WEIGHT_SCALE = 0.05


@dataclass(frozen=True)
class Case:
    """A parameter list: its name on the command line, its title in a table, the shape of every tensor, the dtype."""

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def is_large(self) -> bool:
        """Whether its memory is what it costs: below, it is the calls."""
        return self.elements >= 10_000_000

    def make_params(self, device: str) -> list[Tensor]:
        """The parameters, leaves that require grad, seeded."""
        like = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": self.dtype}
        return [torch.randn(shape, **like).mul_(_WEIGHT_SCALE).requires_grad_() for shape in self.shapes]


def _case(name: str, title: str, shapes: list, dtype: str = "float32", source: str = "") -> Case:
    repeated = [tuple(shape) for count, part in shapes for shape in part * count]
    return Case(name, title, tuple(repeated), getattr(torch, dtype))


_DATA = json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8"))
CASES = {name: _case(name, **case) for name, case in _DATA.items()}

#: The cases that a run measures if it is not told which, by the kind of device.
DEVICE_CASES = {
    "cpu": tuple(name for name in CASES if not name.startswith("tinyllama")),
    "cuda": ("small_tensors", "resnet50", "vit_b16", "one_tensor", "gpt2", "tinyllama_bf16", "tinyllama"),
}
