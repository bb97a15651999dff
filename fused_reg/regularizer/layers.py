"""Which slices of a layer's parameters are its outputs and its inputs, for groups that are named after these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn
from torch.nn import Module

from fused_reg._terms import Group


class Slices(NamedTuple):
    """The groups that are a layer's outputs, and its inputs. ``runs``: columns are of each of so many runs of rows."""

    output: Group
    input: Group
    runs: int = 1


_MATRIX = Slices("row", "column")
_TRANSPOSED = Slices("column", "row")


def slices_of(modules: Sequence[Module], dims: int) -> Slices | None:
    """Of a parameter of so many dimensions in the first of these modules that is known. A parameter of one dimension
    has an element for each output, in every layer. None: the layers are unknown."""
    if dims < 2:
        return _MATRIX
    return next((found for module in modules if (found := _slices_in(module)) is not None), None)


def _slices_in(module: Module) -> Slices | None:
    if isinstance(module, nn.modules.conv._ConvNd):
        return _slices_of_convolution(module)
    if isinstance(module, nn.Linear | nn.MultiheadAttention):
        return _MATRIX
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) or _is_transposed_linear(module):
        return _TRANSPOSED
    return None


def _slices_of_convolution(module: nn.modules.conv._ConvNd) -> Slices:
    """Its weight has the outputs of all ``groups`` in dimension 0 and the inputs of one in dimension 1; of a transposed
    convolution it is the other way round."""
    within: Group = "column"
    rows, others, runs = module.out_channels, module.in_channels, module.groups
    if module.transposed:
        rows, others = others, rows
    if 1 < runs == others:  # depthwise: the rows of a group are all that its one channel has
        within, runs = ("row", rows // runs), 1
    return Slices(within, "row", runs) if module.transposed else Slices("row", within, runs)


def _is_transposed_linear(module: Module) -> bool:
    """Whether it is the Conv1D of the package transformers, whose weight is [inputs, outputs]."""
    return any(t.__name__ == "Conv1D" and t.__module__.startswith("transformers.") for t in type(module).__mro__)
