"""What the times depend on, read from the machine that measures."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import fused_reg
from benchmarks.run import Gpu, Machine
from fused_reg import _ops

_REPOSITORY = Path(__file__).resolve().parent.parent


# The commit of a copy of the sources that has no history.
_COMMIT = "FUSED_REG_COMMIT"


def describe(gpu: Gpu | None = None) -> Machine:
    """This machine, before the run, with the threads that torch uses and the GPU that is measured."""
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        capability=capability(),
        huge_pages=_huge_pages(),
        os=" ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        python=platform.python_version(),
        torch=torch.__version__,
        fused_reg=fused_reg.__version__,
        build=dict(_ops.library.build_info()),
        commit=_git("rev-parse", "HEAD") or os.environ.get(_COMMIT) or "unknown",
        dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        gpu=gpu,
    )


def capability() -> str:
    """The instruction set that torch and we use, which `ATEN_CPU_CAPABILITY` may have lowered."""
    return torch.backends.cpu.get_cpu_capability()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _huge_pages() -> str:
    """Whether fresh memory comes in pages of 4 KiB or of 2 MiB: it sets the speed of a fresh copy."""
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return setting.split("[")[-1].split("]")[0]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
