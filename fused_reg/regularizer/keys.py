"""What chooses parameters: patterns of their names, and types of the modules around them; also what matches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, TypeAlias, TypeGuard

from torch import nn
from torch.nn import Module

_NAMES_SHOWN = 3

#: The type of a module around parameters, or a union: any of these types.
TypeKey: TypeAlias = "type[Module] | UnionType"

#: What chooses parameters: a pattern of names, or a type.
Key: TypeAlias = "str | TypeKey"

#: The type of all normalization layers of torch, and so of their subclasses.
NORMS: Any = (
    nn.modules.batchnorm._NormBase  # of BatchNorm, SyncBatchNorm, InstanceNorm and the lazy ones
    | nn.LayerNorm
    | nn.GroupNorm
    | nn.RMSNorm
    | nn.LocalResponseNorm
    | nn.CrossMapLRN2d
)


def is_type(key: Any) -> TypeGuard[TypeKey]:
    """Whether it is a type of modules, or a union of such."""
    types = key.__args__ if isinstance(key, UnionType) else (key,)
    return all(isinstance(t, type) and issubclass(t, Module) for t in types)


def shown(key: Key) -> str:
    """A key in an error."""
    if isinstance(key, str):
        return repr(key)
    types = key.__args__ if isinstance(key, UnionType) else (key,)
    return "NORMS" if key == NORMS else " | ".join(t.__name__ for t in types)


class Named:
    """Something with names, and the types of the modules around it, innermost first, by the names of its places."""

    names: list[str]
    types: dict[str, tuple[type, ...]]

    def matches(self, key: Key) -> bool:
        if isinstance(key, str):
            return any(fnmatchcase(name, key) for name in self.names)
        return any(issubclass(t, key) for types in self.types.values() for t in types)


#: In errors: what the arguments that choose take.
_TAKEN = {
    "include": "a pattern or a list of them",
    "types": "a type of modules or a list of them",
    "exclude": "a pattern, a type of modules or a list of them",
}


def as_keys(argument: str, given: Any) -> list[Key] | None:
    """A key or several, as a list, checked."""
    if given is None:
        return None
    is_one = isinstance(given, str) or is_type(given) or not isinstance(given, Iterable)
    keys = [given] if is_one else list(given)
    for key in keys:
        is_taken = argument != "types" if isinstance(key, str) else argument != "include" and is_type(key)
        if not is_taken:
            hint = "; types= takes it" if is_type(key) else ""
            raise TypeError(f"Regularizer: {argument} must be {_TAKEN[argument]}, got {_described(key)}{hint}")
    return keys


def _described(key: Any) -> str:
    """What is no key."""
    if isinstance(key, str):
        return repr(key)
    if isinstance(key, type) or is_type(key):
        return f"the type {shown(key)}"
    return f"an instance of {type(key).__name__}" if isinstance(key, Module) else type(key).__name__


def check_matches(function: str, argument: str, key: Any, named: Sequence[Named]) -> None:
    """A key that matches nothing is a slip of the pen: the penalty would silently be absent."""
    if not isinstance(key, str) and not is_type(key):
        raise TypeError(
            f"{function}: {argument} must be a pattern of names or a type of modules, got {type(key).__name__}"
        )
    if not any(x.matches(key) for x in named):
        missing = _no_name(key, named) if isinstance(key, str) else _no_type(key, named)
        raise ValueError(f"{function}: {argument} must match {missing}")


def _no_type(key: TypeKey, named: Iterable[Named]) -> str:
    said = f"a module that has parameters, got {shown(key)}"
    innermost = dict.fromkeys(types[0].__name__ for x in named for types in x.types.values())
    if not innermost:
        return f"{said}; a list has no modules: pass the model"
    return f"{said}; there are {_listed(list(innermost))}"


def _no_name(pattern: str, named: Iterable[Named]) -> str:
    names = [name for x in named for name in x.names]
    said = f"the name of a parameter, got {pattern!r}"
    if all(name.isdigit() for name in names):
        return f"{said}; the names of a list are numbers: pass the model, or pairs (name, tensor)"
    near = next(_near(pattern, names), None)
    if near is not None:
        return f"{said}; did you mean {near!r}?"
    return f"{said}; the names are {_listed(list(map(repr, names)))}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join([*names[:_NAMES_SHOWN], *["..."] * (len(names) > _NAMES_SHOWN)])


def _near(pattern: str, names: Sequence[str]) -> Iterator[str]:
    """What was meant, the likeliest first: a part of a name, a path, a regular expression, a slip of the pen."""
    dots = pattern.replace("/", ".").strip(".")
    glob = re.sub(r"\\d[+*]?", "[0-9]*", re.sub(r"(?<!\\)\.[*+]", "*", pattern)).replace("\\", "").strip("^$")
    inside = dots.partition(".")[2]  # without the name of the model
    inside = inside if inside.strip("*.") else dots
    around = [x for part in (dots, inside) for x in (part, f"{part}.*", f"*.{part}", f"*.{part}.*")]
    for tried in () if not dots else (*around, f"*{dots.strip('*')}*", glob, f"{glob}*", f"*{glob}"):
        if any(fnmatchcase(name, tried) for name in names):
            yield tried
    parts = {".".join(name.split(".")[:n]) + ".*" for name in names for n in range(1, name.count(".") + 1)}
    yield from get_close_matches(pattern, [*names, *sorted(parts)], n=1, cutoff=0.75)
