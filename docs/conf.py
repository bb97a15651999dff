"""What Sphinx needs to know: ``make docs`` builds these pages, and warnings are errors."""

from __future__ import annotations

import inspect
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature

import fused_reg

project = "fused_reg"
author = "the fused_reg authors"
copyright = f"2026, {author}"
release = fused_reg.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # formulas without a network
]
autodoc_mock_imports = ["accelerate", "lightning", "pytorch_lightning", "skorch", "transformers"]  # need not be there
nitpicky = True
# What annotations name and no page here describes. The specification names the types of the package.
nitpick_ignore_regex = [
    ("py:class", r"torch\..*|Tensor|Module|Optimizer|Iterable|Iterator|Mapping|Sequence|Any|M|Strength|Group")
]
default_role = "py:obj"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

add_module_names = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80

html_theme = "furo"
html_title = f"fused_reg {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_theme_options = {theme: {"code-font-size": "0.76rem"} for theme in ("light_css_variables", "dark_css_variables")}
html_show_sourcelink = False

# The order of the pages. It stands here, so that the pages are plain Markdown.
GUIDES = (
    "guides/loop guides/weight_decay guides/keras guides/group_lasso guides/reference_weights guides/proximal "
    "guides/zeros cuda compile distributed torch examples/index"
)
CONTENTS = {
    "index": {
        "": "install quickstart",
        "Guides": GUIDES,
        "Reference": "api l2 mathematics performance tables reliability",
    },
    "examples/index": {
        "": "digits weights tune path prune pat continual finetune lightning_callback huggingface_trainer fsdp2"
    },
}
MEASURED = re.compile(r"\[([^]]+)\]\(\.\./(benchmarks/results/[\w.-]+\.md)\)")


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    for caption, pages in CONTENTS.get(page, {}).items():
        options = ":hidden:" + (f"\n:caption: {caption}" if caption else "")
        source[0] += "\n".join(["", "```{toctree}", options, "", *pages.split(), "```", ""])


def add_tables(app: Sphinx, page: str, source: list[str]) -> None:
    """The files that the page of all measurements links to, at its end."""
    if page == "tables":
        files = MEASURED.findall(source[0])
        source[0] = MEASURED.sub(r"\1", source[0])
        for title, file in files:
            _, _, tables = (app.srcdir.parent / file).read_text().partition("\n")
            source[0] += f"\n## {title}\n{tables}"


def as_written(
    app: Sphinx, what: str, name: str, item: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str] | None:
    """Annotations as they stand in the source: the names of types, not what they are aliases of."""
    is_hidden = inspect.isclass(item) and (signature or "").startswith("(*args")  # by a base that is not there
    if is_hidden:
        item = item.__init__
    if not inspect.isroutine(item) or not signature:
        return None
    written = inspect.signature(item)
    parameters = [p for p in written.parameters.values() if p.name != "self"]
    arguments, _, result = stringify_signature(written.replace(parameters=parameters)).partition(" -> ")
    return arguments, None if is_hidden else result


def link_pictures(app: Sphinx, page: nodes.document) -> None:
    """A picture leads to itself in full size, as Sphinx makes those that have a width."""
    for picture in page.findall(nodes.image):
        picture["width"] = "100%"


def setup(app: Sphinx) -> None:
    app.connect("doctree-read", link_pictures)
    app.connect("source-read", add_contents)
    app.connect("source-read", add_tables)
    app.connect("autodoc-process-signature", as_written)
