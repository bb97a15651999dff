"""What setup.py decides, and the flags that every build shares."""

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

CSRC = Path("csrc")
# Machine code for X.Y runs on every X.Z with Z >= Y; a newer X takes the PTX of the last one.
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


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


def ask_nvcc(cuda_home: str | None, option: str) -> str:
    """What nvcc answers to the option; empty without nvcc."""
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if not cuda_home or not nvcc.exists():
        return ""
    return subprocess.run([nvcc, option], capture_output=True, text=True, check=True).stdout


def nvcc_version(answer: str) -> str | None:
    """``"13.0"`` of the answer to ``--version``."""
    found = re.search(r"release (\d+\.\d+)", answer)
    return found.group(1) if found else None


def default_architectures(answer: str) -> str:
    """TORCH_CUDA_ARCH_LIST for GPUs that are not here, from the answer to ``--list-gpu-arch``."""
    known = set(re.findall(r"compute_(\d+)\b", answer))
    return ";".join(arch for arch in ARCHITECTURES if arch.replace(".", "") in known) + "+PTX"


def use_cuda(torch_cuda: str | None, nvcc: str | None, environ: Mapping[str, str]) -> bool:
    """Whether to build for CUDA: where torch has it and nvcc is there, whether or not there is a GPU.

    Args:
        torch_cuda: the CUDA version of torch; None for a torch without CUDA.
        nvcc: the version of nvcc; None without nvcc.
        environ: ``FUSED_REG_CUDA=0`` leaves CUDA out; ``FORCE_CUDA=1`` makes what is missing an error.

    Raises:
        SystemExit: CUDA is asked for and cannot be had, or nvcc does not fit torch.
    """
    force = environ.get("FORCE_CUDA") == "1"
    if environ.get("FUSED_REG_CUDA") == "0":
        if force:
            raise SystemExit("fused_reg: FORCE_CUDA=1 asks for CUDA and FUSED_REG_CUDA=0 leaves it out; unset one")
        return False
    if torch_cuda is None:
        if force:
            raise SystemExit(
                "fused_reg: FORCE_CUDA=1 needs a torch with CUDA, and the installed one is built without it; "
                "install one as https://pytorch.org says, or unset FORCE_CUDA"
            )
        return False
    major = torch_cuda.split(".")[0]
    toolkit = f"install the CUDA {major} toolkit and set CUDA_HOME to its folder"
    if nvcc is None:
        if force:
            raise SystemExit(f"fused_reg: FORCE_CUDA=1 needs nvcc, and none is found; {toolkit}")
        print(f"fused_reg: building for the CPU only, because no nvcc is found; for CUDA {toolkit}")
        return False
    if nvcc.split(".")[0] != major:
        raise SystemExit(
            f"fused_reg: nvcc is of CUDA {nvcc}, and torch is built with CUDA {torch_cuda}; "
            f"{toolkit}, or set FUSED_REG_CUDA=0 to build for the CPU only"
        )
    return True
