"""Patterns of names, and what is said of one that matches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

_NAMES_SHOWN = 3


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
