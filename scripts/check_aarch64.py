"""Tests the CPU backend on aarch64, which is emulated: ``python -m scripts.check_aarch64``.

A cross compiler builds the C++ tests with torch's libraries for aarch64, all in build/aarch64. One of them makes again
the calls that tests/recorded.py writes down on this machine, among them those of lists of golden.csv. For root, apt-get
installs a missing tool. Where something cannot be had the check is skipped, unless FUSED_REG_REQUIRE_AARCH64=1.
"""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "aarch64"
PACKAGES = ("g++-aarch64-linux-gnu", "qemu-user")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # of the compiler
TORCH = "torch==2.10.0"  # later wheels for aarch64 have CUDA, and three times the size
TORCH_FILES = ("torch/include/", "torch/lib/lib")
ZLIB = BUILD / "torch" / "lib" / "libz.so.1"  # torch's Fortran library wants one, and calls it for backtraces only


def missing_tools() -> list[str]:
    return [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]


def install_tools() -> None:
    print("aarch64 check: installs", *PACKAGES, flush=True)
    for command in (("update",), ("install", "--yes", "--no-install-recommends", *PACKAGES)):
        apt = ["apt-get", "--quiet", "--quiet", "--option=Acquire::Retries=3", *command]
        subprocess.run(apt, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, stdout=subprocess.DEVNULL)


def unpack_torch() -> None:
    """The library and its headers."""
    for wheel in BUILD.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(BUILD, [name for name in archive.namelist() if name.startswith(TORCH_FILES)])
        wheel.unlink()
    run(COMPILER, "-shared", "-x", "c++", os.devnull, f"-Wl,-soname,{ZLIB.name}", "-o", ZLIB)


def lacking() -> str | None:
    """What cannot be had, and how to get it."""
    if platform.machine() == "aarch64":
        return "this machine is one, where `make test` tests it"
    if missing_tools() and os.geteuid() == 0 and shutil.which("apt-get"):
        install_tools()
    for tool in missing_tools():
        return f"there is no {tool}; install it (Debian: `apt install {' '.join(PACKAGES)}`)"
    if not ZLIB.exists():
        target = ("--platform=manylinux_2_28_aarch64", "--python-version=3.11", "--only-binary=:all:", "--no-deps")
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *target)
        if subprocess.run([*pip, f"--dest={BUILD}", TORCH]).returncode:
            return f"there is no {TORCH} for it; let pip reach a registry that has it"
        unpack_torch()
    return None


def run(*command: str | Path, **environ: str) -> None:
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, check=True)


def test() -> None:
    """Raises CalledProcessError where a test fails."""
    record, build = BUILD / "recorded.pt", BUILD / "cmake"
    run(sys.executable, "-m", "recorded", record, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    options = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CROSSCOMPILING_EMULATOR": f"{EMULATOR};-L;{LIBRARIES}",
        "Torch_DIR": BUILD / "torch" / "share" / "cmake" / "Torch",
        "FUSED_REG_RECORDED": record,
        "FUSED_REG_WERROR": "ON",
    }
    run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items()))
    run("cmake", "--build", build)
    # Threads that wait for others take their time.
    run("ctest", "--test-dir", build, "-j", "2", "--output-on-failure", OMP_WAIT_POLICY="passive")


def main() -> int:
    BUILD.mkdir(parents=True, exist_ok=True)
    required = os.environ.get("FUSED_REG_REQUIRE_AARCH64") == "1"
    if lacks := lacking():
        print("aarch64 check:", f"failed, FUSED_REG_REQUIRE_AARCH64=1 and {lacks}" if required else f"skipped, {lacks}")
        return int(required)
    try:
        test()
    except subprocess.CalledProcessError as error:
        print("aarch64 check: failed,", *error.cmd)
        return 1
    print("aarch64 check: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
