"""The contenders of a compiled training step: a task's loss with a penalty, and backward, all within one torch.compile.

There the compiler may merge the loop's arithmetic with the model's own. So the task does with each parameter what a
model does: a matrix is multiplied by a batch, anything else multiplies one elementwise.

Of the same function compiled several times in a process, what is compiled first is up to 6 % slower. So each is
compiled twice, once in this order and once in the opposite one, and the two run in turn; the very first is the step
without a penalty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch import Tensor

from benchmarks.checks import Errors
from benchmarks.optimizers import NO_PENALTY
from benchmarks.peers import COMPILED_LOOP, OURS, Penalty
from benchmarks.penalties import Problem, clear, set_gradients
from benchmarks.race import Candidate, Contender
from benchmarks.rows import PASSES, Mode, Role

# Small: beside a real batch's work the penalty would not be seen.
_BATCH = 8

# Of the task's loss, or its gradients would hide a penalty's that is wrong.
_SCALE = 1e-3

# A long vector is a matrix with rows of this length: no model has a bias of millions.
_LONG, _ROW = 1_000_000, 10_000

#: Parameters, the task's inputs -> the loss, and of it the penalty, without a graph.
_Objective = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor]]


def compiled_step_candidates(problem: Problem, mode: Mode, peers: Sequence[str]) -> list[Candidate]:
    """The step without a penalty, ours, and the loop if it is among the peers."""
    inputs = _inputs(problem.params)
    penalties: dict[str, tuple[Role, Penalty]] = {
        NO_PENALTY: ("limit", lambda params, l1, l2: params[0].new_zeros(())),
        OURS.name: (OURS.role, OURS.penalty),
    }
    if COMPILED_LOOP.name in peers:
        penalties[COMPILED_LOOP.name] = (COMPILED_LOOP.role, COMPILED_LOOP.penalty)
    copies: list[Callable[[], None]] = []
    *others, last = [
        Candidate(name, role, partial(_contender, problem, mode, name, role, penalty, inputs, copies))
        for name, (role, penalty) in penalties.items()
    ]
    return [*others, replace(last, build=lambda: _with_copies(last, copies))]


def _with_copies(last: Candidate, copies: list[Callable[[], None]]) -> Contender:
    contender = last.build()
    while copies:
        copies.pop()()
    return contender


def _inputs(params: Sequence[Tensor]) -> list[Tensor]:
    """A batch for each parameter; those of one width have the same."""
    generator = torch.Generator(params[0].device).manual_seed(2)
    widths = [p.shape[0] if _is_vector(p) else _ROW if p.ndim == 1 else p[0].numel() for p in params]
    batches = {
        width: torch.randn(_BATCH, width, generator=generator, device=params[0].device, dtype=params[0].dtype)
        for width in dict.fromkeys(widths)
    }
    return [batches[width] for width in widths]


def _is_vector(p: Tensor) -> bool:
    return p.ndim == 1 and p.shape[0] < _LONG


def _task_loss(params: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    outputs = [
        x * p if _is_vector(p) else x @ p.reshape(-1, x.shape[1]).t() for p, x in zip(params, inputs, strict=True)
    ]
    return _SCALE * sum((y.square().mean() for y in outputs[1:]), start=outputs[0].square().mean())


def _contender(
    problem: Problem,
    mode: Mode,
    name: str,
    role: Role,
    penalty: Penalty,
    inputs: Sequence[Tensor],
    copies: list[Callable[[], None]],
) -> Contender:
    params, strengths = problem.params, problem.strengths

    def objective(params: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        value = penalty(params, strengths.l1, strengths.l2)
        return _task_loss(params, inputs) + value, value.detach()

    compiled, copy = (problem.compiled(f"{name}, step{suffix}", objective) for suffix in ("", ", again"))
    functions: list[_Objective] = [compiled.function]
    turns = count()

    def once() -> Tensor:
        loss, value = functions[next(turns) % len(functions)](params, inputs)
        loss.backward()
        return value

    def call() -> None:
        once()
        if mode == "compiled_fresh":  # the one who allocated them pays for freeing them
            clear(params)

    def compile_copy() -> None:
        functions[:] = [copy.function]
        copy.compile(call, wants_grad=True)
        functions.append(compiled.function)

    copies.append(compile_copy)

    def verify() -> Errors:
        clear(params)
        _task_loss(params, inputs).backward()
        base = [p.grad for p in params if p.grad is not None]
        clear(params)  # or what is set next would be written over them
        before = set_gradients(params, "present" if mode == "compiled_present" else "fresh")
        if before is not None:
            base = [a.add_(b) for a, b in zip(base, before, strict=True)]
        value = once()
        grads = [p.grad for p in params if p.grad is not None]
        errors = Errors() if role == "limit" else problem.oracle.check_composed(role, value, grads, base)
        if mode == "compiled_fresh":
            clear(params)
        return errors

    return Contender(
        name=name,
        role=role,
        bytes=PASSES[mode] * sum(p.nbytes for p in params),
        call=call,
        verify=verify,
        is_reference_limit=role == "limit",
        compile_s=compiled.compile(call, wants_grad=True),
    )
