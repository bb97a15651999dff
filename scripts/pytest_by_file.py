"""Runs pytest on every file in a process of its own, some at a time, and prints the output of each when it ends:
``python scripts/pytest_by_file.py PROCESSES [options of pytest] files``.

An error that a GPU does not recover from ends with its file. When the run is stopped, what was running is printed too,
and what has failed by then.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType

# A test that hangs says where, before the run is stopped.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60")
PASSED, NONE_CHOSEN, STOPPED = 0, 5, -signal.SIGTERM  # pytest's exit statuses


def counted(output: str) -> Counter[str]:
    """The numbers of pytest's last line: ``2 failed, 31 passed, 4 deselected in 3.21s``."""
    last = output.rstrip().rpartition("\n")[2]
    return Counter({what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last)})


class StoppedError(Exception):
    """The run shall end."""


def stop(number: int, frame: FrameType | None) -> None:
    raise StoppedError


def run(
    processes: int, options: list[str], files: list[str], folder: Path, total: Counter[str], failed: list[str]
) -> None:
    """Adds to `total` how many tests passed and failed, to `failed` the files that did not pass."""
    waiting, running = list(files), {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                file, output = waiting.pop(0), folder / f"{len(waiting)}.log"
                with output.open("w") as to:
                    process = subprocess.Popen([*PYTEST, *options, file], stdout=to, stderr=subprocess.STDOUT)
                running[process] = file, output
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
            for process in [p for p in running if p.poll() is not None]:
                file, output = running.pop(process)
                text = output.read_text(errors="replace")
                total += counted(text)
                if process.returncode != NONE_CHOSEN:
                    print(f"--- {file}\n{text}", flush=True)
                if process.returncode not in (PASSED, NONE_CHOSEN, STOPPED):
                    failed.append(file)
    finally:
        for process, (file, output) in running.items():
            process.terminate()
            print(f"--- {file}, stopped\n{output.read_text(errors='replace')}", flush=True)


def main(arguments: list[str]) -> int:
    """1 if a test failed, a process died, or no test ran; else, if the run was stopped, what a shell says of that."""
    files = [word for word in arguments[1:] if word.endswith(".py")]
    options = [word for word in arguments[1:] if word not in files]
    signal.signal(signal.SIGTERM, stop)
    total, failed, status = Counter[str](), [], 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(int(arguments[0]), options, files, Path(folder), total, failed)
        except StoppedError:
            status = 128 + signal.SIGTERM
    counts = ", ".join(f"{number} {what}" for what, number in sorted(total.items())) or "no test ran"
    print(counts, *([f"failed: {' '.join(failed)}"] if failed else []), sep="; ")
    return 1 if failed else status or int(not total["passed"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
