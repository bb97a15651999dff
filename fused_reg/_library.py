"""Finds the compiled part: a source tree has none, and hides the installed package from whoever works in it."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder
from pathlib import Path

import torch


def find(folder: Path) -> Path | None:
    """The compiled part for this Python in a folder of the package."""
    paths = (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.exists()), None)


@cache
def built_with(library: Path) -> str:
    """The torch that it was built with, read from the file's bytes: another torch's may crash while it loads."""
    mark = re.search(rb"fused_reg built with torch ([\w.]+)", library.read_bytes())
    return mark[1].decode() if mark else "an unknown version"


def release(version: str) -> tuple[int, ...]:
    """``(2, 13)`` of ``"2.13.0+cpu"``: the part within which torch keeps its C++ interface."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def fits(library: Path) -> bool:
    """Whether it is built with the torch that is running."""
    return release(built_with(library)) == release(torch.__version__)


def is_source(folder: Path) -> bool:
    """Whether the package in a folder is that of a source tree, which pip does not mend."""
    return (folder.parent / "setup.py").exists()


def hidden_by(folder: Path) -> tuple[list[ModuleSpec], list[ModuleSpec]]:
    """The other packages with a compiled part that could be imported: those that fit, and the rest."""
    finders = [finder for finder in sys.meta_path if finder is not PathFinder]  # of editable installations
    specs = [PathFinder.find_spec("fused_reg", [entry]) for entry in sys.path]
    specs += [finder.find_spec("fused_reg", None) for finder in finders]
    others: tuple[list[ModuleSpec], list[ModuleSpec]] = ([], [])
    for spec in specs:
        parent = Path(spec.origin).parent if spec and spec.origin else folder
        if spec and parent.resolve() != folder.resolve() and (library := find(parent)):
            others[not fits(library)].append(spec)
    return others


def installed_instead(folder: Path) -> ModuleSpec | None:
    """The package that pip installed, if the one in ``folder`` hides it and cannot work."""
    own = find(folder)
    if own and (fits(own) or not is_source(folder)):
        return None
    fitting, others = hidden_by(folder)
    return next(iter(fitting or ([] if own else others)), None)  # its own error says what is wrong with it


def take_installed(folder: Path) -> bool:
    """Import it as a whole, in the place of the package in ``folder``, and say so; or say what this one hides."""
    spec = installed_instead(folder)
    if spec is None or spec.origin is None or spec.loader is None:
        for hidden in hidden_by(folder)[0][:1] if is_source(folder) and find(folder) else []:
            other = Path(str(hidden.origin)).parent
            warnings.warn(f"fused_reg: {folder} is imported, and hides {other}, which is installed", stacklevel=3)
        return False
    lacks = f"no compiled part for torch {torch.__version__}" if find(folder) else "no compiled part"
    instead = Path(spec.origin).parent
    warnings.warn(f"fused_reg: {folder} has {lacks}, so {instead} is imported instead of it", stacklevel=3)
    for name in [name for name in sys.modules if name.partition(".")[0] == "fused_reg"]:
        del sys.modules[name]
    sys.modules["fused_reg"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return True
