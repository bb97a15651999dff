"""A source tree without a compiled part, in whose folder the installed package is used all the same."""

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

import fused_reg
from fused_reg import _library

SUFFIX = EXTENSION_SUFFIXES[0]
OURS, OTHER = torch.__version__, "1.2.3"


def make_package(folder: Path, torch_version: str | None = None, suffix: str = SUFFIX) -> Path:
    """A package that is only looked at; with a library that says with which torch it is built."""
    package = folder / "fused_reg"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if torch_version:
        (package / f"_C{suffix}").write_bytes(b"...fused_reg built with torch " + torch_version.encode() + b"\0...")
    return package


def make_source(folder: Path, *library: str) -> Path:
    package = make_package(folder, *library)
    (folder / "setup.py").touch()
    return package


@pytest.fixture(autouse=True)
def _nothing_is_installed(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "ditable" not in repr(finder)])
    monkeypatch.setattr(sys, "path", [])


@pytest.mark.parametrize(
    "library",
    [(), (OTHER,), (OURS, ".cpython-27-x86_64-linux-gnu.so")],
    ids=["no library", "a library for another torch", "a library for another Python"],
)
def test_source_tree(library, tmp_path):
    source = make_source(tmp_path / "source", *library)
    sys.path[:] = [str(source.parent), str(tmp_path / "empty")]
    assert _library.installed_instead(source) is None
    # The first that works: not those of other torches, nor a folder of the name that is no package.
    (tmp_path / "namespace" / "fused_reg").mkdir(parents=True)
    packages = [
        make_package(tmp_path / name, version) for name, version in zip("abc", (None, OTHER, OURS), strict=True)
    ]
    sys.path += [str(tmp_path / "namespace"), *(str(package.parent) for package in packages)]
    assert Path(_library.installed_instead(source).origin).parent == packages[-1]
    # If none works, the first says why; a tree with a library of another torch has the same to say.
    shutil.rmtree(packages[-1])
    found = _library.installed_instead(source)
    assert found is None if library == (OTHER,) else Path(found.origin).parent == packages[1]


def test_relative_entry(tmp_path, monkeypatch):
    """The empty entry of ``python -c`` is the working folder."""
    source, installed = make_source(tmp_path / "source"), make_package(tmp_path / "site", OURS)
    monkeypatch.chdir(source.parent)
    sys.path[:] = ["", str(installed.parent)]
    assert Path(_library.installed_instead(source).origin).parent == installed


def test_editable_installation_of_another_folder(tmp_path):
    """setuptools finds it by a finder of its own, behind the path's."""
    source, installed = make_source(tmp_path / "source"), make_package(tmp_path / "other", OURS)

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.util.spec_from_file_location(name, installed / "__init__.py")

    sys.path[:] = [str(source.parent)]
    sys.meta_path.append(Finder)
    assert Path(_library.installed_instead(source).origin).parent == installed


def test_what_is_not_replaced(tmp_path):
    """A package that works, and an installed one that a rebuild mends."""
    installed = make_package(tmp_path / "site", OURS)
    sys.path[:] = [str(installed.parent)]
    assert _library.installed_instead(make_source(tmp_path / "built", OURS)) is None
    assert _library.installed_instead(make_package(tmp_path / "stale", OTHER)) is None


def test_what_is_hidden_is_said(tmp_path):
    """A source tree that works, also if an installed package would; itself, found again, hides nothing."""
    source, installed = make_source(tmp_path / "source", OURS), make_package(tmp_path / "site", OURS)
    sys.path[:] = [str(source.parent), str(installed.parent)]
    with pytest.warns(UserWarning, match=f"{source} is imported, and hides {installed}, which is installed"):
        assert not _library.take_installed(source)
    sys.path[:] = [str(source.parent)] * 2
    assert not _library.take_installed(source)
    sys.path.append(str(installed.parent))
    assert not _library.take_installed(make_package(tmp_path / "first", OURS))


@pytest.fixture
def source_and_installed(tmp_path) -> tuple[Path, Path]:
    """Copies of this package: one as in a clone, the other with the library."""
    source = tmp_path / "source" / "fused_reg"
    ours = Path(fused_reg.__file__).parent
    shutil.copytree(ours, source, ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    (source / "__init__.py").write_text((source / "__init__.py").read_text() + "    import fused_reg.not_installed\n")
    installed = Path(shutil.copytree(ours, tmp_path / "site" / "fused_reg"))
    (installed / "reference.py").write_text((installed / "reference.py").read_text() + "\nMARK = 'installed'\n")
    return source, installed


def run_in(source: Path, installed: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=source.parent,
        env={**os.environ, "PYTHONPATH": str(installed.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "fused_reg"],
        ["-c", "from fused_reg.in_place import prox_; import fused_reg; print(fused_reg.reference.MARK, ': ok')"],
    ],
)
def test_installed_package_is_imported_as_a_whole(arguments, source_and_installed):
    """By module and by submodule; and one sentence says so, once."""
    source, installed = source_and_installed
    done = run_in(source, installed, *arguments)
    assert done.returncode == 0, done.stderr
    assert "ok" in done.stdout
    sentence = f"UserWarning: fused_reg: {source} has no compiled part, so {installed} is imported instead of it"
    assert done.stderr.count(sentence) == done.stderr.count("Warning") == 1
