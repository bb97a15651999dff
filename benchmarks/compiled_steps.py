"""The contenders of a compiled training step: a task's loss with a penalty, and backward, all within one torch.compile.

There the compiler may merge the loop's arithmetic with the model's own. So the task does with each parameter what a
model does: a matrix is multiplied by a batch, anything else multiplies one elementwise.

Of the same function compiled several times in a process, what is compiled first is up to 6 % slower. So each is
compiled twice, once in this order and once in the opposite one, and the two run in turn; the very first is the step
without a penalty.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import torch
from torch import Tensor

from benchmarks.checks import Problem, Tensors
from benchmarks.contenders import COMPILED_LOOP, OURS, PEERS, Contender, Peer, Work, penalty_work
from benchmarks.devices import Call
from benchmarks.updates import NO_PENALTY

_BATCH = 8  # small: beside a real batch's work the penalty would not be seen
_SCALE = 1e-3  # of the task's loss, or its gradients would hide a penalty's that is wrong
_LONG, _ROW = 1_000_000, 10_000  # a long vector is a matrix with rows of this length: no model has a bias of millions

_NOTHING = Peer(NO_PENALTY, lambda params, l1, l2: params[0].new_zeros(()), role="limit")


def compiled_steps(problem: Problem, mode: str, peers: Sequence[Peer]) -> Iterator[Contender]:
    """The step without a penalty, ours, and the loop if it is among the peers."""
    ours = next(peer for peer in PEERS if peer.name == OURS)
    entries = [_NOTHING, ours, *(peer for peer in peers if peer.name == COMPILED_LOOP)]
    inputs, copies = _inputs(problem.params), []
    for peer in entries:
        make = partial(_work, problem, mode, peer, inputs, copies, is_last=peer is entries[-1])
        yield Contender(peer.name, peer.role, make, is_reference_limit=peer is _NOTHING)


def _inputs(params: Tensors) -> list[Tensor]:
    """A batch for each parameter; those of one width have the same."""
    generator = torch.Generator(params[0].device).manual_seed(2)
    widths = [p.shape[0] if _is_vector(p) else _ROW if p.ndim == 1 else p[0].numel() for p in params]
    like = {"generator": generator, "device": params[0].device, "dtype": params[0].dtype}
    batches = {width: torch.randn(_BATCH, width, **like) for width in dict.fromkeys(widths)}
    return [batches[width] for width in widths]


def _is_vector(p: Tensor) -> bool:
    return p.ndim == 1 and p.shape[0] < _LONG


def _task_loss(params: Tensors, inputs: Tensors) -> Tensor:
    pairs = zip(params, inputs, strict=True)
    outputs = [x * p if _is_vector(p) else x @ p.reshape(-1, x.shape[1]).t() for p, x in pairs]
    return _SCALE * sum((y.square().mean() for y in outputs[1:]), start=outputs[0].square().mean())


def _work(problem: Problem, mode: str, peer: Peer, inputs: Tensors, copies: list[Call], is_last: bool) -> Work:
    """Of a step; `copies` are what compiles the second of each, after the last."""
    params, compiler, penalty, turns = problem.params, problem.compiler, peer.penalty, count()
    l1, l2 = peer.strengths["l1"], peer.strengths["l2"]

    def objective(params: Tensors, inputs: Tensors) -> tuple[Tensor, Tensor]:
        value = penalty(params, l1, l2)
        return _task_loss(params, inputs) + value, value.detach()

    names = [f"{peer.name}, step{suffix}" for suffix in ("", ", again")]
    first, second = (compiler.function(name, objective) for name in names)
    functions = [first]

    def once() -> Tensor:
        loss, value = functions[next(turns) % len(functions)](params, inputs)
        loss.backward()
        return value

    def compile_second() -> None:
        functions[:] = [second]
        compiler.seconds(names[1], work.verify, wants_grad=True)
        functions.append(first)

    work = penalty_work(problem, mode, peer, once, task=lambda: _task_loss(params, inputs))
    seconds = compiler.seconds(names[0], work.call, wants_grad=True)
    copies.append(compile_second)
    while is_last and copies:
        copies.pop()()
    return work._replace(compile_s=seconds)
