"""What only a CUDA that can be made to fail shows; run by scripts/check_cuda_on_host.py."""

import os
import subprocess
import sys

import pytest

CALLS = """
import torch
import fused_reg
w = torch.ones(70_000, requires_grad=True)
for function in (fused_reg.fused_penalty, fused_reg.value_and_grad):
    try:
        function({params})
        print("no error")
    except RuntimeError as error:
        print(error)
"""


def answers(params: str, cuda_error: int) -> list[str]:
    run = [sys.executable, "-c", CALLS.format(params=params)]
    environ = {**os.environ, "CUDA_ON_HOST_ERROR": str(cuda_error)}
    return subprocess.run(run, env=environ, capture_output=True, text=True, check=True).stdout.splitlines()


LISTS = pytest.mark.parametrize("params", ["[w]", "[w] * 2000"])  # whose table is uploaded first


@LISTS
@pytest.mark.parametrize("cuda_error", [98, 209])  # no function, no kernel image for the device
def test_an_architecture_that_was_not_built_for_is_named(params, cuda_error):
    sentence = (
        "fused_reg: built for the CUDA architectures 7.5 9.0, but cpu has 9.9; "
        'build it again with TORCH_CUDA_ARCH_LIST="9.9"'
    )
    assert answers(params, cuda_error) == [sentence] * 2


@LISTS
def test_other_errors_come_out(params):
    assert answers(params, 700) == ["CUDA error 700"] * 2


@LISTS
def test_no_error(params):
    assert answers(params, 0) == ["no error"] * 2
