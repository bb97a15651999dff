"""What a build needs, and what it says where that is missing: with --no-build-isolation nothing brings it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import build_config

ROOT = Path(build_config.__file__).parent


def test_flags():
    """Bits are promised; and torch adds no architectures where a flag names one."""
    for werror in (False, True):
        cxx, nvcc = build_config.cxx_flags(werror), build_config.nvcc_flags(werror)
        assert ("-Werror" in cxx, "-Werror" in nvcc) == (werror, werror)
        assert "-ffp-contract=off" in cxx
        assert "-fmad=false" in nvcc
        assert not any(word in flag for flag in [*cxx, *nvcc] for word in ("fast", "arch"))


@pytest.mark.parametrize(
    ("installed", "least", "enough"),
    [
        ("77", "77", True),
        ("77.0.3", "77", True),
        ("84.2.1", "77", True),
        ("76.1.0", "77", False),
        ("65.5.0", "77", False),
        ("2.10.0", "2.10", True),
        ("2.13.0+cu130", "2.10", True),
        ("3.0.0", "2.10", True),
        ("2.10.0a0+git1234567", "2.10", True),
        ("2.9.1+cu128", "2.10", False),
        ("1.13", "2.10", False),
    ],
)
def test_versions_are_numbers(installed, least, enough, tmp_path, monkeypatch):
    """2.9 comes before 2.10."""
    (tmp_path / "a_need.py").write_text(f"__version__ = {installed!r}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "a_need", raising=False)
    if enough:
        build_config.check_installed("a_need", least, "mend it")
    else:
        with pytest.raises(SystemExit) as error:
            build_config.check_installed("a_need", least, "mend it")
        expected = f"fused_reg: building needs a_need {least} or later, and {installed} is installed; mend it"
        assert str(error.value) == expected


BACKEND = "import build_backend; build_backend.get_requires_for_build_wheel()"
SETUPTOOLS = "`pip install --upgrade setuptools`"
TORCH = "install it with `pip install torch`, then fused_reg with `pip install --no-build-isolation`"


@pytest.mark.parametrize("start", [["setup.py", "egg_info"], ["-c", BACKEND]], ids=["setup.py", "pip"])
@pytest.mark.parametrize(
    ("modules", "sentence"),
    [
        ({}, f"setuptools 77 or later, and none is installed; {SETUPTOOLS}"),
        ({"setuptools": "65.5.0"}, f"setuptools 77 or later, and 65.5.0 is installed; {SETUPTOOLS}"),
        ({"setuptools": "80.0"}, f"torch 2.10 or later, and none is installed; {TORCH}"),
        ({"setuptools": "80.0", "torch": "2.9.1"}, f"torch 2.10 or later, and 2.9.1 is installed; {TORCH}"),
    ],
)
def test_setup_says_one_sentence(modules, sentence, start, tmp_path):
    """Before setuptools reads pyproject.toml, which an old one does not understand."""
    for name, version in modules.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
    if "setuptools" in modules:
        backend = "def get_requires_for_build_wheel():\n    exec(open('setup.py').read(), {'__file__': 'setup.py'})\n"
        (tmp_path / "setuptools" / "build_meta.py").write_text(backend)
    done = subprocess.run(
        [sys.executable, "-S", *start],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, f"fused_reg: building needs {sentence}\n")


def add_tool(folder: Path, name: str, script: str = "") -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


NO_HEADERS = 'read code; [ -z "$code" ]'  # compiles nothing else


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Makes a PATH of the tools that are given with their scripts."""

    def make(tools: dict[str, str]) -> str:
        for name, script in tools.items():
            add_tool(tmp_path, name, script)
        monkeypatch.setenv("PATH", str(tmp_path))
        return str(tmp_path)

    return make


@pytest.mark.parametrize(
    ("names", "cxx", "expected"),
    [
        ("c++ g++", {}, "c++"),
        ("g++", {"CXX": ""}, "g++"),
        ("clang++", {}, "clang++"),
        ("c++ mine", {"CXX": "mine -v"}, "mine -v"),
    ],
)
def test_compiler(names, cxx, expected, path):
    folder = path(dict.fromkeys(["ninja", *names.split()], ""))
    assert build_config.compiler({"PATH": folder, **cxx}) == expected


MEND = "install one (Debian: `apt install g++`), or set CXX to it"


@pytest.mark.parametrize(
    ("tools", "cxx", "sentence"),
    [
        ({"c++": ""}, {}, "ninja, and none is found; `pip install ninja`"),
        ({"ninja": ""}, {}, f"a C++ compiler, and there is no c++, g++ or clang++; {MEND}"),
        (
            {"ninja": "", "c++": ""},
            {"CXX": "mine -v"},
            f"a C++ compiler, and there is no mine, which CXX names; {MEND}",
        ),
        ({"ninja": "", "c++": ""}, {"CXX": "c++ '"}, f"a C++ compiler, and there is no c++ ', which CXX names; {MEND}"),
        ({"ninja": "", "c++": "exit 1"}, {}, "C++20, which c++ cannot compile; install GCC 10 or later"),
        (
            {"ninja": "", "c++": NO_HEADERS},
            {},
            "the headers of Python, and there is no Python.h; install them (Debian: `apt install python3-dev`)",
        ),
    ],
)
def test_tool_is_missing(tools, cxx, sentence, path):
    folder = path(tools)
    with pytest.raises(SystemExit) as error:
        build_config.compiler({"PATH": folder, **cxx})
    assert str(error.value) == f"fused_reg: building needs {sentence}"


def test_this_machine_can_build():
    """The real compiler and the real headers."""
    assert build_config.compiler(os.environ)


def test_ninja_of_an_environment_that_is_not_active(tmp_path, monkeypatch):
    """pip runs without its environment's folder on the PATH."""
    add_tool(tmp_path / "bin", "ninja")
    package = tmp_path / "modules" / "ninja"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"BIN_DIR = {str(tmp_path / 'bin')!r}\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "ninja", raising=False)
    assert build_config.path_with_ninja("/x:/y") == f"/x:/y:{tmp_path / 'bin'}"
    assert build_config.path_with_ninja(str(tmp_path / "bin")) == str(tmp_path / "bin")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert build_config.path_with_ninja("/x:/y") == "/x:/y"
