"""scripts/gpu_check.sh with a stub in the place of every tool: its parts and their order, what fails, what a call that
is cut keeps; and scripts/pytest_by_file.py with tests of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("python3", "nvidia-smi", "nvcc", "compute-sanitizer", "g++", "timeout")
# It writes down how it is called, fails where BREAKS is in that, and at BLOCKS waits until it is released.
STUB = r"""#!/bin/bash
name=${0##*/} line="${0##*/} $*"
[[ $line == *get_device_name* ]] && { echo nvidia-test; exit; }
echo "$line" >>"$STUBS/calls"
if [[ $name == timeout ]]; then
  [[ -n ${BREAKS:-} && $line == *"$BREAKS" ]] && { echo "half done"; exit 124; }
  shift 2; exec "$@"
fi
[[ -n ${BREAKS:-} && $line == *"$BREAKS"* ]] && { echo "it is broken"; exit 3; }
case "$line" in
  *"-m fused_reg") echo "self-check cuda:0 passed" ;;
  *"-m benchmarks "*) while [[ $1 != --output ]]; do shift; done; echo '{}' >"$2" ;;
esac
if [[ -n ${BLOCKS:-} && $line == *"$BLOCKS"* ]]; then
  touch "$STUBS/blocked"
  while [[ ! -e $STUBS/release ]]; do sleep 0.02; done
fi
echo done
"""
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
PARTS = {
    "first": ["environment", "build", "self-check", "tests", "benchmarks", "tables"],
    "rest": ["build", *SANITIZERS, "launches", "slow", "benchmarks", "tables", "others"],
}
# Of each part a piece of a command that no other part has.
COMMANDS = {
    "environment": "nvidia-smi",
    "build": "setup.py",
    "self-check": "-m fused_reg",
    "tests": "-m cuda tests/",
    "benchmarks": "-m benchmarks ",
    "tables": "-m benchmarks.report",
    **{tool: f"--tool {tool}" for tool in SANITIZERS},
    "launches": "-k launches",
    "slow": "--slow",
    "others": "-m not cuda",
}


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).write_text(STUB)
        (folder / tool).chmod(0o755)
    return folder


def start(stubs, *arguments, **environ):
    path = os.pathsep.join([str(stubs), os.environ["PATH"]])
    environ = {**os.environ, "STUBS": str(stubs), "PATH": path, "CUDA_HOME": str(stubs), "OUT": str(stubs), **environ}
    script = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(script, env=environ, start_new_session=True, **pipes)


def run(stubs, call, **environ):
    """The exit status, and the verdicts, of the folder `results`."""
    results = stubs.parent / "results"
    process = start(stubs, call, str(results), **environ)
    process.communicate()
    return process.returncode, verdicts(results / f"nvidia-test-{call}.txt")


def verdicts(path):
    """name -> (verdict, last line)."""
    fields = [line.split(maxsplit=4) for line in path.read_text().splitlines()]
    return {name: (verdict, last) for verdict, _, _, name, last in fields}


@pytest.mark.parametrize(("call", "name"), [("first", "nvidia-test-quick"), ("rest", "nvidia-test")])
def test_all_parts_pass(call, name, stubs):
    status, found = run(stubs, call)
    assert (status, list(found)) == (0, PARTS[call])
    assert {verdict for verdict, _ in found.values()} == {"passed"}
    results = stubs.parent / "results"
    files = [f"nvidia-test-{call}.log", f"nvidia-test-{call}.txt", f"{name}.json", f"{name}.md"]
    assert sorted(path.name for path in results.iterdir()) == sorted(files)
    log = (results / files[0]).read_text()
    assert log.endswith((results / files[1]).read_text())
    parts = [line.split(":")[0].removeprefix("=== ") for line in log.splitlines() if line.startswith("=== ")]
    assert parts[:-1] == PARTS[call]
    calls = (stubs / "calls").read_text()
    assert [part for part in PARTS[call] if COMMANDS[part] not in calls] == []


@pytest.mark.parametrize(("call", "part"), [(call, part) for call, parts in PARTS.items() for part in parts])
def test_a_part_that_fails_is_named_and_stops_no_later_one(call, part, stubs):
    status, found = run(stubs, call, BREAKS=COMMANDS[part])
    assert (status, list(found)) == (1, PARTS[call])
    assert [name for name, (verdict, _) in found.items() if verdict == "failed"] == [part]


def test_what_is_not_here_is_named(stubs):
    for tool, breaks in {"nvcc": "nvcc --version", "pandas": "import pandas"}.items():
        _, found = run(stubs, "first", BREAKS=breaks)
        assert found["environment"] == ("failed", f"not here, or broken: {tool}")


def test_a_self_check_without_a_gpu_fails(stubs):
    (stubs / "python3").write_text(STUB.replace("self-check cuda:0 passed", "self-check cpu passed"))
    assert run(stubs, "first")[1]["self-check"] == ("failed", "no CUDA device was checked")


def test_a_part_that_takes_too_long_is_stopped(stubs):
    status, found = run(stubs, "first", BREAKS="echo built", GPU_CHECK_SECONDS="1000")
    assert (status, list(found)) == (1, PARTS["first"])
    assert found["build"] == ("failed", "stopped after 170 s; half done")


@pytest.mark.parametrize("call", PARTS)
def test_no_part_outlives_the_call(call, stubs):
    """Their limits end with the whole call's, of which nothing is left in the second form."""
    run(stubs, call, GPU_CHECK_SECONDS="25")
    lines = [line.split() for line in (stubs / "calls").read_text().splitlines()]
    limits = [int(words[2]) for words in lines if words[0] == "timeout"]
    assert limits
    assert max(limits) <= 25
    status, found = run(stubs, call, GPU_CHECK_SECONDS="0")
    assert (status, set(found.values())) == (1, {("failed", "no time is left")})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_call_that_is_cut_keeps_what_it_has(number, stubs):
    process = start(stubs, "first", BLOCKS="-m benchmarks ")
    while not (stubs / "blocked").exists():
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)
    (stubs / "release").touch()  # what `timeout` runs is in a group of its own
    process.communicate()
    assert process.returncode == -number
    found = verdicts(stubs / "nvidia-test-first.txt")  # in $OUT
    assert list(found) == ["environment", "build", "self-check", "tests"]
    assert (stubs / "nvidia-test-quick.json").read_text() == "{}\n"
    log = (stubs / "nvidia-test-first.log").read_text()
    assert "=== tests" in log
    assert "=== tables" not in log


@pytest.mark.parametrize("arguments", [[], ["last"]])
def test_another_argument_is_refused(arguments, stubs):
    process = start(stubs, *arguments)
    _, said = process.communicate()
    given = "".join(arguments)
    assert said == f"scripts/gpu_check.sh: the first argument must be first or rest, got '{given}'\n"
    assert (process.returncode, sorted(p.name for p in stubs.iterdir())) == (2, sorted(TOOLS))


FILES = {
    "test_right.py": "def test_a(): pass\ndef test_b(): pass\n",
    "test_wrong.py": "def test_c(): pass\ndef test_d(): assert 'left' == 'right'\n",
    "test_none.py": "def test_e(): pass\n",
    "test_dies.py": "import os\ndef test_f(): os._exit(7)\n",
    "test_hangs.py": "import os, time\ndef test_g():\n    open('{}', 'w').close()\n    print('it hangs', flush=True)\n"
    "    time.sleep(600)\n",
}


def by_file(folder, *arguments):
    for name, text in FILES.items():
        (folder / name).write_text(text.format(folder / "began"))
    command = [sys.executable, str(ROOT / "scripts" / "pytest_by_file.py"), *arguments]
    words = [str(folder / word) if word.endswith(".py") else word for word in command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, start_new_session=True, **pipes)


@pytest.mark.parametrize(
    ("files", "status", "said", "printed"),
    [
        (["right", "none"], 0, "2 passed", ["right"]),
        (["right", "wrong", "none"], 1, "1 failed, 3 passed; failed: {}/test_wrong.py", ["right", "wrong"]),
        (["right", "dies"], 1, "2 passed; failed: {}/test_dies.py", ["right", "dies"]),
        (["none"], 1, "no test ran", []),
    ],
)
def test_files_in_processes_of_their_own(files, status, said, printed, tmp_path):
    process = by_file(tmp_path, "2", "-k", "not test_e", *(f"test_{name}.py" for name in files))
    output, _ = process.communicate()
    lines = output.splitlines()
    assert (process.returncode, lines[-1]) == (status, said.format(tmp_path))
    heads = [f"--- {tmp_path}/test_{name}.py" for name in printed]
    assert sorted(line for line in lines if line.startswith("--- ")) == sorted(heads)
    assert ("assert 'left' == 'right'" in output) == ("wrong" in files)


def test_a_run_that_is_stopped_prints_what_was_running(tmp_path):
    process = by_file(tmp_path, "1", "-s", "test_hangs.py", "test_right.py")
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    output, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"--- {tmp_path}/test_hangs.py, stopped\nit hangs" in output
    assert "test_right.py" not in output
