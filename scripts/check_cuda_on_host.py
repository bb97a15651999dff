"""Tests the CUDA backend without a GPU: ``python -m scripts.check_cuda_on_host [arguments of pytest]``.

The sources of csrc/cuda are built for the host (tests/cpp/cuda_on_host), registered for CPU tensors in the place of the
CPU's kernels, and the Python tests run on them: tables, strengths, strides, gradients and errors of the CUDA operators.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import build_config

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda_on_host"
#: What the kernels and operators decide. The rest is Python, or about the CPU's own threads and memory.
TESTS = (
    *("autograd", "gradient", "layout", "list", "strengths", "value", "sums", "accumulate_grad", "prox", "golden"),
    *("optim", "optim_steps", "optim_numbers", "optim_devices"),
)
#: Fibers take their time, most of all for rows of one element; test_cuda_operators.cpp has norms of all kinds. And the
#: CPU's operators alone look at a strength before anything is written.
LEFT_OUT = (
    "thousand or million or roundings or thread_counts or step_zero or strength_that_is_nan or instruction_sets"
    " or (row and (test_norms or test_optimal or sizes or strengths))"
)

SETUP = """
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
setup(
    name="fused_reg_cuda_on_host",
    ext_modules=[CppExtension("fused_reg._C", {sources}, include_dirs={include}, extra_compile_args={flags},
                              extra_link_args=["-fopenmp"])],
    cmdclass={{"build_ext": BuildExtension.with_options(use_ninja=True)}},
)
"""


def prepare() -> None:
    """A copy of the package and its tests, whose compiled part is the CUDA backend on the host."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in ("fused_reg", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "cpp", "results")
        shutil.copytree(ROOT / name, BUILD / name, ignore=ignored, dirs_exist_ok=True)
    csrc, shim = ROOT / build_config.CSRC, ROOT / "tests" / "cpp" / "cuda_on_host"
    shutil.copy(ROOT / "pyproject.toml", BUILD)
    shutil.copy(shim / "on_host.py", BUILD / "tests" / "test_on_host.py")
    setup = SETUP.format(
        sources=[str(shim / "extension.cpp"), *(str(csrc / name) for name in build_config.sources())],
        include=[str(shim), str(csrc)],
        flags=[*build_config.cxx_flags(werror=False), "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"],
    )
    (BUILD / "build.py").write_text(setup)  # a setup.py would say that it hides the package that pip installed


def main() -> int:
    prepare()
    subprocess.run([sys.executable, "build.py", "-q", "build_ext", "--inplace"], cwd=BUILD, check=True)
    arguments = sys.argv[1:] or ["-k", f"not ({LEFT_OUT})", *(f"tests/test_{name}.py" for name in (*TESTS, "on_host"))]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "not cuda", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(pytest, cwd=BUILD).returncode


if __name__ == "__main__":
    sys.exit(main())
