"""What the times depend on, read from the machine that measures; nothing says whose machine it is."""

import os
import platform
import re
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

import fused_reg
from benchmarks.devices import Device, output_of
from benchmarks.results import Record
from fused_reg import _ops


def describe(device: Device) -> Record:
    """This machine, before the run, with the threads that torch uses and the GPU that is measured."""
    git = partial(output_of, "git", cwd=Path(__file__).parent)
    return {
        "cpu": _found("/proc/cpuinfo", r"model name\s*: (.*)") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),  # which `ATEN_CPU_CAPABILITY` may have lowered
        # Whether fresh memory comes in pages of 4 KiB or of 2 MiB: it sets the speed of a fresh copy.
        "huge_pages": _found("/sys/kernel/mm/transparent_hugepage/enabled", r"\[(.*)\]") or "unknown",
        "os": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fused_reg": fused_reg.__version__,
        "build": dict(_ops.library.build_info()),
        # A copy of the sources that has no history names its commit in a variable.
        "commit": git("rev-parse", "HEAD") or os.environ.get("FUSED_REG_COMMIT") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # over the minute before
        "gpu": device.gpu(),
    }


def _found(file: str, pattern: str) -> str:
    """What the pattern finds in a file, if there is one."""
    found = re.search(pattern, Path(file).read_text()) if Path(file).exists() else None
    return found[1] if found else ""
