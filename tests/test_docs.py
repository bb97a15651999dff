"""The documentation's code runs and prints what its pages show; it can be read where it lies."""

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest

import fused_reg

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
API = (DOCS / "api.md").read_text()

BLOCK = re.compile(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", flags=re.DOTALL)
FENCE = re.compile(r"^```(\S*).*?\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[-+]\d+)?")

PROGRAMS = [
    pytest.param(page, marks=pytest.mark.long if page.stem == "compile" else ())
    for page in [README, *PAGES]
    if BLOCK.search(page.read_text()) and page.parent.name != "examples"
]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def numbers_of(text):
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its compiler, of itself
@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_every_python_block_runs_and_prints_what_is_shown(page, capsys):
    """A page is one program. Words are the same; numbers of a training may differ in their last digits."""
    text = page.read_text()
    namespace: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        code, shown = block.groups(default="")
        line = text[: block.start(1)].count("\n")
        exec(compile("\n" * line + code, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if page == README:  # which shows no output
            continue
        assert NUMBER.sub("0", printed).split() == NUMBER.sub("0", shown).split()
        assert numbers_of(printed) == pytest.approx(numbers_of(shown), rel=0.1, abs=0.02)
    if page == README:
        assert namespace["attachment"].value > 0
        total = namespace["report"].rows[-1]  # of the section on exact zeros
        assert 0 < total["zeros"] < total["elements"]


@pytest.mark.parametrize("page", sorted(DOCS.glob("examples/*.md")), ids=name_of)
def test_what_a_page_shows_of_an_example_is_its_code(page):
    """But for its line breaks: a page is narrower."""
    code = "".join("".join(path.read_text().split()) for path in (ROOT / "examples").glob("*.py"))
    for shown, _ in BLOCK.findall(page.read_text()):
        assert "".join(shown.split()) in code


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_every_link_leads_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def anchors_of(page):
    """As code hosts make them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_it_is_plain_markdown_with_text_of_its_own(page):
    """No directive that a code host would show as it is, but for the docstrings at the end of the API page."""
    text = page.read_text()
    directives = re.findall(r"^(?:```|:::)\{(.*?)\}|^\(.*\)=$|\{\w+(?::\w+)?\}`", text, flags=re.MULTILINE)
    assert set(directives) <= ({"eval-rst"} if page.name == "api.md" else set())
    assert len(FENCE.sub("", text).split()) > 60


@pytest.mark.parametrize("page", [README, *PAGES], ids=name_of)
def test_code_is_not_wider_than_a_page(page):
    text = page.read_text()
    blocks = [block for _, block in FENCE.findall(text)] + re.findall(r"^ {4}.*$", FENCE.sub("", text), re.MULTILINE)
    for line in "\n".join(blocks).splitlines():
        assert len(line) <= 88, line


def test_examples_of_docstrings_are_not_wider_than_a_page():
    for path in (ROOT / "fused_reg").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for example in doctest.DocTestParser().get_examples(ast.get_docstring(node) or ""):
                    lines = [f">>> {line}" for line in example.source.splitlines()] + example.want.splitlines()
                    assert max(map(len, lines)) <= 88, lines


def test_pictures_fit_the_page():
    styles = re.sub(r"/\*.*?\*/", "", (DOCS / "_static" / "pages.css").read_text(), flags=re.DOTALL)
    assert re.search(r"img \{[^}]*max-width: 100%", styles)
    assert "min-width" not in styles


def test_every_page_is_reached_from_the_first():
    seen, left = set(), [DOCS / "index.md"]
    while left:
        page = left.pop()
        if page not in seen:
            seen.add(page)
            left += [(page.parent / link).resolve() for link in re.findall(r"\]\(([^)#:\s]+\.md)", page.read_text())]
    assert seen >= set(PAGES)


def test_every_public_name_is_on_the_api_page():
    for name in fused_reg.__all__:
        entry = rf"(auto(function|class|module):: fused_reg\.|py:data:: ){name}$"
        assert re.search(entry, API, flags=re.MULTILINE), name
    for name, function in inspect.getmembers(fused_reg.reference, inspect.isfunction):
        if function.__module__ == "fused_reg.reference" and not name.startswith("_"):
            assert inspect.getdoc(function), name  # `automodule` shows those with a docstring


def test_the_signatures_on_the_api_page_are_those_of_the_code():
    shown = " ".join(FENCE.search(API)[2].split())
    for name in fused_reg.__all__:
        item = getattr(fused_reg, name)
        if callable(item):
            parameters = inspect.signature(item).parameters.values()
            plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
            text = str(inspect.Signature(plain)).replace("'", '"')
            assert f"{name}{text}" in shown


def test_every_example_has_a_page():
    examples = {path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()}
    pages = {path.stem for path in (DOCS / "examples").glob("*.md")} - {"index"}
    assert examples <= pages


def test_every_picture_is_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    for picture in (DOCS / "pictures").glob("*.png"):
        assert f"pictures/{picture.name}" in text
