"""The examples as modules, and what each needs beyond torch."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = EXAMPLES.parent / "docs"

PACKAGES = {
    "continual": ("matplotlib", "rich", "sklearn"),
    "digits": ("sklearn",),
    "finetune": ("accelerate", "matplotlib", "rich", "sklearn", "transformers"),
    "pat": ("matplotlib", "rich", "sklearn"),
    "path": ("matplotlib", "rich", "sklearn"),
    "prune": ("matplotlib", "rich", "sklearn"),
    "tune": ("matplotlib", "optuna", "rich", "sklearn"),
    "weights": ("matplotlib", "rich", "sklearn", "tensorboard"),
}


def need(example: str) -> None:
    """Skips the test where a package is missing."""
    for package in PACKAGES[example]:
        pytest.importorskip(package, reason=f"examples/{example}.py needs {package} (pip install fused_reg[examples])")


@contextmanager
def loaded(example: str) -> Iterator[ModuleType]:
    """The module; some set the number of threads."""
    need(example)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        patch.setenv("MPLBACKEND", "agg")
        try:
            yield importlib.import_module(example)
        finally:
            torch.set_num_threads(threads)
