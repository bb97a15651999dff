"""No bit has changed since 0.1: of values, gradients, proximal steps, norms and reports, in every instruction set.

A difference is a change of what users get, and a line in the CHANGELOG; golden.py writes the hashes anew.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch

#: The blocks of each test: with ``--long`` all of them.
SHARES = [range(0, golden.BLOCKS, 16), *(range(first, golden.BLOCKS, 4) for first in range(4))]

HASHES = """
import json, sys
import golden
from fused_reg import _ops
print(json.dumps([_ops.library.build_info()["cpu_capability"], [golden.hashes(int(b)) for b in sys.argv[1:]]]))
"""


def _capabilities() -> dict[str, str]:
    """What is asked for, and what is then in use: all that this CPU has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"default": "baseline"}
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    avx2 = has.get("avx2", torch.cpu._is_avx2_supported())
    avx512 = has.get("avx512_f", torch.cpu._is_avx512_supported())
    return {"default": "baseline"} | ({"avx2": "AVX2"} if avx2 else {}) | ({"avx512": "AVX512"} if avx512 else {})


def _changed(blocks, hashes) -> list[str]:
    recorded = golden.recorded()
    pairs = [(block, kind) for block in blocks for kind in range(len(golden.KINDS))]
    found = dict(zip(blocks, hashes, strict=True))
    return [f"{golden.KINDS[k]} of block {b}" for b, k in pairs if found[b][k] != recorded[b][k]]


def test_devices(device):
    """A GPU, and the CUDA operators on the host."""
    assert len(golden.recorded()) == golden.BLOCKS
    blocks = range(8, golden.BLOCKS, 32)
    assert _changed(blocks, [golden.hashes(block, device) for block in blocks]) == []


@pytest.mark.parametrize("asked", _capabilities())
@pytest.mark.parametrize("share", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, len(SHARES)))])
def test_instruction_sets(asked, share):
    """The instruction set that was asked for is used, and gives the recorded bits."""
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", HASHES, *map(str, SHARES[share])],
        env={**os.environ, "ATEN_CPU_CAPABILITY": asked, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        check=True,
    )
    capability, hashes = json.loads(done.stdout)
    assert capability == _capabilities()[asked]
    assert _changed(SHARES[share], hashes) == []
