"""`make aarch64` where it cannot run: it says so and what to do, and fails if it is asked to run."""

import platform

import pytest

from scripts import check_aarch64

TOOLS = "there is no aarch64-linux-gnu-g++; install it (Debian: `apt install g++-aarch64-linux-gnu qemu-user`)"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """No tool is here, and nobody may install one."""
    monkeypatch.setattr(check_aarch64, "BUILD", tmp_path)
    monkeypatch.setattr(check_aarch64, "ZLIB", tmp_path / "libz.so.1")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("required", "status", "said"),
    [("0", 0, f"skipped, {TOOLS}"), ("1", 1, f"failed, FUSED_REG_REQUIRE_AARCH64=1 and {TOOLS}")],
)
def test_without_tools(here, monkeypatch, capsys, required, status, said):
    monkeypatch.setenv("FUSED_REG_REQUIRE_AARCH64", required)
    assert check_aarch64.main() == status
    assert capsys.readouterr().out == f"aarch64 check: {said}\n"


def test_root_installs(here, monkeypatch):
    """Once; what is missing then is said."""
    calls = []
    for name in ("apt-get", check_aarch64.COMPILER):
        (here / name).write_text("#!/bin/sh\n")
        (here / name).chmod(0o755)
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("subprocess.run", lambda command, **_: calls.append(command))
    assert check_aarch64.lacking() == TOOLS.replace(check_aarch64.COMPILER, check_aarch64.EMULATOR)
    assert [command[0] for command in calls] == ["apt-get", "apt-get"]
    assert tuple(calls[1][-2:]) == check_aarch64.PACKAGES


def test_without_torch(here, monkeypatch):
    class Failed:
        returncode = 1

    monkeypatch.setattr(check_aarch64, "missing_tools", list)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: Failed)
    assert check_aarch64.lacking() == "there is no torch==2.10.0 for it; let pip reach a registry that has it"


def test_on_aarch64(here, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert check_aarch64.lacking() == "this machine is one, where `make test` tests it"
