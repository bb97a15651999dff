"""The documentation's code runs and prints what its pages show; nothing public and no example lacks its page."""

import inspect
import re
from pathlib import Path

import pytest

import fused_reg

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text()

BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.DOTALL)
PAGES = [page for page in sorted([*DOCS.glob("*.md"), *DOCS.glob("guides/*.md")]) if BLOCK.search(page.read_text())]
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]\d+)?")


def numbers_of(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its compiler, of itself
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_python_block_runs_and_prints_what_is_shown(page, capsys):
    """A page is one program. Words are the same; numbers of a training may differ in their last digits."""
    text = page.read_text()
    namespace: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        code, shown = block.groups(default="")
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        assert NUMBER.sub("0", printed).split() == NUMBER.sub("0", shown).split()
        assert numbers_of(printed) == pytest.approx(numbers_of(shown), rel=0.1, abs=0.02)


def test_every_public_name_is_on_the_api_page():
    for name in fused_reg.__all__:
        assert re.search(rf"auto(function|class|module):: fused_reg\.{name}$", API, flags=re.MULTILINE), name
    for name, function in inspect.getmembers(fused_reg.reference, inspect.isfunction):
        if function.__module__ == "fused_reg.reference" and not name.startswith("_"):
            assert inspect.getdoc(function), name  # `automodule` shows those with a docstring


def test_every_example_has_a_page():
    examples = {path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()}
    pages = {path.stem for path in (DOCS / "examples").glob("*.md")} - {"index"}
    assert examples <= pages


def test_every_picture_is_on_a_page():
    text = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    for picture in (DOCS / "pictures").glob("*.png"):
        assert f"pictures/{picture.name}" in text
