"""What the examples share: the packages that they need, the folder that they write to, progress, and results."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def extras() -> Iterator[None]:
    """Around the imports of what does not come with torch: a missing package ends the example with one sentence."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "a package").partition(".")[0].replace("sklearn", "scikit-learn")
        raise SystemExit(f"{Path(sys.argv[0]).name}: needs {package}; run pip install 'fused_reg[examples]'") from None


def parser(description: str, name: str, seeds: int = 5) -> argparse.ArgumentParser:
    """The options that every example has: --quick, --seeds and --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short form of everything, in seconds")
    parser.add_argument("--seeds", type=positive, default=seeds, help=f"how many seeds (default: {seeds})")
    parser.add_argument("--out", type=Path, default=Path("out") / name, help=f"a folder (default: out/{name})")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def prepare(folder: Path) -> Path:
    """Makes the folder, and ends the example with one sentence if nothing can be written there: before the training,
    not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: cannot write to {folder}: {error.strerror}") from None
    return folder


def spread(numbers: Sequence[float], digits: int = 4) -> str:
    """Mean and standard deviation (of a sample) of the results over seeds."""
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.{digits}f} ± {deviation:.{digits}f}"


def save_results(folder: Path, name: str, results: dict[str, Any]) -> Path:
    """The numbers behind the pictures, in a file beside them."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    return path


def save_picture(figure: Any, folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=150)
    return path
