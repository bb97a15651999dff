"""Tests the callbacks with the oldest trainers that the extras name: ``python -m scripts.check_oldest_trainers``.

They lie in an environment on top of this one, in build/oldest. All else is this one's.
"""

import re
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "oldest"
EXTRAS = ("lightning", "pytorch-lightning", "skorch", "transformers")


def oldest() -> list[str]:
    """``["lightning==2.4", ...]`` of the extras in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    lines = [re.search(rf"^{extra} = \[(.*)\]$", text, flags=re.MULTILINE) for extra in EXTRAS]
    found = [f"{name}=={version}" for line in lines if line for name, version in re.findall(r'"(.*?)>=(.*?)"', line[1])]
    if len({name.partition("==")[0] for name in found} & {*EXTRAS}) < len(EXTRAS):
        raise SystemExit(f"pyproject.toml: each of the extras {', '.join(EXTRAS)} must name its oldest version")
    return found


def main() -> int:
    venv.create(BUILD, with_pip=True)
    (site,) = BUILD.glob("lib/python*/site-packages")
    (site / "environment.pth").write_text(sysconfig.get_path("purelib"))
    python = BUILD / "bin" / "python"
    versions = oldest()
    print("oldest trainers:", ", ".join(versions), flush=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *versions], check=True)
    tests = sorted((ROOT / "tests").glob("test_integrations*.py"))
    return subprocess.run([python, "-m", "pytest", "--quiet", "--long", *tests], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
