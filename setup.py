"""Build of the compiled part; everything else about the package stands in pyproject.toml."""

import os
from pathlib import Path

from setuptools import setup

INSTALL = "install it with `pip install torch`, then fused_reg with `pip install --no-build-isolation`"

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    raise SystemExit(f"fused_reg: building needs torch 2.10 or later, and none is installed; {INSTALL}") from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise SystemExit(f"fused_reg: building needs torch 2.10 or later, and {torch.__version__} is installed; {INSTALL}")

CSRC = Path("csrc")
SOURCES = ["module.cpp", *(CSRC / "sources.txt").read_text().split()]
# Bits are promised: no contraction to fused multiply-add.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wno-psabi"]
if os.environ.get("FUSED_REG_WERROR") == "1":
    CXX_FLAGS.append("-Werror")

setup(
    ext_modules=[
        CppExtension(
            "fused_reg._C",
            [str(CSRC / source) for source in SOURCES],
            extra_compile_args=[*CXX_FLAGS, "-fopenmp"],  # without it at::parallel_for is serial
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
