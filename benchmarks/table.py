"""Prints every row of a run on the terminal: ``python -m benchmarks.table results.json``."""

import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.markdown import every_row
from benchmarks.results import Results

_WIDTH = 180  # where there is no terminal to ask


def show(results: Results) -> None:
    """Every row, the memory and the targets."""
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(
        Markdown("\n\n".join(filter(None, every_row(results))))
    )


if __name__ == "__main__":
    show(Results.read(Path(sys.argv[1])))
