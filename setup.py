"""Build of the compiled part; everything else about the package stands in pyproject.toml.

A torch with CUDA and a CUDA toolkit build the CUDA kernels too. FORCE_CUDA=1 makes it an error if they cannot be built,
and FUSED_REG_CUDA=0 leaves them out. CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they mean to torch.
"""
# ruff: noqa: E402  (what is missing is said before it is imported, and CUDA_HOME is set before torch reads it)

import os
import shlex
import sys

import build_config

build_config.check_setuptools()
build_config.check_torch()

import torch
from setuptools import setup

import cuda_toolkit

COMPILING = ("bdist", "build", "build_ext", "develop", "editable_wheel", "install", "install_lib")
if any(word in COMPILING or word.startswith("bdist_") for word in sys.argv):
    os.environ["PATH"] = build_config.path_with_ninja(os.environ.get("PATH", os.defpath))
    os.environ["CXX"] = build_config.compiler(os.environ)  # for torch and setuptools alike

toolkit = cuda_toolkit.choose(torch.version.cuda, os.environ)
if toolkit:
    os.environ["CUDA_HOME"] = str(toolkit.home)
    if toolkit.nvcc.resolve() != (toolkit.home / "bin" / "nvcc").resolve():
        os.environ.setdefault("PYTORCH_NVCC", shlex.quote(str(toolkit.nvcc)))
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:  # else torch takes the GPU's own
        os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.architectures()

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

werror = os.environ.get("FUSED_REG_WERROR") == "1"
sources = ["extension.cpp", *build_config.sources(), *(build_config.sources("cuda") if toolkit else [])]
extension = (CUDAExtension if toolkit else CppExtension)(
    "fused_reg._C",
    [str(build_config.CSRC / source) for source in sources],
    include_dirs=toolkit.include_dirs() if toolkit else [],
    extra_compile_args={"cxx": build_config.cxx_flags(werror), "nvcc": build_config.nvcc_flags(werror)},
    extra_link_args=["-fopenmp"],
)
if toolkit:
    # torch brings its CUDA runtime. Toolkits keep theirs in many places, and wheels not under the name that this takes.
    extension.libraries.remove("cudart")

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
