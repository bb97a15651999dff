"""No bit has changed since 0.1: of values, gradients, proximal steps, norms and reports, in every instruction set.

A difference is a change of what users get, and a line in the CHANGELOG; golden.py writes the hashes anew.
"""

import json

import golden
import pytest
from capabilities import capabilities, output_with

#: The blocks of each test: with ``--long`` all of them.
SHARES = [range(0, golden.BLOCKS, 16), *(range(first, golden.BLOCKS, 4) for first in range(4))]

HASHES = "import golden, json, sys; print(json.dumps([golden.hashes(int(b)) for b in sys.argv[1:]]))"


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


@pytest.mark.parametrize("asked", capabilities())
@pytest.mark.parametrize("share", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, len(SHARES)))])
def test_instruction_sets(asked, share):
    """The instruction set that was asked for is used, and gives the recorded bits."""
    hashes = json.loads(output_with(asked, HASHES, *SHARES[share]))
    assert _changed(SHARES[share], hashes) == []
