"""CONTRIBUTING.md names every file of the source, none that is not there, and in its recipes the files that matter."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAP = TEXT.partition("## Where things are")[2].partition("## How to")[0]
SOURCES = {
    path: path.read_text()
    for folder in ("csrc", "fused_reg")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.is_file() and not re.search(r"\.so$|__pycache__", str(path))
}

# What the code of a term, a pass, a dtype has in it: smooth L1, the counts of zeros, bfloat16.
RECIPES = {
    "term": r"\bsmooth_l1\b|\bkSmoothL1\b|\bSmoothL1\b",
    "pass": r"\bZeros(Pass)?\b|\bkZeros\b|\brun_zero_counts\b",
    "dtype": r"\bkBFloat16\b|torch\.bfloat16\b",
}
# How code tells devices apart by their types, rather than by what these can do. Only a backend may.
ASKS_FOR_A_DEVICE = r"""\.is_(cpu|cuda|meta|mps|xpu)\b|torch\.(cuda|cpu|mps|xpu|accelerator)\b|device\.type\b
    |["'](cuda|meta|mps|xpu)["':]|(?<!device=)"cpu"|\bpin_memory\b"""
# Where csrc meets torch: the library, what CUDA takes beside it, and the Python module.
TORCH = ["csrc/cuda/torch_compat.h", "csrc/module.cpp", "csrc/torch_compat.h"]
COMMENTS = (r"//.*", r"(?s:\"{3}.*?\"{3})|#.*")  # of C++, of Python


def names_in(text):
    """What looks like a file of the repository, or several (``grad_memory.*``)."""
    return re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:\*|cpp|csv|cuh?|h|json|md|png|py|sh|txt|typed))`", text)


def mapped():
    """The names on the map, from the root on: in a row they are of the folder that it begins with."""
    for row in re.findall(r"^\| `(.*)$", MAP, flags=re.MULTILINE):
        folder = re.match(r"((?:[\w.-]+/)*)", row)[1]
        yield from (name if "/" in name else folder + name for name in names_in(f"`{row}"))


def code_of(path):
    return re.sub(COMMENTS[path.suffix == ".py"], "", SOURCES[path])


def test_the_map_names_every_file():
    named = list(mapped())
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        assert any(fnmatch(place, name) for name in named), f"{place} is on no map"


def test_every_file_that_is_named_is_there():
    for name in mapped():
        assert list(ROOT.glob(name)), f"{name} is not there"
    for name in names_in(TEXT.replace(MAP, "")):
        assert list(ROOT.glob(name)) or any(fnmatch(path.name, name) for path in SOURCES), f"{name} is not there"


@pytest.mark.parametrize("what", RECIPES)
def test_a_recipe_names_the_files_that_matter(what):
    recipe = TEXT.partition(f"**Add a {what}**")[2].partition("\n**Add")[0]
    named = names_in(recipe)
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        if re.search(RECIPES[what], code_of(path)):
            assert any(fnmatch(place, name) or path.name == name for name in named), f"{place} has a part in it"


def test_one_table_tells_devices_apart():
    """So a new one is a row there."""
    asks = re.compile(ASKS_FOR_A_DEVICE, re.VERBOSE)
    found = {path.name: asks.findall(code_of(path)) for path in SOURCES if path.suffix == ".py"}
    assert [name for name, questions in found.items() if questions] == ["_devices.py"]


def test_csrc_meets_torch_in_few_places():
    includes = re.compile(r"#include <(ATen|c10|torch)/")
    assert [str(path.relative_to(ROOT)) for path in SOURCES if includes.search(SOURCES[path])] == TORCH


def test_a_backend_is_a_folder():
    """What all share knows the host and no device; a backend tells of itself where it registers."""
    asks = re.compile(
        r"\b(is_cuda|is_meta|is_mps|is_xpu|kCUDA|kMeta|WITH_CUDA|USE_CUDA)\b|[\"/](cuda|mps|xpu)/", re.IGNORECASE
    )
    shared = [path for path in SOURCES if path.parent == ROOT / "csrc" and path.suffix != ".txt"]
    assert [path.name for path in shared if asks.search(code_of(path))] == []
