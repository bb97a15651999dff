"""What setup.py decides, and the flags that every build shares."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

CSRC = Path("csrc")
STANDARD = "-std=c++20"
COMPILERS = ("c++", "g++", "clang++")


def cxx_flags(werror: bool) -> list[str]:
    """Bits are promised: no contraction to fused multiply-add."""
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
    flags.append("-fopenmp")  # without it at::parallel_for is serial
    return [*flags, "-Werror"] if werror else flags


def nvcc_flags(werror: bool) -> list[str]:
    """No contraction here either. torch adds the language standard and the architectures."""
    flags = ["-O3", "-fmad=false"]
    return [*flags, "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Werror"] if werror else flags


def sources(folder: str = "") -> list[str]:
    """The files that ``sources.txt`` in this folder of csrc names, relative to csrc: kernels, and what CUDA adds."""
    return (CSRC / folder / "sources.txt").read_text().split()


def check_setuptools() -> None:
    """An older one does not understand pyproject.toml."""
    check_installed("setuptools", "77", "`pip install --upgrade setuptools`")


def check_torch() -> None:
    cure = "install it with `pip install torch`, then fused_reg with `pip install --no-build-isolation`"
    check_installed("torch", "2.10", cure)


def check_installed(name: str, least: str, cure: str) -> None:
    """Raises SystemExit where the build needs a module, or a later version of it."""
    version = importlib.import_module(name).__version__ if importlib.util.find_spec(name) else None
    if version is None or _numbers(version) < _numbers(least):
        found = f"{version} is installed" if version else "none is installed"
        raise SystemExit(f"fused_reg: building needs {name} {least} or later, and {found}; {cure}")


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])]


def path_with_ninja(path: str) -> str:
    """The PATH, with the folder of pip's ninja where it has none: an environment need not be active to be built in."""
    if shutil.which("ninja", path=path) or not importlib.util.find_spec("ninja"):
        return path
    folder = importlib.import_module("ninja").BIN_DIR
    return os.pathsep.join([path, folder]) if folder else path


def compiler(environ: Mapping[str, str]) -> str:
    """The C++ compiler to build with, which can: ``CXX``, else the first that there is.

    Raises:
        SystemExit: it, ninja, or the headers of Python are missing.
    """
    path = environ.get("PATH")
    if not shutil.which("ninja", path=path):
        raise SystemExit("fused_reg: building needs ninja, and none is found; `pip install ninja`")
    given = environ.get("CXX", "").strip()
    mend = "install one (Debian: `apt install g++`), or set CXX to it"
    program = next(iter(_words(given)), given)
    if given and not shutil.which(program, path=path):
        raise SystemExit(
            f"fused_reg: building needs a C++ compiler, and there is no {program}, which CXX names; {mend}"
        )
    there = [given] if given else [name for name in COMPILERS if shutil.which(name, path=path)]
    if not there:
        raise SystemExit(f"fused_reg: building needs a C++ compiler, and there is no c++, g++ or clang++; {mend}")
    chosen = next((name for name in there if _compiles(name, "", [])), there[0])
    includes = [f"-I{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    if not _compiles(chosen, "#include <Python.h>", includes):
        if not _compiles(chosen, "", []):
            raise SystemExit(f"fused_reg: building needs C++20, which {chosen} cannot compile; install GCC 10 or later")
        raise SystemExit(
            "fused_reg: building needs the headers of Python, and there is no Python.h; "
            "install them (Debian: `apt install python3-dev`)"
        )
    return chosen


def _words(command: str) -> list[str]:
    """No words if a quotation is not closed."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def _compiles(compiler: str, code: str, flags: Sequence[str]) -> bool:
    command = [*_words(compiler), STANDARD, *flags, "-fsyntax-only", "-x", "c++", "-"]
    try:
        return subprocess.run(command, input=code.encode(), capture_output=True).returncode == 0
    except OSError:  # it is no program
        return False
