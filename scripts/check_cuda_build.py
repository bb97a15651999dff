"""Builds and imports the package with CUDA, as a user would: ``python -m scripts.check_cuda_build``.

An environment with the torch that the registry gives (TORCH; several GB) and this machine's CUDA toolkit, for one
architecture and without a GPU, takes a copy of the source by the README's line. Without an nvcc it is skipped, unless
FUSED_REG_REQUIRE_NVCC=1. The environment stays in build/cuda_build.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda_build"
NOT_SOURCE = ("build", "dist", ".*", "*.so", "*.egg-info", "__pycache__")
# pip without a configuration of the user's own, which may lead to another torch.
ENVIRON = {name: os.environ[name] for name in ("PATH", "CUDA_HOME", "MAX_JOBS") if name in os.environ}
ENVIRON["HOME"] = str(BUILD / "home")


def run(*command: str | Path, **environ: str) -> str:
    """Its output; the script ends where the command fails."""
    done = subprocess.run(
        command,
        cwd=BUILD / "source",
        env=ENVIRON | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\nfailed with status {done.returncode}")
    return done.stdout


def check() -> str:
    if not any(nvcc.is_file() for nvcc in cuda_toolkit.candidates(ENVIRON)):
        return "skipped, no nvcc"
    shutil.rmtree(BUILD / "source", ignore_errors=True)
    shutil.copytree(ROOT, BUILD / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    run(sys.executable, "-m", "venv", BUILD / "venv")
    python = BUILD / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    run(*pip, os.environ.get("TORCH", "torch==2.13.0"), "setuptools>=77", "ninja")
    torch_cuda = run(python, "-c", "import torch; print(torch.version.cuda or '')").split()[-1:]
    if not torch_cuda:
        return "skipped, the registry's torch is built without CUDA"
    found = cuda_toolkit.find_toolkit(torch_cuda[0], ENVIRON)
    if isinstance(found, str):
        return f"skipped, {found}"
    forced = {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    run(*pip, "--no-build-isolation", "--no-deps", ".", **forced)
    said = run(python, "-m", "fused_reg")
    if not re.search(r"CUDA architectures +9\.0", said):
        raise SystemExit(f"{said}\nthe CUDA kernels are not in it")
    return f"passed, built with {found.nvcc} for torch with CUDA {torch_cuda[0]}"


def main() -> int:
    result = check()
    failed = result.startswith("skipped") and os.environ.get("FUSED_REG_REQUIRE_NVCC") == "1"
    print("CUDA build check:", result.replace("skipped", "failed, FUSED_REG_REQUIRE_NVCC=1:") if failed else result)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
