"""The kinds of work, and the parameter lists: shapes of real networks, as counts and what repeats. What an
implementation computes of them is compared with float64 before it is timed: a fast wrong answer is no result."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from fused_reg import reference

# passes: the bytes that must be moved at least, per byte of parameter (of an optimizer with moments more); grad: fresh,
# so that `.grad` is None, and freed within the time, or present, to be added to; roofline: the call whose bandwidth
# bounds a GPU; ours: the one of ours that limits bound, and with which a table compares.
_MODES = pd.read_csv(Path(__file__).with_name("modes.csv"), keep_default_na=False)
MODES = {mode.mode: mode for mode in _MODES.itertuples(index=False, name="Mode")}
NORM_MODES, STEP_MODES = ("norm_value", "norm_fresh"), ("step", "attached")
COMPILED_MODES = ("compiled_fresh", "compiled_present")
RELATIVE_MODES = ("relative_grad", "relative_present", "relative_prox")
_WEIGHT_SCALE = 0.05  # about the spread of a trained network's weights

Tensors = Sequence[Tensor]
Strengths = Mapping[str, Any]  # the arguments of `fused_reg.fused_penalty`
# How far from float64: the value, relative; the gradient, of its largest element. None: there is none.
Errors = tuple[float | None, float | None]

# float64 copies of a whole list need gigabytes, so they are made piece by piece. On a CPU pieces that fit into a cache
# are checked three times as fast as larger ones; a GPU has memory, and each piece costs it launches.
PIECES = {"cpu": 1 << 18, "cuda": 1 << 26}

# contract: that of our value. roundings: of what is ours and not promised to the bit. value, elements: beyond them a
# peer does another job. torch's float32 norms on the CPU are up to a half off on the largest lists, with one thread: a
# result, to be shown. A running sum in bfloat16 may lose most of the value, and rounds its gradients several times.
TOLERANCES = {
    torch.float32: {"contract": 6e-8, "roundings": 1e-6, "value": 0.6, "elements": 1e-3},
    torch.bfloat16: {"contract": 6e-8, "roundings": 5e-3, "value": 0.9, "elements": 2e-2},
}


# How a parameter may lie in memory: a function of its shape and of what makes one of a shape.
LAYOUTS: Mapping[str, Callable[..., Tensor]] = {
    "contiguous": lambda make, shape: make(shape),
    "transposed": lambda make, shape: make(shape[::-1]).t(),
    "channels_last": lambda make, shape: make(shape).to(memory_format=torch.channels_last),
    "with gaps": lambda make, shape: make((*shape[:-1], 2 * shape[-1]))[..., : shape[-1]],
}


class Case(NamedTuple):
    """A parameter list: its name on the command line, its title in a table, the shape of every tensor, the dtype, how
    they lie in memory."""

    name: str
    title: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def make_params(self, device: str) -> list[Tensor]:
        """The parameters, leaves that require grad, seeded."""
        like = {"generator": torch.Generator(device).manual_seed(0), "device": device, "dtype": self.dtype}

        def make(shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, **like).mul_(_WEIGHT_SCALE)

        return [LAYOUTS[self.layout](make, shape).requires_grad_() for shape in self.shapes]


CASES = {}
for _name, _data in json.loads(Path(__file__).with_name("cases.json").read_text(encoding="utf-8")).items():
    _shapes = tuple(tuple(shape) for count, part in _data["shapes"] for shape in part * count)
    _dtype, _layout = getattr(torch, _data.get("dtype", "float32")), _data.get("layout", "contiguous")
    CASES[_name] = Case(_name, _data["title"], _shapes, _dtype, _layout)
    if _data.get("also") == "bfloat16":
        _name, _title = f"{_name}_bf16", f"{_data['title']}, bfloat16"
        CASES[_name] = Case(_name, _title, _shapes, torch.bfloat16, _layout)


class WrongResultError(Exception):
    """An implementation does not compute what it is measured for."""


def pieces(*tensors: Tensor, group: str | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding pieces of tensors of one shape; where norms are of groups, each holds whole groups."""
    size, dim = PIECES[tensors[0].device.type], {"row": 0, "column": 1}.get(group, tensors[0].ndim)
    if dim < tensors[0].ndim:
        matrices = [t.detach().movedim(dim, 0).reshape(t.shape[dim], -1) for t in tensors]
        matrices = [m.t() if group == "column" else m for m in matrices]
        each = max(1, size // (tensors[0].numel() // tensors[0].shape[dim]))
        return zip(*(m.split(each, dim) for m in matrices), strict=True)
    return zip(*(t.detach().reshape(-1).split(t.numel() if group else size) for t in tensors), strict=True)


def largest_relative(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between what is and what should be, relative to the largest that should be."""
    errors, sizes = zip(*(((is_ - should).abs().max(), should.abs().max()) for is_, should in pairs), strict=True)
    return (torch.stack(errors).max() / torch.stack(sizes).max()).item()


def demand(tolerance: str, dtype: torch.dtype, error: float, name: str) -> float:
    if not error <= (most := TOLERANCES[dtype][tolerance]):  # NaN is not
        raise WrongResultError(f"{name} error {error:.3g} is above {most:.3g}")
    return error


class Problem:
    """A parameter list, what compiles for it, and how to tell whether an implementation computed its penalty."""

    def __init__(self, params: Tensors, compiler: Any = None) -> None:
        self.params, self.compiler, self._values = params, compiler, {}

    @property
    def device(self) -> str:
        return self.params[0].device.type

    def _value(self, strengths: Strengths) -> float:
        """The penalty in float64: a sum, so that of a list is the sum over its pieces."""
        if (key := str(strengths)) not in self._values:
            parts = (part for p in self.params for (part,) in pieces(p, group=strengths.get("group")))
            penalties = (reference.fused_penalty(part.double(), **strengths) for part in parts)
            self._values[key] = math.fsum(penalty.item() for penalty in penalties)
        return self._values[key]

    def check(
        self, role: str, strengths: Strengths, value: Tensor, grads=None, base=None, is_alone=True, in_one_pass=False
    ) -> Errors:
        """The errors of a penalty and its gradients, if they are within what is demanded of the role. The gradients
        were added to `base`, or are fresh; `is_alone`: in a loss, or else `base` holds to the rounding only;
        `in_one_pass`: a narrow dtype was rounded after the addition only."""
        dtype, is_ours, group = self.params[0].dtype, role == "ours", strengths.get("group")
        error = abs(value.item() / self._value(strengths) - 1)
        demand("contract" if is_ours else "value", dtype, error, "value")
        if grads is None:
            return error, None
        if len(grads) != len(self.params):
            raise WrongResultError(f"{len(grads)} gradients for {len(self.params)} parameters")

        def compared(formula: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
            """Each piece of a gradient with what the formula makes of the parameter's."""
            for tensors in zip(self.params, grads, *([base] if base else []), strict=True):
                for part, grad, *before in pieces(*tensors, group=group):
                    yield grad, sum(before, formula(part))

        def by_loop(part: Tensor) -> Tensor:  # of a narrower dtype: in float32, rounded once
            leaf = part.to(torch.promote_types(part.dtype, torch.float32)).requires_grad_()
            (grad,) = torch.autograd.grad(reference.loop(leaf, **strengths), leaf)
            return grad if in_one_pass else grad.to(part.dtype)

        tolerance = "elements"
        if group:  # a loop's gradient is off by as much as the norm that it divides by
            tolerance = "roundings" if is_ours else "value"
        elif is_ours and is_alone:
            for grad, expected in compared(by_loop):
                if not torch.equal(grad.view(torch.uint8), expected.to(grad.dtype).view(torch.uint8)):
                    raise WrongResultError("a gradient has not the bits of the loop's")
        exact = compared(lambda part: reference.value_and_grad(part.double(), **strengths)[1][0])
        return error, demand(tolerance, dtype, largest_relative(exact), "gradient")
