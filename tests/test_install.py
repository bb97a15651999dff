"""The README's lines of installation, in a clone's own folder, whose fused_reg hides the installed one."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = shutil.ignore_patterns("build", "dist", ".*", "*.so", "*.egg-info", "__pycache__", "results", "pictures")
# The environment has torch and the tools already, and the folder is a clone.
NOT_HERE = ("git clone", "cd ", "pip install torch", "pip install --upgrade", "make ")


def readme_lines() -> list[str]:
    """The commands of the Install section, without comments."""
    section = re.search(r"^## Install$(.*?)^## ", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    return [line for line in (line.partition("#")[0].strip() for line in code.splitlines()) if line]


def test_readme_names_the_lines():
    lines = readme_lines()
    assert "pip install --no-build-isolation ." in lines
    assert "python -m fused_reg" in lines


def test_every_tool_has_its_tested_version():
    """After a change of the extras: `make constraints`. torch, and what it alone brings, is TORCH."""
    extras = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    tools = {name.lower() for name in re.findall(r'"([\w-]+)', extras)} - {"fused_reg"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()[1:]
    assert tools <= {line.partition("==")[0] for line in lines}
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", line)
        assert not re.match(r"torch=|triton=|nvidia-(?!cuda-nvdisasm)|cuda-", line)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clone, and beside it a new environment that has what this one has, save fused_reg."""
    folder = tmp_path_factory.mktemp("install")
    shutil.copytree(ROOT, folder / "clone", ignore=NOT_SOURCE)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    for old in site.glob("setuptools*"):
        shutil.rmtree(old)
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "outer.pth").write_text("\n".join(paths))
    return folder / "clone"


def run(line: str, clone: Path) -> str:
    """In the clone, in the environment; its output of both kinds."""
    path = [clone.parent / "venv" / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    environ = {**os.environ, "PATH": os.pathsep.join(map(str, path)), "FUSED_REG_CUDA": "0"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(
        line, shell=True, cwd=clone, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}"
    return done.stdout


@pytest.mark.long
def test_readme_lines_in_the_clone(clone):
    outputs = {line: run(line, clone) for line in readme_lines() if not line.startswith(NOT_HERE)}
    assert "self-check cpu torch.float32: ok" in outputs["python -m fused_reg"]
    for line in ("python -c 'import fused_reg; print(fused_reg.__file__)'", "python -m benchmarks --help"):
        output = run(line, clone)
        assert f"UserWarning: fused_reg: {clone}/fused_reg has no compiled part, so {clone.parent}/venv/" in output
    outside = run("cd .. && python -m fused_reg", clone)
    assert "self-check cpu torch.float32: ok" in outside
    assert "Warning" not in outside
