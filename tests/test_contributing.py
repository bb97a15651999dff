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
COMMENTS = (r"//.*", r"(?s:\"{3}.*?\"{3})|#.*")  # of C++, of Python


def names_in(text):
    """What looks like a file of the repository, or several (``dispatch.*``)."""
    return re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:\*|cpp|csv|cuh?|h|json|md|png|py|sh|txt|typed))`", text)


def mapped():
    """The names on the map, from the root on: in a row they are of the folder that it begins with."""
    for row in re.findall(r"^\| `(.*)$", MAP, flags=re.MULTILINE):
        folder = re.match(r"((?:[\w.-]+/)*)", row)[1]
        yield from (name if "/" in name else folder + name for name in names_in(f"`{row}"))


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
    for path, source in SOURCES.items():
        code = re.sub(COMMENTS[path.suffix == ".py"], "", source)
        place = path.relative_to(ROOT).as_posix()
        if re.search(RECIPES[what], code):
            assert any(fnmatch(place, name) or path.name == name for name in named), f"{place} has a part in it"
