"""The kinds of work, and the parameter lists: shapes of real networks, as counts and what repeats."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

# passes: the bytes that must be moved at least, per byte of parameter (of an optimizer with moments more); grad: fresh,
# so that `.grad` is None, and freed within the time, or present, to be added to; roofline: the call whose bandwidth
# bounds a GPU; ours: the one of ours that limits bound, and with which a table compares.
_MODES = pd.read_csv(Path(__file__).with_name("modes.csv"), keep_default_na=False)
MODES = {mode.mode: mode for mode in _MODES.itertuples(index=False, name="Mode")}
NORM_MODES, COMPILED_MODES = ("norm_value", "norm_fresh"), ("compiled_fresh", "compiled_present")
_WEIGHT_SCALE = 0.05  # about the spread of a trained network's weights


class Case(NamedTuple):
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

    def make_params(self, device: str) -> list[Tensor]:
        """The parameters, leaves that require grad, seeded."""
        like = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": self.dtype}
        return [torch.randn(shape, **like).mul_(_WEIGHT_SCALE).requires_grad_() for shape in self.shapes]


CASES = {}
for _name, _data in json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8")).items():
    _shapes = tuple(tuple(shape) for count, part in _data["shapes"] for shape in part * count)
    CASES[_name] = Case(_name, _data["title"], _shapes, getattr(torch, _data.get("dtype", "float32")))
