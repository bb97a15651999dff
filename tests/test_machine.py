"""Threads, forks and signals (hard cases 33, 34)."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import assert_same_bits
from samples import draw, leaves, mixed_list

from fused_reg import fused_penalty, value_and_grad

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes and signals")

TIMEOUT = 300  # a hang; three threads beside other work on two cores have taken more than 60
BOTH = {"l1": 0.1, "l2": 1 / 3}


def large_list(device="cpu"):
    return [*mixed_list(device), draw(300_001, device=device), draw(200_000, torch.bfloat16, device)]


def all_results(params):
    some = leaves(params)
    penalty = fused_penalty(some, **BOTH)
    (0.37 * penalty).backward()
    value, grads = value_and_grad(params, **BOTH)
    return [fused_penalty(params, **BOTH), penalty, value, *grads, *(p.grad for p in some)]


def test_eight_python_threads(device):
    """Hard case 33: at once, over the same parameters and over their own."""
    shared = large_list(device)
    expected = all_results(shared)
    start = threading.Barrier(8)

    def work(i):
        start.wait(TIMEOUT)
        own = [p.clone() for p in shared] if i % 2 else shared
        return [all_results(own) for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            for result in results:
                assert_same_bits(result, expected)


def test_one_thread(threads):
    """Hard case 33."""
    params = large_list()
    expected = all_results(params)
    threads(1)
    assert_same_bits(all_results(params), expected)


def test_backward_in_another_thread(device):
    """Hard case 33."""
    params = leaves(large_list(device))
    penalty = 0.37 * fused_penalty(params, **BOTH)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(penalty.backward).result(TIMEOUT)
    assert_same_bits([p.grad for p in params], all_results([p.detach() for p in params])[-len(params) :])


def test_error_in_a_thread_comes_out_once(device):
    """Hard case 34: in the thread that called, and nowhere else; the next calls work."""
    wrong = [torch.ones(3, device=device), torch.ones(3, dtype=torch.int64, device=device)]
    with ThreadPoolExecutor(4) as pool:
        errors = [pool.submit(fused_penalty, wrong, l1=0.5).exception(TIMEOUT) for _ in range(8)]
        values = [pool.submit(fused_penalty, wrong[:1], l1=0.5).result(TIMEOUT) for _ in range(8)]
    rule = "fused_penalty: params[1] must be floating point, got torch.int64"
    assert [(type(e), str(e)) for e in errors] == [(TypeError, rule)] * 8
    assert values == [1.5] * 8


def run_script(script: str) -> tuple[str, str, int]:
    """Output, errors and exit status. What hangs, and its children, are killed."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        # From Python 3.12 on a fork beside threads is deprecated.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        return *process.communicate(timeout=TIMEOUT), process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"still running after {TIMEOUT} seconds")


FORK = """
    import os, torch
    from samples import draw, leaves
    from fused_reg import fused_penalty, value_and_grad

    torch.set_num_threads(3)
    dtypes = (torch.float32, torch.bfloat16)
    params = leaves([draw(n, dtype, seed=n) for n in (500_000, 17, 70_000) for dtype in dtypes])

    def results():
        # No operator of torch that would use OpenMP: in a child it hangs.
        penalty = fused_penalty(params, l1=0.1, l2=0.3)
        penalty.backward(torch.tensor(0.37))
        grads = [p.grad for p in params]
        for p in params:
            p.grad = None
        value, more = value_and_grad(params, l1=0.1, l2=0.3)
        tensors = [penalty, value, *grads, *more, held[0]]
        return [bytes(t.detach().view(torch.uint8 if t.ndim else t.dtype).numpy()) for t in tensors]

    held = value_and_grad(params[0], l1=0.5)[1]
    expected = results()
    kept = value_and_grad(params, l1=0.1)[1]  # released in the child

    def check():
        global kept
        for _ in range(5):
            assert results() == expected
        kept = None
        assert results() == expected
"""


def test_after_fork():
    """Hard case 33: a child, and a child of a child, compute the same bits; then the parent does."""
    script = (
        FORK
        + """
    child = os.fork()
    if child == 0:
        check()
        grandchild = os.fork()
        if grandchild == 0:
            check()
            os._exit(40)
        os._exit(1 + os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    check()
    print("parent", 0)
    """
    )
    assert run_script(script) == ("child 41\nparent 0\n", "", 0)


def test_in_workers_of_a_data_loader():
    """Hard case 33."""
    script = (
        FORK
        + """
    class Penalties(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            check()
            value, grads = value_and_grad(params, l1=0.1 * i)
            return torch.stack([value, grads[0][i]])

    loader = torch.utils.data.DataLoader(Penalties(), 2, num_workers=2, multiprocessing_context="fork", timeout=40)
    batches = torch.cat(list(loader))
    check()
    for i, row in enumerate(batches):
        value, grads = value_and_grad(params, l1=0.1 * i)
        assert torch.equal(row, torch.stack([value, grads[0][i]]))
    print("ok")
    """
    )
    assert run_script(script) == ("ok\n", "", 0)


def test_ctrl_c():
    """Hard case 34: a loop of long calls ends with KeyboardInterrupt."""
    script = """
    import signal
    import torch
    from fused_reg import value_and_grad

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    w = torch.ones(20_000_000)
    print("ready", flush=True)
    while True:
        value_and_grad(w, l1=0.1, l2=0.2)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
        process.wait()
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
