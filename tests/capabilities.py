"""The instruction sets of this CPU, and Python in each of them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def capabilities() -> dict[str, str]:
    """What is asked for, and what is then in use: all that this CPU has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"default": "baseline"}
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    avx2 = has.get("avx2", torch.cpu._is_avx2_supported())
    avx512 = has.get("avx512_f", torch.cpu._is_avx512_supported())
    return {"default": "baseline"} | ({"avx2": "AVX2"} if avx2 else {}) | ({"avx512": "AVX512"} if avx512 else {})


def output_with(asked: str, code: str, *arguments: object) -> str:
    """What code prints that may import from this folder; it has used the instruction set that was asked for."""
    folder = Path(__file__).parent
    told = "\nfrom fused_reg import _ops; print(_ops.library.build_info()['cpu_capability'])"
    done = subprocess.run(
        [sys.executable, "-c", code + told, *map(str, arguments)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": asked, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    printed, _, used = done.stdout.rstrip().rpartition("\n")
    assert used == capabilities()[asked]
    return printed
