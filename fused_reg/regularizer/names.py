"""The names of parameters: their places in a module, and patterns, also those that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Module, ModuleDict, ModuleList, Sequential
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

_NAMES_SHOWN = 3
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


class Named:
    """Something with names."""

    names: list[str]

    def matches(self, pattern: str) -> bool:
        return any(fnmatchcase(name, pattern) for name in self.names)


def check_matches(function: str, argument: str, pattern: Any, named: Sequence[Named]) -> None:
    """A pattern that matches nothing is a slip of the pen: the penalty would silently be absent."""
    if not isinstance(pattern, str):
        raise TypeError(f"{function}: {argument} must be a pattern of names, got {type(pattern).__name__}")
    if not any(x.matches(pattern) for x in named):
        raise ValueError(no_match(function, argument, pattern, named))


def no_match(function: str, argument: str, pattern: str, named: Iterable[Named]) -> str:
    names = [name for x in named for name in x.names]
    said = f"{function}: {argument} must match the name of a parameter, got {pattern!r}"
    if all(name.isdigit() for name in names):
        return f"{said}; the names of a list are numbers: pass the model, or pairs (name, tensor)"
    near = next(_near(pattern, names), None)
    if near is not None:
        return f"{said}; did you mean {near!r}?"
    more = ", ..." if len(names) > _NAMES_SHOWN else ""
    return f"{said}; the names are {', '.join(map(repr, names[:_NAMES_SHOWN]))}{more}"


def _near(pattern: str, names: Sequence[str]) -> Iterator[str]:
    """What was meant, the likeliest first: a part of a name, a path, a regular expression, a slip of the pen."""
    dots = pattern.replace("/", ".").strip(".")
    glob = re.sub(r"\\d[+*]?", "[0-9]*", re.sub(r"(?<!\\)\.[*+]", "*", pattern)).replace("\\", "").strip("^$")
    inside = dots.partition(".")[2]  # without the name of the model
    inside = inside if inside.strip("*.") else dots
    around = [x for part in (dots, inside) for x in (part, f"{part}.*", f"*.{part}", f"*.{part}.*")]
    for tried in (*around, f"*{dots.strip('*')}*", glob, f"{glob}*", f"*{glob}"):
        if any(fnmatchcase(name, tried) for name in names):
            yield tried
    parts = {".".join(name.split(".")[:n]) + ".*" for name in names for n in range(1, name.count(".") + 1)}
    yield from get_close_matches(pattern, [*names, *sorted(parts)], n=1, cutoff=0.75)
