"""Build of the compiled part; everything else about the package stands in pyproject.toml.

A torch with CUDA and nvcc build the CUDA kernels too. FORCE_CUDA=1 makes it an error if they cannot be built, and
FUSED_REG_CUDA=0 leaves them out. CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))  # pip does not

import build_config

INSTALL = "install it with `pip install torch`, then fused_reg with `pip install --no-build-isolation`"

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    raise SystemExit(f"fused_reg: building needs torch 2.10 or later, and none is installed; {INSTALL}") from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 10):
    raise SystemExit(f"fused_reg: building needs torch 2.10 or later, and {torch.__version__} is installed; {INSTALL}")

nvcc = build_config.nvcc_version(build_config.ask_nvcc(CUDA_HOME, "--version"))
cuda = build_config.use_cuda(torch.version.cuda, nvcc, os.environ)
werror = os.environ.get("FUSED_REG_WERROR") == "1"

sources = ["extension.cpp", *build_config.sources()]
flags = {"cxx": build_config.cxx_flags(werror)}
if cuda:
    sources += build_config.sources("cuda")
    flags["nvcc"] = build_config.nvcc_flags(werror)
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:  # else torch takes the GPU's own
        architectures = build_config.default_architectures(build_config.ask_nvcc(CUDA_HOME, "--list-gpu-arch"))
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures

setup(
    ext_modules=[
        (CUDAExtension if cuda else CppExtension)(
            "fused_reg._C",
            [str(build_config.CSRC / source) for source in sources],
            extra_compile_args=flags,
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
