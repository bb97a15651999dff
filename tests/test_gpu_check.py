"""scripts/gpu_check.sh with a stub in the place of every tool: its parts and their order, what fails, what a call that
is cut keeps; and scripts/pytest_by_file.py with tests of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ("python3", "nvidia-smi", "nvcc", "compute-sanitizer", "g++", "timeout")
# It writes down how it is called, fails where BREAKS is in that, and at BLOCKS waits until it is released; `timeout`
# stops what ends with STOPS, after it said SAYS.
STUB = r"""#!/bin/bash
name=${0##*/} line="${0##*/} $*"
[[ $line == *get_device_name* ]] && { echo nvidia-test; exit; }
echo "$line" >>"$STUBS/calls"
[[ $line == *setup.py* ]] && echo "for ${TORCH_CUDA_ARCH_LIST-the GPU that is here}" >>"$STUBS/calls"
if [[ $name == timeout ]]; then
  [[ -n ${STOPS:-} && $line == *"$STOPS" ]] && { echo "${SAYS:-half done}"; exit 124; }
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
    lines = [re.fullmatch(r"(.{7}) +\d+ s  (\S+) +(.*)", line) for line in path.read_text().splitlines()]
    return {line[2]: (line[1].strip(), line[3]) for line in lines}


def limits(stubs):
    """part -> the seconds of its last run."""
    lines = [line.split() for line in (stubs / "calls").read_text().splitlines() if line.startswith("timeout ")]
    return {part: int(words[2]) for words in lines for part in COMMANDS if COMMANDS[part] in " ".join(words)}


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


def test_the_build_is_for_the_gpu_that_is_here(stubs):
    """Images may name all GPUs in a variable."""
    run(stubs, "first", TORCH_CUDA_ARCH_LIST="7.5;9.0;12.0+PTX")
    assert "\nfor the GPU that is here\n" in (stubs / "calls").read_text()


def test_a_self_check_without_a_gpu_fails(stubs):
    (stubs / "python3").write_text(STUB.replace("self-check cuda:0 passed", "self-check cpu passed"))
    assert run(stubs, "first")[1]["self-check"] == ("failed", "no CUDA device was checked")


def test_a_part_that_takes_too_long_is_stopped(stubs):
    status, found = run(stubs, "first", STOPS="echo built", GPU_CHECK_SECONDS="1000")
    assert (status, list(found)) == (1, PARTS["first"])
    assert found["build"] == ("failed", "stopped after 200 s; half done")


@pytest.mark.parametrize("call", PARTS)
def test_no_part_outlives_the_call(call, stubs):
    """Their limits end with the whole call's; a part for which nothing is left is not run, and has not failed."""
    run(stubs, call, GPU_CHECK_SECONDS="25")
    assert max(limits(stubs).values()) <= 25
    status, found = run(stubs, call, GPU_CHECK_SECONDS="0")
    assert (status, list(found), set(found.values())) == (0, PARTS[call], {("not run", "no time is left")})


@pytest.mark.parametrize(
    ("said", "status", "verdict"),
    [("31 passed", 0, "cut"), ("31 passed; failed: tests/test_a.py", 1, "failed")],
)
def test_a_part_that_the_end_of_the_call_cuts_has_not_failed(said, status, verdict, stubs):
    """Unless something has failed by then."""
    found = run(stubs, "rest", STOPS="tests/test_*.py", SAYS=said, GPU_CHECK_SECONDS="300")
    assert (found[0], found[1]["others"][0], found[1]["others"][1].split("; ", 1)[1]) == (status, verdict, said)


def test_the_benchmarks_keep_their_time(stubs):
    """However long what comes before them takes: of 410 seconds 170, and 20 for the tables."""
    run(stubs, "first")
    found = limits(stubs)
    assert [found[part] for part in ("build", "self-check", "tests")] == [200, 30, 100]
    assert 380 <= found["benchmarks"] <= 390
    status, verdicts = run(stubs, "first", GPU_CHECK_SECONDS="190")
    assert (status, verdicts["tests"], verdicts["benchmarks"][0]) == (0, ("not run", "no time is left"), "passed")
    assert 160 <= limits(stubs)["benchmarks"] <= 170


@pytest.mark.long
def test_every_file_with_tests_of_a_gpu_is_run(stubs):
    """Those of CUDA alone first."""
    run(stubs, "first")
    (call,) = re.findall(r"^python3 scripts/pytest_by_file.*", (stubs / "calls").read_text(), re.MULTILINE)
    files = re.findall(r"\S+\.py", call.partition("-m cuda")[2])
    options = ["--collect-only", "-q", "-m", "cuda", "-W", "ignore", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, "tests"]
    environ = {**os.environ, "FUSED_REG_REQUIRE_CUDA": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert sorted(files) == sorted({*re.findall(r"^(tests/\w+\.py)::", done.stdout, re.MULTILINE)})
    assert files[0].startswith("tests/test_cuda")


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
    "test_hangs.py": "import os, time\ndef test_g():\n    print('it hangs', flush=True)\n    open('{}', 'w').close()\n"
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
