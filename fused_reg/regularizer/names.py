"""The places of parameters in a module, and their names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Sequential
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

_BIAS = re.compile(r"(^|_)bias(_|$)")
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\d*$")

# What pruning and `torch.nn.utils.weight_norm` append to the name of a parameter, when they compute that of others.
_SUFFIXES = ("_orig", "_g", "_v")


class Place(NamedTuple):
    """Where a parameter is."""

    module: Module
    key: str
    param: Tensor
    path: str  # of the module, without the parts of wrappers
    full_path: str
    around: tuple[tuple[Module, bool], ...]  # innermost first; whether the parameter is of that very module

    @property
    def name(self) -> str:
        return self.path + self.key

    @property
    def full_name(self) -> str:
        """As in ``named_parameters``."""
        return self.full_path + self.key

    @property
    def plain_names(self) -> list[str]:
        """The names of the parameter that is computed from this one: ``weight`` for ``weight_orig``."""
        found = [
            self.path + stem
            for suffix in _SUFFIXES
            if (stem := self.key.removesuffix(suffix)) != self.key and isinstance(vars(self.module).get(stem), Tensor)
        ]
        return [*found, _PARAMETRIZED.sub(r"\1\2", self.name)]


def walk(
    module: Module, path: str = "", full_path: str = "", around: tuple[tuple[Module, bool], ...] = ()
) -> Iterator[Place]:
    """In the order of ``named_parameters``, tied ones at each of their places."""
    around = ((module, True), *around)
    for key, param in module._parameters.items():
        if param is not None:
            yield Place(module, key, param, path, full_path, around)
    wraps = _is_wrapper(module)
    for key, child in module._modules.items():
        if child is not None:
            same = wraps or key == "parametrizations" or isinstance(child, ParametrizationList)
            outer = around if same else tuple((m, False) for m, _ in around)
            yield from walk(child, path if wraps else f"{path}{key}.", f"{full_path}{key}.", outer)


def names_beside(module: Module, path: str = "", full_path: str = "") -> Iterator[str]:
    """What a state dict of the module may have beside parameters, with the parts of wrappers and without."""
    for key in (*module._buffers, "_extra_state"):
        yield path + key
        yield full_path + key
    for key, child in module._modules.items():
        if child is not None:
            yield from names_beside(child, path if _is_wrapper(module) else f"{path}{key}.", f"{full_path}{key}.")


def _is_wrapper(module: Module) -> bool:
    """Whether it has nothing but another module's parameters, under a name that says so: ``module``, ``_orig_mod``.
    Such a name is no part of a parameter's."""
    children = {key: child for key, child in module._modules.items() if child is not None}
    if isinstance(module, Sequential | ModuleList | ModuleDict) or not children:
        return False
    if not all(key.startswith("_") or key == "module" for key in children) or any(
        p is not None for p in module._parameters.values()
    ):
        return False
    first, *others = ({id(p) for p in child.parameters()} for child in children.values())
    return all(other <= first for other in others)


def dims(param: Tensor) -> int:
    """Its dimensions; of one that a lazy module has not made yet, those of a weight."""
    return 2 if isinstance(param, UninitializedParameter) else param.ndim


def is_bias(name: str) -> bool:
    """Whether the name says bias: ``bias``, ``in_proj_bias``, ``bias_ih_l0``, ``parametrizations.bias.original``."""
    parts = name.split(".")
    own = parts[parts.index("parametrizations") + 1] if "parametrizations" in parts[:-1] else parts[-1]
    return _BIAS.search(own) is not None
