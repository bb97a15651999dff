"""Iterators serve once: what gives nothing, because something else has read it, would be no penalty at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from inspect import GEN_CREATED, getgeneratorstate
from types import GeneratorType
from typing import Any, TypeVar

from torch.compiler import is_compiling

_T = TypeVar("_T")

_LIST_ITERATORS: tuple[type, ...] = (type(iter([])), type(iter(())))


def read(function: str, items: Iterable[_T]) -> list[_T]:
    """All of them. What is empty by itself is an empty list."""
    if type(items) is list or is_compiling() or not hasattr(items, "__next__"):
        return list(items)
    begun = _is_begun(items)
    if begun == _AT_END:
        raise ValueError(
            f"{function}: params must not have been read before, got a {type(items).__name__} that something else has "
            "read; keep a list, or call `.parameters()` each time"
        )
    found = list(items)
    if begun and not found:
        warnings.warn(
            f"{function}: params gave no parameter, and the penalty is 0; an iterator that something else has read is "
            "empty, so keep a list",
            stacklevel=4,
        )
    return found


_AT_END = 2


def _is_begun(iterator: Any) -> int:
    """Whether an iterator may have been read before, or surely to its end: generators know, as `Module.parameters()` is
    one, and those of lists and tuples do."""
    if isinstance(iterator, GeneratorType):
        if iterator.gi_frame is None:
            return _AT_END
        reads_another = iterator.gi_code.co_name == "<genexpr>"
        return reads_another or getgeneratorstate(iterator) != GEN_CREATED
    if isinstance(iterator, _LIST_ITERATORS):
        index: Any = iterator.__reduce__()[2:]
        return index != (0,) if index else _AT_END
    return True
