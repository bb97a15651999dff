"""What the run is doing and how much is left: a bar on a terminal, a line per item elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_Item = TypeVar("_Item")


def shown(items: Iterable[_Item]) -> Iterator[_Item]:
    """The items, each named by its `str` while it is worked on."""
    work = list(items)
    console = Console(stderr=True)
    return _bar(work, console) if console.is_terminal else _lines(work)


def _bar(work: list[_Item], console: Console) -> Iterator[_Item]:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(work))
        for item in work:
            progress.update(task, description=str(item))
            yield item
            progress.advance(task)


def _lines(work: list[_Item]) -> Iterator[_Item]:
    start = perf_counter()
    for i, item in enumerate(work):
        print(f"[{i + 1}/{len(work)}] {perf_counter() - start:5.0f} s  {item}", file=sys.stderr, flush=True)
        yield item
