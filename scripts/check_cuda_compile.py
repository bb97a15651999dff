"""Compiles the CUDA backend without a GPU: ``python -m scripts.check_cuda_compile [--quick | --update]``.

nvcc compiles all kernels for one architecture, and for every other that ships those of csrc/cuda/machine_code.cu and
relative_kernels.cu, warnings being errors; nvdisasm prints their machine code. No kernel may use local memory, or more
than MAX_REGISTERS; no figure may be worse than the record, which is of one version of nvcc: with another one
differences are printed and no failure (scripts/machine_code.py). The C++ compiler compiles the torch side, which a
torch without CUDA has the headers for. The quick form compiles the kernels alone, for one architecture.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

import build_config
import cuda_toolkit
from cuda_toolkit import Toolkit, candidates, find_toolkit
from scripts import predicted_share
from scripts.machine_code import Kernel, failures, parse_code, parse_report, read_record, readable, record, regressions

ARCHITECTURES = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120)  # which GPUs have
QUICK = 90
# One kernel of each pass and step, and of each with relative terms.
OF_EVERY_ARCHITECTURE = tuple(
    build_config.CSRC / "cuda" / f"{name}.cu" for name in ("machine_code", "relative_kernels")
)
RECORD = build_config.CSRC / "cuda" / "machine_code.md"


def run(command: list[str | Path]) -> str:
    """The output of both kinds; the script ends where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}\nfailed with status {done.returncode}")
    return done.stdout


def disassembler(toolkit: Toolkit) -> Path | None:
    """nvdisasm: the toolkit's, else that of the PATH, else that of pip's wheel."""
    on_path = shutil.which("nvdisasm")
    of_wheels = [home / "bin" / "nvdisasm" for folder in cuda_toolkit.wheels() for home in sorted(folder.glob("cu*"))]
    places = [toolkit.home / "bin" / "nvdisasm", *([Path(on_path)] if on_path else []), *of_wheels]
    return next((place for place in places if place.is_file()), None)


def compile_kernels(
    toolkit: Toolkit, nvdisasm: Path | None, source: Path, architecture: int, top: Path
) -> list[Kernel]:
    """The kernels of a source, with what their machine code tells where nvdisasm is at hand."""
    folder = top / f"{source.stem}_{architecture}"
    folder.mkdir()
    # The host's code, the launches, is the same for all architectures: once is enough.
    kind = ["-c", "--keep", f"--keep-dir={folder}"] if architecture == QUICK else ["-cubin"]
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    report = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
    flags = [*COMMON_NVCC_FLAGS, *build_config.nvcc_flags(werror=True), "-std=c++17"]
    output = folder / ("host.o" if architecture == QUICK else "kernels.cubin")
    kernels = parse_report(run([toolkit.nvcc, *flags, target, *report, *kind, source, "-o", output]))
    if nvdisasm is None:
        return kernels
    (cubin,) = folder.glob("*.cubin")
    figures = parse_code(run([nvdisasm, cubin]))
    shutil.rmtree(folder)
    return [replace(kernel, **figures[kernel.name]) for kernel in kernels]


def compile_torch_side(toolkit: Toolkit, source: Path, folder: Path) -> list[Kernel]:
    # A torch without CUDA has the headers, and not the one that the first macro leaves out.
    macros = [] if torch.version.cuda else ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    folders = (*include_paths(), *toolkit.include_dirs(), toolkit.home / "include")
    includes = [f"-isystem{path}" for path in folders]
    # C++17, as with the oldest torch that is supported; headers of newer ones warn of it.
    flags = [*build_config.cxx_flags(werror=True), "-std=c++17", "-fPIC", *macros, *includes]
    run([os.environ.get("CXX", "g++"), *flags, "-c", source, "-o", folder / f"{source.stem}.o"])
    return []


def compile_all(toolkit: Toolkit, nvdisasm: Path | None, quick: bool) -> list[Kernel]:
    sources = [build_config.CSRC / name for name in build_config.sources("cuda")]
    known = run([toolkit.nvcc, "--list-gpu-arch"]).split()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        wanted = [(source, QUICK) for source in sources if source.suffix == ".cu"]
        others = [a for a in ARCHITECTURES if a != QUICK and f"compute_{a}" in known and not quick]
        wanted += [(source, a) for a in others for source in OF_EVERY_ARCHITECTURE]
        jobs = [pool.submit(compile_kernels, toolkit, nvdisasm, source, a, Path(name)) for source, a in wanted]
        torch_side = [] if quick else [source for source in sources if source.suffix == ".cpp"]
        jobs += [pool.submit(compile_torch_side, toolkit, source, Path(name)) for source in torch_side]
        return readable([kernel for job in jobs for kernel in job.result()])


def page(kernels: list[Kernel], version: str) -> str:
    return record(kernels, version) + predicted_share.table(kernels)


def compare(kernels: list[Kernel], version: str) -> list[str]:
    """Prints what differs from the record, and returns what is worse where it is of this version of nvcc."""
    old = RECORD.read_text()
    lines = [text.splitlines(keepends=True) for text in (old, page(kernels, version))]
    print("".join(difflib.unified_diff(*lines, str(RECORD), "now", n=0)), end="")
    recorded_version, recorded = read_record(old)
    if recorded_version != version:
        print(f"the record is of nvcc {recorded_version}, this is {version}: a difference is no failure")
        return []
    return regressions(kernels, recorded)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quick", action="store_true", help=f"the kernels alone, for sm_{QUICK}")
    form.add_argument("--update", action="store_true", help=f"write {RECORD}")
    options = parser.parse_args()

    toolkit = find_toolkit(None, os.environ)
    required = os.environ.get("FUSED_REG_REQUIRE_NVCC") == "1"
    if isinstance(toolkit, str):
        lacks = toolkit if any(nvcc.is_file() for nvcc in candidates(os.environ)) else "no nvcc"
        print(
            "CUDA compile check:", f"failed, FUSED_REG_REQUIRE_NVCC=1 and {lacks}" if required else f"skipped, {lacks}"
        )
        return int(required)
    nvdisasm = disassembler(toolkit)
    if nvdisasm is None and (required or options.update):
        print("CUDA compile check: failed, no nvdisasm; `pip install nvidia-cuda-nvdisasm`")
        return 1
    kernels = compile_all(toolkit, nvdisasm, options.quick)
    found = failures(kernels)
    if options.update:
        RECORD.write_text(page(kernels, toolkit.version))
    elif nvdisasm is None:
        print("no nvdisasm is found: the machine code is not compared with the record")
    elif not options.quick:
        found += compare(kernels, toolkit.version)
    print(*found, f"CUDA compile check: {'failed' if found else 'passed'}, {len(kernels)} kernels compiled", sep="\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
