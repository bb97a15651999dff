"""Finds the CUDA toolkit that a build takes: torch looks only at where an nvcc lies, and not at what it uses."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SYSTEM_HOMES = [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True), Path("/opt/cuda")]
SYSTEM_INCLUDE = Path("/usr/include")  # Debian's headers
# What the kernels need besides; the last is of CCCL, which pip has in a wheel of its own.
HEADERS = ["cuda_fp16.h", "cuda_bf16.h", "nv/target"]
# Machine code for X.Y runs on every X.Z with Z >= Y; a newer X takes the PTX of the last one.
ARCHITECTURES = ["7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "10.3", "12.0"]
# Of boards with an Arm processor (Orin, Thor), which run no code of other GPUs.
OF_BOARDS = ["8.7", "11.0"]


@dataclass(frozen=True)
class Toolkit:
    """What a build has to know of a toolkit. The CUDA runtime that it links is torch's own."""

    nvcc: Path  # as the user calls it: a wrapper may add options
    version: str  # "13.0"
    home: Path  # torch's CUDA_HOME, where bin/nvcc is the compiler itself
    include: Path  # has cuda_runtime.h

    def include_dirs(self) -> list[str]:
        """What to tell the C++ compiler beside torch's own ``CUDA_HOME/include``."""
        return [] if self.include in (self.home / "include", SYSTEM_INCLUDE) else [str(self.include)]

    def architectures(self) -> str:
        """TORCH_CUDA_ARCH_LIST for GPUs that are not here."""
        known = set(re.findall(r"compute_(\d+)\b", answer(self.nvcc, "--list-gpu-arch")))
        wanted = ARCHITECTURES + (OF_BOARDS if platform.machine() == "aarch64" else [])
        return ";".join(arch for arch in sorted(wanted, key=float) if arch.replace(".", "") in known) + "+PTX"


def answer(nvcc: Path, *options: str) -> str:
    """What nvcc says, of both streams; empty where it cannot be run."""
    try:
        done = subprocess.run([nvcc, *options], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def release(nvcc: Path) -> str | None:
    """``"13.0"``."""
    found = re.search(r"release (\d+\.\d+)", answer(nvcc, "--version"))
    return found[1] if found else None


def candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    """Every nvcc that may be meant, the likeliest first; only the one that the user names, if any."""
    if home := environ.get("CUDA_HOME") or environ.get("CUDA_PATH"):
        yield Path(home, "bin", "nvcc")
        return
    for folder in environ.get("PATH", "").split(os.pathsep):
        if on_path := shutil.which("nvcc", path=folder or os.curdir):
            yield Path(on_path).absolute()
    homes = [Path(environ["CONDA_PREFIX"])] if environ.get("CONDA_PREFIX") else []
    for folder in wheels():
        homes += sorted(folder.glob("cu*"), reverse=True)  # cu13; before CUDA 13, cuda_nvcc
    yield from (nvcc for home in [*homes, *SYSTEM_HOMES] if (nvcc := home / "bin" / "nvcc").is_file())


def wheels() -> list[Path]:
    """Where pip puts its wheels of the toolkit: ``site-packages/nvidia``."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]


def inspect(nvcc: Path, torch_cuda: str | None) -> Toolkit | str:
    """The toolkit that this nvcc really uses, or what it lacks for a torch built with CUDA ``torch_cuda``, if any."""
    if not nvcc.is_file():
        return f"there is no {nvcc}"
    for call in dict.fromkeys([nvcc, nvcc.resolve()]):  # it does not look through a link to itself
        plan = answer(call, "--dryrun", "-x", "cu", "-c", os.devnull)
        told = dict(re.findall(r"^#\$ (\w+)=(.*)$", plan, re.MULTILINE))
        if "TOP" in told:  # it has read its profile
            break
    version = release(call)
    if version is None:
        return f"{nvcc} does not say its version"
    major = version.split(".")[0]
    if torch_cuda and major != torch_cuda.split(".")[0]:
        return f"{nvcc} is of CUDA {version}, and torch is built with CUDA {torch_cuda}"
    home = Path(told.get("_HERE_", call.parent)).resolve().parent  # of what a script calls; silent without a compiler
    if not (home / "bin" / "nvcc").is_file():
        return f"{nvcc} does not say where its toolkit is"
    folders = [Path(flag[2:]).resolve() for flag in shlex.split(told.get("INCLUDES", "")) if flag.startswith("-I")]
    folders += [home / "include", *sorted(home.glob("targets/*/include"))]  # conda: targets
    folders += [home.parent / "cuda_runtime" / "include", SYSTEM_INCLUDE]  # wheels before CUDA 13; Debian
    for include in folders:
        if (include / "cuda_runtime.h").is_file() and major_of_headers(include) in (major, None):
            places = [include, include / "cccl", *folders]
            lacking = [header for header in HEADERS if not any((place / header).is_file() for place in places)]
            return f"{nvcc} has no {lacking[0]} in {include}" if lacking else Toolkit(call, version, home, include)
    return f"{nvcc} has no cuda_runtime.h of CUDA {major} in {home}"


def major_of_headers(include: Path) -> str | None:
    """``"13"``; None where they do not say it."""
    header = include / "cuda_runtime_api.h"
    found = (
        re.search(r"define\s+CUDART_VERSION\s+(\d+)", header.read_text(errors="replace")) if header.is_file() else None
    )
    return str(int(found[1]) // 1000) if found else None


def find_toolkit(torch_cuda: str | None, environ: Mapping[str, str]) -> Toolkit | str:
    """The first toolkit that fits a torch built with CUDA ``torch_cuda``, if any; else what the likeliest one lacks."""
    lacking = []
    for nvcc in candidates(environ):
        found = inspect(nvcc, torch_cuda)
        if isinstance(found, Toolkit):
            if lacking:
                print(f"fused_reg: building with {found.nvcc}, because {lacking[0]}")
            return found
        lacking.append(found)
    return lacking[0] if lacking else "no nvcc is found"


def choose(torch_cuda: str | None, environ: Mapping[str, str]) -> Toolkit | None:
    """The toolkit to build for CUDA with, whether or not there is a GPU; None to build for the CPU.

    Args:
        torch_cuda: the CUDA version of torch; None for a torch without CUDA.
        environ: ``FUSED_REG_CUDA=0`` leaves CUDA out; ``FORCE_CUDA=1`` makes what is missing an error;
            ``CUDA_HOME``, ``CUDA_PATH``, ``PATH`` and ``CONDA_PREFIX`` say where to look.

    Raises:
        SystemExit: CUDA is asked for and cannot be had.
    """
    for name in ("FORCE_CUDA", "FUSED_REG_CUDA"):
        if environ.get(name, "") not in ("", "0", "1"):
            raise SystemExit(f"fused_reg: {name} must be 0 or 1, got {environ[name]!r}")
    force = environ.get("FORCE_CUDA") == "1"
    if environ.get("FUSED_REG_CUDA") == "0":
        if force:
            raise SystemExit("fused_reg: FORCE_CUDA=1 asks for CUDA and FUSED_REG_CUDA=0 leaves it out; unset one")
        return None
    if torch_cuda is None:
        if force:
            raise SystemExit(
                "fused_reg: FORCE_CUDA=1 needs a torch with CUDA, and the installed one is built without it; "
                "install one as https://pytorch.org says, or unset FORCE_CUDA"
            )
        return None
    found = find_toolkit(torch_cuda, environ)
    if isinstance(found, Toolkit):
        return found
    mend = f"install the CUDA {torch_cuda.split('.')[0]} toolkit and set CUDA_HOME to its folder"
    if force:
        raise SystemExit(f"fused_reg: FORCE_CUDA=1 cannot be met, because {found}; {mend}")
    print(f"fused_reg: building for the CPU only, because {found}; for CUDA {mend}")
    return None
