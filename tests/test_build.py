"""What setup.py decides: whether CUDA is built, for which GPUs, and what it says when it cannot be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import build_config

ROOT = Path(build_config.__file__).parent
NVCC = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Cuda compilation tools, release 13.0, V13.0.88
Build cuda_13.0.r13.0/compiler.36424714_0
"""
TOOLKIT = "install the CUDA 13 toolkit and set CUDA_HOME to its folder"
CONTRADICTION = "FORCE_CUDA=1 asks for CUDA and FUSED_REG_CUDA=0 leaves it out; unset one"
NO_TORCH = (
    "FORCE_CUDA=1 needs a torch with CUDA, and the installed one is built without it; "
    "install one as https://pytorch.org says, or unset FORCE_CUDA"
)
NO_NVCC = f"FORCE_CUDA=1 needs nvcc, and none is found; {TOOLKIT}"
MISMATCH = (
    "nvcc is of CUDA 12.8, and torch is built with CUDA 13.0; "
    f"{TOOLKIT}, or set FUSED_REG_CUDA=0 to build for the CPU only"
)
DEFAULT, FORCE, LEAVE_OUT = {}, {"FORCE_CUDA": "1"}, {"FUSED_REG_CUDA": "0"}


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "default", "forced"),
    [
        (None, None, False, NO_TORCH),
        (None, "13.0", False, NO_TORCH),
        ("13.0", None, False, NO_NVCC),
        ("13.0", "13.0", True, True),
        ("13.0", "13.2", True, True),
        ("13.0", "12.8", MISMATCH, MISMATCH),
    ],
)
def test_whether_cuda_is_built(torch_cuda, nvcc, default, forced):
    expectations = [
        (DEFAULT, default),
        ({"FORCE_CUDA": "0", "FUSED_REG_CUDA": "1"}, default),
        (FORCE, forced),
        (LEAVE_OUT, False),
        ({**FORCE, **LEAVE_OUT}, CONTRADICTION),
    ]
    for environ, expected in expectations:
        if isinstance(expected, str):
            with pytest.raises(SystemExit) as error:
                build_config.use_cuda(torch_cuda, nvcc, environ)
            assert str(error.value) == f"fused_reg: {expected}"
        else:
            assert build_config.use_cuda(torch_cuda, nvcc, environ) is expected, environ


def test_versions_are_numbers():
    """CUDA 9 is not CUDA 90, and no part of 13."""
    for torch_cuda, nvcc in [("13.0", "1.3"), ("9.0", "90.0")]:
        with pytest.raises(SystemExit, match=re.escape(f"nvcc is of CUDA {nvcc}")):
            build_config.use_cuda(torch_cuda, nvcc, DEFAULT)


def test_says_how_to_get_cuda(capsys):
    """Only where torch has CUDA and the user did not leave it out."""
    build_config.use_cuda(None, None, DEFAULT)
    build_config.use_cuda("13.0", None, LEAVE_OUT)
    build_config.use_cuda("13.0", "13.0", DEFAULT)
    assert capsys.readouterr().out == ""
    build_config.use_cuda("13.0", None, DEFAULT)
    sentence = f"fused_reg: building for the CPU only, because no nvcc is found; for CUDA {TOOLKIT}\n"
    assert capsys.readouterr().out == sentence


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("75 80 86 87 88 89 90 100 110 103 120 121", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),
        ("50 52 53 60 61 62 70 72 75 80 86 87 89 90", "7.5;8.0;8.6;8.9;9.0+PTX"),
        ("80 90 100 120 130", "8.0;9.0;10.0;12.0+PTX"),
    ],
)
def test_default_architectures(known, expected):
    """A toolkit is asked only for what it knows, and the newest comes as PTX too, for GPUs that are newer still."""
    answer = "".join(f"compute_{number}\n" for number in known.split())
    assert build_config.default_architectures(answer) == expected


def test_nvcc_is_asked(tmp_path):
    assert build_config.ask_nvcc(None, "--version") == ""
    assert build_config.ask_nvcc(str(tmp_path), "--version") == ""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo '{NVCC}'\n")
    nvcc.chmod(0o755)
    assert build_config.nvcc_version(build_config.ask_nvcc(str(tmp_path), "--version")) == "13.0"
    assert build_config.nvcc_version("") is None


def test_flags():
    """Bits are promised; and torch adds no architectures where a flag names one."""
    for werror in (False, True):
        cxx, nvcc = build_config.cxx_flags(werror), build_config.nvcc_flags(werror)
        assert ("-Werror" in cxx, "-Werror" in nvcc) == (werror, werror)
        assert "-ffp-contract=off" in cxx
        assert "-fmad=false" in nvcc
        assert not any(word in flag for flag in [*cxx, *nvcc] for word in ("fast", "arch"))


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        pytest.param(
            FORCE, NO_TORCH, marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch with CUDA")
        ),
        ({**FORCE, **LEAVE_OUT}, CONTRADICTION),
    ],
)
def test_setup_says_one_sentence(environ, sentence):
    """The decision is setup.py's own: no traceback."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"fused_reg: {sentence}"
