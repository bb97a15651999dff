"""Compiles the CUDA backend without a GPU: ``python -m scripts.check_cuda_compile [--quick | --update]``.

nvcc compiles the kernels for every architecture below, warnings being errors. No kernel may use local memory (a stack
frame or spilled registers), nor more than MAX_REGISTERS, which is what keeps enough blocks resident. The registers are
compared with csrc/cuda/registers.md; a difference is printed and no failure, since versions of nvcc differ. The C++
compiler compiles the torch side, which a torch without CUDA has the headers for. The quick form compiles the kernels
alone, for one architecture.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

import build_config
from cuda_toolkit import Toolkit, candidates, find_toolkit

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 110, 120)
QUICK = 90
MAX_REGISTERS = 128  # a thread, of 65,536 a multiprocessor: 512 threads are resident
RECORD = build_config.CSRC / "cuda" / "registers.md"


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel for one architecture."""

    name: str
    architecture: int
    registers: int
    local_bytes: int  # stack frame, spill stores and loads, and local memory together


def short_name(signature: str) -> str:
    """``twice<float,true>`` of ``void fused_reg::(anonymous namespace)::twice<float, true>(float*, int)``."""
    for noise in ("(anonymous namespace)::", "fused_reg::", "(bool)", "(int)", "void "):
        signature = signature.replace(noise, "")
    return re.sub(r"\(.*\)$", "", signature).replace(" ", "")


def parse_report(text: str) -> list[Kernel]:
    """The kernels in the output of ``nvcc -Xptxas -v``."""
    kernels = []
    for part in text.split("Compiling entry function ")[1:]:
        head = re.match(r"'(.+)' for 'sm_(\d+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not (head and registers and frames):
            raise ValueError(f"ptxas wrote what this script cannot read: {part}")
        local = [*sum(frames, ()), *re.findall(r"(\d+) bytes lmem", part)]
        kernels.append(Kernel(short_name(head[1]), int(head[2]), int(registers[1]), sum(map(int, local))))
    return kernels


def failures(kernels: list[Kernel]) -> list[str]:
    out = [] if kernels else ["no kernel is in the report"]
    for k in kernels:
        where = f"{k.name} for sm_{k.architecture}"
        if k.local_bytes:
            out.append(f"{where} uses local memory: {k.local_bytes} bytes of stack frame, spills and lmem")
        if k.registers > MAX_REGISTERS:
            out.append(f"{where} uses {k.registers} registers, more than {MAX_REGISTERS}")
    return out


def table(kernels: list[Kernel]) -> str:
    """Registers, a line per kernel and a column per architecture."""
    used = {(k.name, k.architecture): k.registers for k in kernels}
    architectures = sorted({k.architecture for k in kernels})
    rows = [["kernel", *(f"sm_{a}" for a in architectures)], ["---", *("---:" for _ in architectures)]]
    for name in sorted({k.name for k in kernels}):
        rows.append([f"`{name}`", *(str(used.get((name, a), "")) for a in architectures)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def run(command: list[str | Path]) -> str:
    """The output of both kinds; the script ends where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\nfailed with status {done.returncode}")
    return done.stdout


def compile_kernels(nvcc: Path, source: Path, architecture: int, folder: Path) -> str:
    # The host's code, the launches, is the same for all: once is enough.
    kind, suffix = ("-c", "o") if architecture == QUICK else ("-cubin", "cubin")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    report = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    output = folder / f"{source.stem}_{architecture}.{suffix}"
    flags = [*COMMON_NVCC_FLAGS, *build_config.nvcc_flags(werror=True), "-std=c++17"]
    return run([nvcc, *flags, target, *report, kind, source, "-o", output])


def compile_torch_side(toolkit: Toolkit, source: Path, folder: Path) -> str:
    # A torch without CUDA has the headers, and not the one that the first macro leaves out.
    macros = [] if torch.version.cuda else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    includes = [f"-I{path}" for path in (*include_paths(), *toolkit.include_dirs())]
    includes += ["-isystem", str(toolkit.home / "include")]
    flags = [*build_config.cxx_flags(werror=True), "-std=c++20", "-fPIC", *macros, *includes]
    return run([os.environ.get("CXX", "g++"), *flags, "-c", source, "-o", folder / f"{source.stem}.o"])


def compile_all(toolkit: Toolkit, quick: bool) -> list[Kernel]:
    nvcc = toolkit.nvcc
    sources = [build_config.CSRC / name for name in build_config.sources("cuda")]
    known = run([nvcc, "--list-gpu-arch"]).split()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        torch_side = [] if quick else [s for s in sources if s.suffix == ".cpp"]
        jobs = [pool.submit(compile_torch_side, toolkit, s, Path(name)) for s in torch_side]
        jobs += [
            pool.submit(compile_kernels, nvcc, s, architecture, Path(name))
            for s in sources
            if s.suffix == ".cu"
            for architecture in ((QUICK,) if quick else ARCHITECTURES)
            if f"compute_{architecture}" in known
        ]
        report = "".join(job.result() for job in jobs)
    if shutil.which("c++filt"):
        report = subprocess.run(["c++filt"], input=report, capture_output=True, text=True, check=True).stdout
    return parse_report(report)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help=f"the kernels alone, for sm_{QUICK}")
    form.add_argument("--update", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args()

    toolkit = find_toolkit(None, os.environ)
    if isinstance(toolkit, str):
        lacks = toolkit if any(nvcc.is_file() for nvcc in candidates(os.environ)) else "no nvcc"
        required = os.environ.get("FUSED_REG_REQUIRE_NVCC") == "1"
        print(
            "CUDA compile check:", f"failed, FUSED_REG_REQUIRE_NVCC=1 and {lacks}" if required else f"skipped, {lacks}"
        )
        return int(required)
    kernels = compile_all(toolkit, options.quick)
    head = f"Registers per thread, by nvcc {toolkit.version} (`python -m scripts.check_cuda_compile --update`).\n\n"
    new = (head + table(kernels)).splitlines(keepends=True)
    if options.update:
        RECORD.write_text("".join(new))
    elif not options.quick:
        old = RECORD.read_text().splitlines(keepends=True) if RECORD.exists() else []
        print("".join(difflib.unified_diff(old, new, str(RECORD), "now", n=0)), end="")
    found = failures(kernels)
    print(*found, f"CUDA compile check: {'failed' if found else 'passed'}, {len(kernels)} kernels compiled", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
