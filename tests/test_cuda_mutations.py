"""Faults that are put into the CUDA kernels must fail the kernels' test on the host (tests/cpp/cuda_on_host).

What orders threads and memory is left out by the CTests ``cuda_left_out``; here are the borders of loops, and what the
sums by integers of cards with few float64 units rest on.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

import build_config

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not sys.platform.startswith("linux") or not shutil.which("g++"), reason="for g++ on Linux"),
]
ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-fopenmp", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-ffp-contract=off"]
# The programs: that of cards with many float64 units, and of those with few.
MANY, FEW = "0", "1"
#: A program, a file of csrc/cuda, what stands in it once, and what shall stand in the place of what is in braces.
MUTATIONS = [
    (MANY, "cursor.cuh", "while ({end() <= c})", "end() < c"),
    (MANY, "value.cuh", "{i < call.runs + call.large_groups};", "i <= call.runs + call.large_groups"),
    (MANY, "chunk_pass.cuh", "x[k] = {i + k < end}", "i + k <= end"),
    (MANY, "chunk_pass.cuh", "if ({i + k < size_})", "i + k <= size_"),
    (MANY, "chunk_pass.cuh", "(can && {i + kCount <= end})", "i + kCount <= end + 1"),
    (MANY, "chunk_pass.cuh", "Part::kOfVectors || {i < end};", "i <= end"),
    (MANY, "cursor.cuh", "{chunk.size > kBlock} ||", "chunk.size > 2 * kBlock"),
    (MANY, "strips.cuh", "{thread / 2 < groups})", "thread / 2 <= groups"),
    (MANY, "group_kernels.cuh", "{(c + 1) % call.run_length == 0}))", "c % call.run_length == 0"),
    (MANY, "penalty_kernels.cuh", "{r < call.runs};", "r <= call.runs"),
    (FEW, "chunk_pass.cuh", "return {i < end} ? load(", "i <= end"),
    (FEW, "exact_sums.cuh", "is_exact && {rest == 0};", "true"),
    (FEW, "exact_sums.cuh", "{fmaf(rest, 0x1p23f, kSignedRounder - rounded_rest) == 0};", "true"),
    (FEW, "exact_sums.cuh", "exponent = {own > -105} ?", "true"),
    (FEW, "jobs.cuh", "is_exact && {!is_rare(element(r))};", "true"),
    (FEW, "jobs.cuh", "#pragma unroll 1\n    for (int r = 0; {r < kRows};", "r < kRows - 1"),
]
FAULT = """#include <cstdlib>
// The mutation that is put into effect, from 1 on.
inline const int fault = std::getenv("FAULT") ? std::atoi(std::getenv("FAULT")) : 0;
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The test with all mutations, of which a variable chooses one, for each kind of card: the programs' paths."""
    folder = tmp_path_factory.mktemp("mutations")
    shutil.copytree(ROOT / build_config.CSRC, folder / "csrc")
    shutil.copytree(ROOT / "tests" / "cpp", folder / "tests" / "cpp")
    (folder / "fault.h").write_text(FAULT)
    for number, (_, file, place, new) in enumerate(MUTATIONS, start=1):
        before, old, after = re.fullmatch(r"(.*)\{(.*)\}(.*)", place, re.DOTALL).groups()
        path = folder / "csrc" / "cuda" / file
        text = path.read_text()
        assert text.count(before + old + after) == 1, f"{before + old + after} does not stand in {file} once"
        either = f"(fault == {number} ? ({new}) : ({old}))"
        path.write_text(text.replace(before + old + after, before + either + after))
    include = [f"-I{folder / name}" for name in ("tests/cpp/cuda_on_host", "csrc")]
    include += [f"-isystem{path}" for path in include_paths()]
    compiler = ["g++", *FLAGS, *include]
    kernel, source = folder / "kernel.o", folder / "tests" / "cpp" / "test_cuda_kernels.cpp"
    subprocess.run([*compiler, "-c", folder / "csrc/cpu/chunk_kernel_baseline.cpp", "-o", kernel], check=True)
    for few in (MANY, FEW):
        own = [f"-DFUSED_REG_FEW_DOUBLES={few}", "-include", folder / "fault.h"]
        subprocess.run([*compiler, *own, source, kernel, "-o", folder / few], check=True)
    return {few: folder / few for few in (MANY, FEW)}


def fails(program, fault):
    """Whether the test fails: one check that does is enough."""
    command, environ = ["timeout", "300", program, "quick"], {**os.environ, "FAULT": str(fault)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environ) as process:
        said = process.stderr.readline()
        if said:
            process.terminate()
        return bool(said) or process.wait() != 0


@pytest.mark.parametrize("few", [MANY, FEW])
def test_without_a_fault(few, programs):
    assert not fails(programs[few], 0)


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1), ids=lambda n: MUTATIONS[n - 1][3])
def test_a_fault_is_noticed(number, programs):
    assert fails(programs[MUTATIONS[number - 1][0]], number)
