"""Import of a compiled part that does not fit (hard cases 36, 37): one error that says how to mend it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fused_reg
from fused_reg import _library, _ops

COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps ."
MEND = re.escape(f"`{COMMAND}` in its source")
BUILT = _ops.library.build_info()["torch"]
MARK = b"fused_reg built with torch "


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package, which `import_in` imports: it starts in the folder of the copy."""
    source = Path(fused_reg.__file__).parent
    return Path(shutil.copytree(source, tmp_path / "fused_reg", ignore=shutil.ignore_patterns("__pycache__")))


def library_of(package: Path) -> Path:
    (path,) = package.glob("_C*")
    return path


def import_in(package: Path, statement: str = "import fused_reg; print(fused_reg.__file__)"):
    return subprocess.run(
        [sys.executable, "-c", statement],
        cwd=package.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )


def assert_import_error(package: Path, pattern: str) -> None:
    done = import_in(package)
    assert done.returncode == 1, done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert re.fullmatch("ImportError: fused_reg: " + pattern, last), last


def patch(package: Path, old: bytes, new: bytes) -> None:
    library = library_of(package)
    content = library.read_bytes()
    assert old in content
    assert len(old) == len(new)
    library.write_bytes(content.replace(old, new))


def test_copy_is_what_is_imported(package):
    """What the tests below rest on: an intact copy works."""
    done = import_in(package)
    assert done.stdout.strip() == str(package / "__init__.py")
    assert done.returncode == 0


def test_built_with_another_torch(package):
    """Hard case 37: both versions, and the command."""
    other = re.sub(r"\d", "9", BUILT)
    patch(package, MARK + BUILT.encode(), MARK + other.encode())
    running = re.escape(torch.__version__)
    pattern = f"built with torch {re.escape(other)}, but torch {running} is running; build it again with {MEND}"
    assert_import_error(package, pattern)


@pytest.mark.parametrize(
    ("built", "running", "fits"),
    [
        ("2.13.0", "2.13.0+cpu", True),
        ("2.13.0+cu130", "2.13.1", True),
        ("2.13.0a0+git1234567", "2.13.0", True),
        ("2.1.3", "2.13.0", False),
        ("2.13.0", "2.12.1+cpu", False),
        ("2.13.0", "3.13.0", False),
        ("an unknown version", "2.13.0", False),
    ],
)
def test_which_versions_fit(built, running, fits):
    """Hard case 37: torch keeps its C++ interface within a minor release; `2.1` is not `2.13`."""
    assert (_library.release(built) == _library.release(running)) == fits


def test_no_mark(package):
    """Hard case 37: a library that does not say what it was built with."""
    patch(package, MARK, MARK.replace(b"built", b"BUILT"))
    assert_import_error(
        package,
        f"built with torch an unknown version, but torch .* is running; build it again with {MEND}",
    )


def test_library_that_does_not_load(package):
    """Hard case 37: a symbol that this torch does not have, as after a change of its C++ interface."""
    patch(package, b"_ZN5torch7Library", b"_ZN5torch7LibrarX")
    version = re.escape(torch.__version__)
    pattern = (
        f"built with torch {re.escape(BUILT)}, which torch {version} cannot load "
        rf"\(.*undefined symbol.*\); build it again with {MEND}"
    )
    assert_import_error(package, pattern)


def test_library_of_another_kind(package):
    """Hard case 37: not a library at all, though it has the mark."""
    library_of(package).write_bytes(b"\x00" * 64 + MARK + BUILT.encode() + b"\x00")
    pattern = rf"built with torch {re.escape(BUILT)}, which torch .* cannot load \(.*\); build it again with {MEND}"
    assert_import_error(package, pattern)


def test_library_is_missing(monkeypatch):
    """Hard case 37."""
    monkeypatch.setattr(_library, "find", lambda folder: None)
    monkeypatch.setattr(_library, "is_source", lambda folder: False)
    with pytest.raises(ImportError, match=f"^fused_reg: the compiled part is missing; build it with {MEND}$"):
        _ops._load()


def test_library_of_a_source_tree(package):
    """What pip installs elsewhere does not mend it: the advice is to build it in its place."""
    (package.parent / "setup.py").touch()
    patch(package, b"_ZN5torch7Library", b"_ZN5torch7LibrarX")
    command = f"`pip install --no-build-isolation --no-deps --editable .` in {package.parent}"
    done = import_in(package)
    assert re.search(rf"ImportError: .* cannot load .*; build it again with {re.escape(command)}\n$", done.stderr)


def test_works_without_a_cuda_device(package):
    """Hard case 36: no device is visible; import and the CPU work."""
    statement = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; import torch, fused_reg; "
        "print(fused_reg.value_and_grad(torch.ones(3), l1=0.5)[0].item())"
    )
    done = import_in(package, statement)
    assert (done.stdout.strip(), done.stderr) == ("1.5", "")


def test_the_import_leaves_the_compiler_alone():
    """torch._dynamo takes as long to import as torch."""
    code = "import sys, fused_reg; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
