"""Processes that run a function together, as `torchrun` would, and stay for the next one."""

from __future__ import annotations

import atexit
import functools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

#: Seconds that a function may take. A rank that does not call a collective leaves the others waiting for it.
TIMEOUT = 120


class Ranks:
    """``run(f, *args)``: the results of ``f(*args)`` in every process, with a default group of gloo."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = [pipe.recv() if pipe.poll(TIMEOUT) else (False, "no answer") for pipe in self._pipes]
        failures = [f"rank {rank}: {answer}" for rank, (done, answer) in enumerate(answers) if not done]
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fused_reg", "torch.distributed.fsdp"])  # imported once, not in each
        self._directory = tempfile.TemporaryDirectory()
        store = str(Path(self._directory.name) / "store")
        for rank in range(self.world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, store, there), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)

    def stop(self) -> None:
        if not self._processes:
            return
        for process in self._processes:
            process.kill()
            process.join()
        self._directory.cleanup()
        self._processes, self._pipes = [], []


@functools.cache
def ranks(world_size: int) -> Ranks:
    """One set of processes for each world size."""
    started = Ranks(world_size)
    atexit.register(started.stop)
    return started


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    """In a process: one mesh for each shape. Each has groups of its own, whose threads wake a hundred times a second as
    long as the process lives, which slows all other tests."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _serve(rank: int, world_size: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world_size)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
