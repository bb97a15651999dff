"""The contenders that are steps: the proximal step, in place, and a compiled step of training.

The compiled step is a task's loss with a penalty, and backward, all within one torch.compile. There the compiler may
merge the loop's arithmetic with the model's own. So the task does with each parameter what a model does: a matrix is
multiplied by a batch, anything else multiplies one elementwise. Of the same function compiled several times in a
process, what is compiled first is up to 6 % slower. So each is compiled twice, once in this order and once in the
opposite one, and the two run in turn; the very first is the step without a penalty.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fused_reg
from benchmarks import checks, loops
from benchmarks import contenders as c
from benchmarks.checks import MODES, Errors, Problem, Strengths, Tensors, WrongResultError
from benchmarks.contenders import OURS, Contender, Peer, Work
from fused_reg import reference

# One step moves the weights enough to be checked; the timed one leaves them, or they would be zeros before long.
_CHECKED_STEP, _TIMED_STEP = 100.0, 1e-9
_ZEROS_TOLERANCE = 1e-4  # of the elements that are exactly zero: those whose threshold is a rounding away may differ


def _loop(weights: Tensors, l1=0.0, l2=0.0, l2_norm=0.0, group="tensor", *, step: float) -> None:
    """Each term in its fastest form."""
    for w in weights:
        if l1:
            nn.functional.softshrink(w, step * l1, out=w)
        if l2_norm:
            w.mul_((1 - step * l2_norm / loops.norms(w, group, keepdim=True)).clamp_(min=0))
        if l2:
            w.mul_(1 / (1 + 2 * step * l2))


def prox_steps(problem: Problem, mode: str = "prox", peers: Sequence[Peer] = ()) -> Iterator[Contender]:
    """Ours and the loop, of every family; all step one copy of the parameters."""
    weights = [copy.deepcopy(p.detach()) for p in problem.params]  # which lie as they do
    for family, strengths in ({"": c.ELASTIC_NET} | c.ALONE | c.NORMS).items():
        passes = MODES["prox"].passes + (family in c.NORMS)  # norms are known after a pass
        for name, role, prox in (OURS, "ours", fused_reg.prox_), (c.LOOP, "peer", _loop):
            make = partial(_prox_work, problem.params, weights, role, partial(prox, weights, **strengths), strengths)
            yield Contender(name, role, make, family, passes)


def _prox_work(source: Tensors, weights: Tensors, role: str, prox: Callable, strengths: Strengths) -> Work:
    restart = partial(torch._foreach_copy_, weights, [p.detach() for p in source])

    def stepped() -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece of the weights with what the reference makes of the parameter's."""
        for tensors in zip(source, weights, strict=True):
            for before, after in checks.pieces(*tensors, group=strengths.get("group")):
                expected = before.to(torch.float64, copy=True)
                reference.prox_(expected, **strengths, step=_CHECKED_STEP)
                yield after, expected

    def verify() -> Errors:
        restart()
        prox(step=_CHECKED_STEP)
        try:
            error = checks.largest_relative(stepped())
            checks.demand("roundings" if role == "ours" else "elements", weights[0].dtype, error, "weight")
            more_zeros = sum(int((after == 0).sum() - (exact == 0).sum()) for after, exact in stepped())
            if role == "ours" and abs(more_zeros) > _ZEROS_TOLERANCE * sum(w.numel() for w in weights):
                raise WrongResultError(f"{more_zeros} weights too many are exactly zero")
        finally:
            restart()
        return None, error

    return Work(partial(prox, step=_TIMED_STEP), verify)


_BATCH = 8  # small: beside a real batch's work the penalty would not be seen
_SCALE = 1e-3  # of the task's loss, or its gradients would hide a penalty's that is wrong
_LONG, _ROW = 1_000_000, 10_000  # a long vector is a matrix with rows of this length: no model has a bias of millions
_NOTHING = Peer(c.NO_PENALTY, lambda params, l1, l2: params[0].new_zeros(()), role="limit")


def compiled_steps(problem: Problem, mode: str, peers: Sequence[Peer]) -> Iterator[Contender]:
    """The step without a penalty, ours, and the loop if it is among the peers."""
    ours = next(peer for peer in c.PEERS if peer.name == OURS)
    entries = [_NOTHING, ours, *(peer for peer in peers if peer.name == c.COMPILED_LOOP)]
    params, copies = problem.params, []
    generator = torch.Generator(problem.device).manual_seed(2)
    widths = [p[0].numel() if p.ndim > 1 else len(p) if len(p) < _LONG else _ROW for p in params]
    like = {"generator": generator, "device": problem.device, "dtype": params[0].dtype}
    batches = {width: torch.randn(_BATCH, width, **like) for width in dict.fromkeys(widths)}
    inputs = [batches[width] for width in widths]  # parameters of one width have the same batch
    for peer in entries:
        make = partial(_compiled_work, problem, mode, peer, inputs, copies, is_last=peer is entries[-1])
        yield Contender(peer.name, peer.role, make, is_reference_limit=peer is _NOTHING)


def _task_loss(params: Tensors, inputs: Tensors) -> Tensor:
    pairs = zip(params, inputs, strict=True)
    outputs = [x * p if x.shape[1:] == p.shape else x @ p.reshape(-1, x.shape[1]).t() for p, x in pairs]
    return _SCALE * sum((y.square().mean() for y in outputs[1:]), start=outputs[0].square().mean())


def _compiled_work(problem: Problem, mode: str, peer: Peer, inputs: Tensors, copies: list, is_last: bool) -> Work:
    """Of a step; `copies` are what compiles the second of each, after the last."""
    params, compiler, penalty = problem.params, problem.compiler, peer.penalty
    l1, l2 = peer.strengths["l1"], peer.strengths["l2"]

    def objective(params: Tensors, inputs: Tensors) -> tuple[Tensor, Tensor]:
        value = penalty(params, l1, l2)
        return _task_loss(params, inputs) + value, value.detach()

    names = [f"{peer.name}, step{suffix}" for suffix in ("", ", again")]
    first, second = (compiler.function(name, objective) for name in names)
    functions = [first]

    def once() -> Tensor:
        functions.append(functions.pop(0))
        loss, value = functions[0](params, inputs)
        loss.backward()
        return value

    def compile_second() -> None:
        functions[:] = [second]
        compiler.seconds(names[1], work.verify, wants_grad=True)
        functions.append(first)

    work = c.penalty_work(problem, mode, peer, once, task=lambda: _task_loss(params, inputs))
    seconds = compiler.seconds(names[0], work.call, wants_grad=True)
    copies.append(compile_second)
    while is_last and copies:
        copies.pop()()
    return work._replace(compile_s=seconds)
