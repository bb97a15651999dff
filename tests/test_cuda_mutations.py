"""Faults that are put into the CUDA kernels must fail the kernels' test on the host (tests/cpp/cuda_on_host).

What orders threads and memory is left out by the CTest ``cuda_left_out``; here are the borders of loops and masks.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import build_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("g++"), reason="for g++ on Linux"),
]
ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-fopenmp", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
#: A file of csrc/cuda, what stands in it once, and what shall stand there.
MUTATIONS = [
    ("cursor.cuh", "while (end() <= c)", "while (end() < c)"),
    ("value.cuh", "i < call.runs + call.large_groups;", "i <= call.runs + call.large_groups;"),
    ("chunk_pass.cuh", "x[k] = i + k < size_", "x[k] = i + k <= size_"),
    ("chunk_pass.cuh", "if (i + k < size_)", "if (i + k <= size_)"),
    ("chunk_pass.cuh", "(can && i + kCount <= size_)", "(can && i + kCount <= size_ + 1)"),
    ("chunk_pass.cuh", "kAll = 0xffffffff;", "kAll = 0xffff;"),
    ("penalty_kernels.cuh", "r < call.runs;", "r <= call.runs;"),
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """What compiles the test with a csrc of its own: the path of the program."""
    folder = tmp_path_factory.mktemp("mutations")
    shutil.copytree(ROOT / build_config.CSRC, folder / "csrc")
    shutil.copytree(ROOT / "tests" / "cpp", folder / "tests" / "cpp")
    include = [f"-I{folder / name}" for name in ("tests/cpp/cuda_on_host", "csrc")]
    include += [f"-isystem{path}" for path in include_paths()]
    compiler = ["g++", *FLAGS, *include]
    kernel = folder / "kernel.o"
    subprocess.run([*compiler, "-c", folder / "csrc/cpu/chunk_kernel_baseline.cpp", "-o", kernel], check=True)

    def built(file=None, old="", new=""):
        path = folder / "csrc" / "cuda" / (file or "cursor.cuh")
        text = path.read_text()
        assert file is None or text.count(old) == 1, f"{old} does not stand in {file} once"
        path.write_text(text.replace(old, new) if file else text)
        program = folder / "test"
        source = folder / "tests" / "cpp" / "test_cuda_kernels.cpp"
        subprocess.run([*compiler, source, kernel, "-o", program], check=True)
        path.write_text(text)
        return program

    return built


def run(program):
    return subprocess.run([program, "quick"], capture_output=True, text=True, timeout=300)


def test_without_a_fault(build):
    done = run(build())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("file", "old", "new"), MUTATIONS, ids=[new for _, _, new in MUTATIONS])
def test_a_fault_is_noticed(build, file, old, new):
    assert run(build(file, old, new)).returncode != 0
