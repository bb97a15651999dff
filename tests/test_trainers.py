"""The examples of trainers run, each in a process of its own, and find the plain loop's weights."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "lightning_callback": ("lightning",),
    "huggingface_trainer": ("transformers", "accelerate"),
}


def run(example: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return python(str(ROOT / "examples" / f"{example}.py"), *arguments, **environment)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    own = (environment.pop("first", ""), str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", ""))
    paths = os.pathsep.join(filter(None, own))
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # a CPU's run, and nothing is downloaded
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **offline, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def skip_without(example: str) -> None:
    for package in EXAMPLES[example]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (pip install fused_reg[integrations])")


@pytest.mark.parametrize("example", EXAMPLES)
def test_finds_the_plain_loops_weights(example):
    """Under gradient accumulation, and where the order of examples is shuffled; the example asserts how near."""
    skip_without(example)
    done = run(example)
    assert done.returncode == 0, done.stderr
    assert "Regularizer(\n  l1=0.001, l2=0.001: " in done.stdout
    assert "largest difference of a weight from the plain loop: " in done.stdout
    assert 'mode="prox": ' in done.stdout


@pytest.mark.parametrize(("example", "package"), [(e, packages[0]) for e, packages in EXAMPLES.items()])
def test_missing_package(example, package, tmp_path):
    """One sentence that names the command, and no traceback."""
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package}')\n")
    done = run(example, first=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"examples/{example}.py: needs ")
    assert f"; pip install {' '.join(EXAMPLES[example])}\n" in done.stderr
