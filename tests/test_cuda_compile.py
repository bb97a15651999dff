"""What scripts/check_cuda_compile.py reads in ptxas's report, and what it makes a failure."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.check_cuda_compile import MAX_REGISTERS, Kernel, failures, parse_report, table

ROOT = Path(__file__).parent.parent
# Of nvcc 13.0, through c++filt.
CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void fused_reg::(anonymous namespace)::f<double, false>(double*)' for 'sm_75'
ptxas info    : Function properties for void fused_reg::(anonymous namespace)::f<double, false>(double*)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 2.581 ms
ptxas info    : Compiling entry function 'void fused_reg::(anonymous namespace)::f<float, true>(float*)' for 'sm_75'
ptxas info    : Function properties for void fused_reg::(anonymous namespace)::f<float, true>(float*)
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 1.874 ms
"""
SPILLS = """\
ptxas warning : Local memory used for function 'spill(float*, int)', size of stack frame: 1184 bytes
ptxas warning : Registers are spilled to local memory in function 'f(float*, int)', 16 bytes spill stores
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'spill(float*, int)' for 'sm_90'
ptxas info    : Function properties for spill(float*, int)
    1184 bytes stack frame, 1232 bytes spill stores, 1200 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1184 bytes cumulative stack size
ptxas info    : Compile time = 67.779 ms
ptxas info    : Function properties for f(float*, int)
    0 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
"""


def test_clean_report():
    kernels = parse_report(CLEAN)
    assert kernels == [Kernel("f<double,false>", 75, 8, 0), Kernel("f<float,true>", 75, 32, 0)]
    assert failures(kernels) == []


def test_spills_and_stack_frames():
    """Of the kernel and of a function that it calls."""
    kernels = parse_report(CLEAN + SPILLS)
    assert kernels[-1] == Kernel("spill", 90, 32, 1184 + 1232 + 1200 + 16 + 8)
    assert failures(kernels) == ["spill for sm_90 uses local memory: 3640 bytes of stack frame, spills and lmem"]


def test_local_memory():
    """As older versions of ptxas write it."""
    kernels = parse_report(CLEAN.replace("364 bytes cmem[0]", "40 bytes lmem, 364 bytes cmem[0]"))
    assert [k.local_bytes for k in kernels] == [40, 40]


def test_too_many_registers():
    (most, over) = (Kernel("f", 80, n, 0) for n in (MAX_REGISTERS, MAX_REGISTERS + 1))
    assert failures([most]) == []
    assert failures([most, over]) == [f"f for sm_80 uses {MAX_REGISTERS + 1} registers, more than {MAX_REGISTERS}"]


def test_nothing_was_compiled():
    assert failures(parse_report("")) == ["no kernel is in the report"]


@pytest.mark.parametrize("missing", ["Used 8 registers", "0 bytes stack frame", "sm_75"])
def test_report_of_another_form(missing):
    with pytest.raises(ValueError, match="ptxas wrote what this script cannot read"):
        parse_report(CLEAN.replace(missing, ""))


def test_table():
    kernels = [Kernel("b", 120, 30, 0), Kernel("b", 75, 32, 0), Kernel("a", 75, 8, 0)]
    expected = "| kernel | sm_75 | sm_120 |\n| --- | ---: | ---: |\n| `a` | 8 |  |\n| `b` | 32 | 30 |\n"
    assert table(kernels) == expected


@pytest.mark.parametrize(
    ("required", "status", "line"),
    [("0", 0, "skipped, no nvcc"), ("1", 1, "failed, FUSED_REG_REQUIRE_NVCC=1 and no nvcc")],
)
def test_without_nvcc(tmp_path, required, status, line):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.check_cuda_compile"],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(tmp_path), "FUSED_REG_REQUIRE_NVCC": required},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (status, f"CUDA compile check: {line}\n")
