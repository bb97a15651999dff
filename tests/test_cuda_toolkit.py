"""Which CUDA toolkit a build takes, in every layout there is, and what is said where none can be had."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cuda_toolkit

ROOT = Path(cuda_toolkit.__file__).parent
MEND = "install the CUDA 13 toolkit and set CUDA_HOME to its folder"
# What nvcc says of itself; it finds its toolkit from the path that it is called by.
SCRIPT = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--list-gpu-arch) printf 'compute_%s\\n' 75 80 86 87 88 89 90 100 110 103 120 121 ;;
--dryrun*)
  echo "#$ _HERE_=$here" >&2
  [ -e "$here/nvcc.profile" ] && sed "s|TOP_|$here/..|" "$here/nvcc.profile" >&2 ;;
esac
"""
PROFILE = """#$ TOP=TOP_
#$ INCLUDES="-ITOP_{include}"
#$ LIBRARIES=  "-LTOP_/lib64/stubs" "-LTOP_/lib64"
"""
DEBIAN = "#$ LIBRARIES=  -L/usr/lib/x86_64-linux-gnu/stubs\n"


def make_nvcc(home: Path, version: str = "13.0", profile: str = PROFILE.format(include="/include")) -> Path:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(SCRIPT.format(version=version))
    nvcc.chmod(0o755)
    if profile:
        (nvcc.parent / "nvcc.profile").write_text(profile)
    return nvcc


def make_headers(include: Path, version: int | None = 13000) -> Path:
    include.mkdir(parents=True, exist_ok=True)
    for header in ("cuda_runtime.h", *cuda_toolkit.HEADERS):
        (include / header).parent.mkdir(exist_ok=True)
        (include / header).touch()
    (include / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n" if version else "")
    return include


def make_script(path: Path, nvcc: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _bare_machine(monkeypatch, tmp_path):
    """No toolkit of this machine is seen."""
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_HOMES", [tmp_path / "local" / "cuda"])
    monkeypatch.setattr(cuda_toolkit, "SYSTEM_INCLUDE", tmp_path / "usr" / "include")
    monkeypatch.setattr(cuda_toolkit, "wheels", lambda: [tmp_path / "site-packages" / "nvidia"])


def plain(tmp_path):
    """NVIDIA's own, with its folder on the PATH."""
    nvcc = make_nvcc(tmp_path / "cuda")
    return {"PATH": str(nvcc.parent)}, nvcc.parents[1], make_headers(tmp_path / "cuda" / "include"), []


def script(tmp_path):
    """An nvcc on the PATH that calls another: torch takes the folder of the script."""
    nvcc = make_nvcc(tmp_path / "cuda")
    path = make_script(tmp_path / "usr" / "local" / "bin" / "nvcc", nvcc)
    return {"PATH": str(path.parent)}, nvcc.parents[1], make_headers(tmp_path / "cuda" / "include"), []


def script_in_cuda_home(tmp_path):
    environ, *expected = script(tmp_path)
    return {"CUDA_HOME": str(Path(environ["PATH"]).parent), "PATH": ""}, *expected


def link(tmp_path):
    """nvcc does not look through a link for its own folder."""
    nvcc = make_nvcc(tmp_path / "cuda")
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.symlink_to(nvcc)
    return {"PATH": str(path.parent)}, nvcc.parents[1], make_headers(tmp_path / "cuda" / "include"), []


def debian(tmp_path):
    """/usr/bin/nvcc is a script, and the headers are where every compiler looks: naming that folder would harm."""
    nvcc = make_nvcc(tmp_path / "usr" / "lib" / "nvidia-cuda-toolkit", profile=DEBIAN)
    path = make_script(tmp_path / "usr" / "bin" / "nvcc", nvcc)
    return {"PATH": str(path.parent)}, nvcc.parents[1], make_headers(tmp_path / "usr" / "include"), []


def headers_elsewhere(tmp_path):
    """As some packages for Fedora have it: a folder that only nvcc knows."""
    nvcc = make_nvcc(tmp_path / "usr", profile=PROFILE.format(include="/include/cuda"))
    include = make_headers(tmp_path / "usr" / "include" / "cuda")
    return {"PATH": str(nvcc.parent)}, nvcc.parents[1], include, [str(include)]


def conda(tmp_path, target="x86_64-linux", on_path=True):
    nvcc = make_nvcc(tmp_path / "env", profile=PROFILE.format(include=f"/targets/{target}/include"))
    (tmp_path / "env" / "include").mkdir()
    include = make_headers(tmp_path / "env" / "targets" / target / "include")
    environ = {"PATH": str(nvcc.parent) if on_path else "", "CONDA_PREFIX": str(tmp_path / "env")}
    return environ, nvcc.parents[1], include, [str(include)]


def conda_for_arm(tmp_path):
    return conda(tmp_path, target="sbsa-linux")


def conda_not_on_the_path(tmp_path):
    return conda(tmp_path, on_path=False)


def wheels(tmp_path):
    """pip's nvidia-cuda-nvcc, beside torch's own wheels."""
    home = tmp_path / "site-packages" / "nvidia" / "cu13"
    make_nvcc(home, profile=PROFILE.format(include="//include"))
    return {"PATH": ""}, home, make_headers(home / "include"), []


def wheels_before_cuda_13(tmp_path):
    home = tmp_path / "site-packages" / "nvidia" / "cuda_nvcc"
    make_nvcc(home)
    include = make_headers(home.parent / "cuda_runtime" / "include")
    return {"PATH": ""}, home, include, [str(include)]


def usual_folder(tmp_path):
    home = tmp_path / "local" / "cuda"
    make_nvcc(home)
    return {"PATH": ""}, home, make_headers(home / "include"), []


def cuda_path(tmp_path):
    """CUDA_PATH is CUDA_HOME's other name; an empty CUDA_HOME is none."""
    nvcc = make_nvcc(tmp_path / "cuda")
    environ = {"CUDA_HOME": "", "CUDA_PATH": str(nvcc.parents[1])}
    return environ, nvcc.parents[1], make_headers(tmp_path / "cuda" / "include"), []


def silent(tmp_path):
    """An nvcc that does not say what it uses, as where its host compiler is missing: the usual folders."""
    nvcc = make_nvcc(tmp_path / "cuda", profile="")
    include = make_headers(tmp_path / "cuda" / "targets" / "x86_64-linux" / "include")
    return {"PATH": str(nvcc.parent)}, nvcc.parents[1], include, [str(include)]


def headers_without_version(tmp_path):
    nvcc = make_nvcc(tmp_path / "cuda")
    return {"PATH": str(nvcc.parent)}, nvcc.parents[1], make_headers(tmp_path / "cuda" / "include", version=None), []


LAYOUTS = [
    plain,
    script,
    script_in_cuda_home,
    link,
    debian,
    headers_elsewhere,
    conda,
    conda_for_arm,
    conda_not_on_the_path,
    wheels,
    wheels_before_cuda_13,
    usual_folder,
    cuda_path,
    silent,
    headers_without_version,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_layouts(layout, tmp_path, capsys):
    environ, home, include, include_dirs = layout(tmp_path)
    found = cuda_toolkit.choose("13.2", {**environ, "FORCE_CUDA": "1"})
    assert (found.home, found.include, found.version) == (home, include, "13.0")
    assert found.include_dirs() == include_dirs
    assert found.nvcc.is_file()
    assert capsys.readouterr().out == ""


def no_nvcc(tmp_path):
    return {"PATH": ""}, "no nvcc is found"


def no_nvcc_in_cuda_home(tmp_path):
    """What the user names is taken at their word, and not replaced."""
    environ, *_ = usual_folder(tmp_path)
    return {**environ, "CUDA_HOME": str(tmp_path / "x")}, f"there is no {tmp_path}/x/bin/nvcc"


def no_headers(tmp_path):
    nvcc = make_nvcc(tmp_path / "cuda")
    return {"PATH": str(nvcc.parent)}, f"{nvcc} has no cuda_runtime.h of CUDA 13 in {tmp_path}/cuda"


def no_headers_behind_a_script(tmp_path):
    path = make_script(tmp_path / "bin" / "nvcc", make_nvcc(tmp_path / "cuda"))
    return {"PATH": str(path.parent)}, f"{path} has no cuda_runtime.h of CUDA 13 in {tmp_path}/cuda"


def headers_of_another_cuda(tmp_path):
    make_headers(tmp_path / "cuda" / "include", version=12080)
    return no_headers(tmp_path)


def another_cuda(tmp_path):
    nvcc = make_nvcc(tmp_path / "cuda", version="12.8")
    make_headers(tmp_path / "cuda" / "include", version=12080)
    return {"PATH": str(nvcc.parent)}, f"{nvcc} is of CUDA 12.8, and torch is built with CUDA 13.2"


def versions_are_numbers(tmp_path):
    nvcc = make_nvcc(tmp_path / "cuda", version="1.3")
    return {"PATH": str(nvcc.parent)}, f"{nvcc} is of CUDA 1.3, and torch is built with CUDA 13.2"


def broken(tmp_path):
    nvcc = make_nvcc(tmp_path / "cuda")
    nvcc.write_bytes(b"\x7fELF of another machine")
    return {"PATH": str(nvcc.parent)}, f"{nvcc} does not say its version"


def script_without_toolkit(tmp_path):
    """What it calls says its version, and nothing else."""
    path = make_nvcc(tmp_path / "cuda").replace(tmp_path / "nvcc")
    path.write_text(path.read_text().replace("#$ _HERE_", ""))
    return {"PATH": str(path.parent)}, f"{path} does not say where its toolkit is"


LACKING = [
    no_nvcc,
    no_nvcc_in_cuda_home,
    no_headers,
    no_headers_behind_a_script,
    headers_of_another_cuda,
    another_cuda,
    versions_are_numbers,
    broken,
    script_without_toolkit,
]


@pytest.mark.parametrize("machine", LACKING, ids=lambda machine: machine.__name__)
def test_what_is_lacking(machine, tmp_path, capsys):
    """The CPU is built for, and one sentence says so; it is an error where CUDA is asked for."""
    environ, lacks = machine(tmp_path)
    assert cuda_toolkit.choose("13.2", environ) is None
    assert capsys.readouterr().out == f"fused_reg: building for the CPU only, because {lacks}; for CUDA {MEND}\n"
    with pytest.raises(SystemExit) as error:
        cuda_toolkit.choose("13.2", {**environ, "FORCE_CUDA": "1"})
    assert str(error.value) == f"fused_reg: FORCE_CUDA=1 cannot be met, because {lacks}; {MEND}"


def test_next_one(tmp_path, capsys):
    """Where the nvcc on the PATH does not fit, another is taken, and it says so."""
    environ, lacks = another_cuda(tmp_path)
    _, home, *_ = wheels(tmp_path)
    found = cuda_toolkit.choose("13.0", environ)
    assert found.home == home
    lacks = lacks.replace("13.2", "13.0")
    assert capsys.readouterr().out == f"fused_reg: building with {home}/bin/nvcc, because {lacks}\n"


CONTRADICTION = "FORCE_CUDA=1 asks for CUDA and FUSED_REG_CUDA=0 leaves it out; unset one"
NO_TORCH = (
    "FORCE_CUDA=1 needs a torch with CUDA, and the installed one is built without it; "
    "install one as https://pytorch.org says, or unset FORCE_CUDA"
)


def test_what_the_user_asks(tmp_path, capsys):
    environ, *_ = plain(tmp_path)
    for asked in ({}, {"FORCE_CUDA": "0", "FUSED_REG_CUDA": "1"}, {"FORCE_CUDA": "1"}):
        assert cuda_toolkit.choose("13.0", {**environ, **asked}).version == "13.0"
    assert cuda_toolkit.choose("13.0", {**environ, "FUSED_REG_CUDA": "0"}) is None
    assert cuda_toolkit.choose(None, environ) is None
    for torch_cuda in (None, "13.0"):
        with pytest.raises(SystemExit, match=f"^fused_reg: {re.escape(CONTRADICTION)}$"):
            cuda_toolkit.choose(torch_cuda, {**environ, "FORCE_CUDA": "1", "FUSED_REG_CUDA": "0"})
    with pytest.raises(SystemExit, match=f"^fused_reg: {re.escape(NO_TORCH)}$"):
        cuda_toolkit.choose(None, {**environ, "FORCE_CUDA": "1"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("known", "processor", "expected"),
    [
        ("75 80 86 87 88 89 90 100 110 103 120 121", "x86_64", "7.5;8.0;8.6;8.9;9.0;10.0;10.3;12.0+PTX"),
        ("75 80 86 87 88 89 90 100 110 103 120 121", "aarch64", "7.5;8.0;8.6;8.7;8.9;9.0;10.0;10.3;11.0;12.0+PTX"),
        ("50 52 53 60 61 62 70 72 75 80 86 87 89 90", "x86_64", "7.5;8.0;8.6;8.9;9.0+PTX"),
        ("50 52 53 60 61 62 70 72 75 80 86 87 89 90", "aarch64", "7.5;8.0;8.6;8.7;8.9;9.0+PTX"),
        ("75 80 86 87 89 90 100 101 120", "x86_64", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),  # CUDA 12.8
        ("80 90 100 120 130", "x86_64", "8.0;9.0;10.0;12.0+PTX"),
    ],
)
def test_default_architectures(known, processor, expected, tmp_path, monkeypatch):
    """A toolkit is asked only for what it knows, and the newest comes as PTX too, for GPUs that are newer still. Boards
    with an Arm processor have GPUs of their own."""
    environ, *_ = plain(tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    found = cuda_toolkit.choose("13.0", environ)
    found.nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {known}\n")
    assert found.architectures() == expected


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        pytest.param(
            {"FORCE_CUDA": "1"},
            NO_TORCH,
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="torch with CUDA"),
        ),
        ({"FORCE_CUDA": "1", "FUSED_REG_CUDA": "0"}, CONTRADICTION),
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


def test_headers_of_a_wheel_of_its_own_are_missing(tmp_path):
    """pip's runtime has cuda_runtime.h, and not what cuda_fp16.h includes."""
    environ, home, include, _ = plain(tmp_path)
    (include / "nv" / "target").unlink()
    assert cuda_toolkit.inspect(home / "bin" / "nvcc", "13.0") == f"{home}/bin/nvcc has no nv/target in {include}"
    make_headers(include / "cccl")
    assert cuda_toolkit.find_toolkit("13.0", environ).home == home


def test_the_second_nvcc_on_the_path_is_taken_where_the_first_does_not_fit(tmp_path, capsys):
    old, (environ, home, *_) = make_nvcc(tmp_path / "old", "12.8"), plain(tmp_path)
    environ = {"PATH": f"{old.parent}{os.pathsep}{environ['PATH']}"}
    assert cuda_toolkit.find_toolkit("13.0", environ).home == home
    assert "is of CUDA 12.8, and torch is built with CUDA 13.0" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["FORCE_CUDA", "FUSED_REG_CUDA"])
def test_a_switch_is_0_or_1(name):
    with pytest.raises(SystemExit, match=f"^fused_reg: {name} must be 0 or 1, got 'off'$"):
        cuda_toolkit.choose("13.0", {name: "off"})
