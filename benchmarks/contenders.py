"""What is compared: the implementations of the penalty, and how each is compiled, run and checked."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import perf_counter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_reg
from benchmarks import loops
from benchmarks.checks import COMPILED_MODES, MODES, NORM_MODES, Errors, Problem, Strengths, Tensors
from benchmarks.devices import Call, capture
from fused_reg import reference

#: An elastic net; what else is measured, by the family of its rows: its terms alone, for which loops have fast forms,
#: and the norms of each kind of group.
ELASTIC_NET = {"l1": 1e-4, "l2": 1e-3}
ALONE = {f"{name.upper()} alone": {name: strength} for name, strength in ELASTIC_NET.items()}
NORMS = {f"norms of {group}s": {"l2_norm": 1e-4, "group": group} for group in ("tensor", "row", "column")}
CUDA_GRAPH = "CUDA graph"  # the family of the calls that one replays


class Work(NamedTuple):
    call: Call
    verify: Callable[[], Errors]  # which calls it too
    compile_s: float | None = None
    capture_bytes: int | None = None  # that the capture of a CUDA graph allocated, which its replay uses


class Contender(NamedTuple):
    """Something to time. To make it may fail: to compile, to be captured."""

    name: str
    role: str  # ours; peer: another way to the same result; limit: of the machine, or the step without a penalty
    make: Callable[[], Work]
    family: str = ""  # within a mode, what is compared with what: an optimizer, a kind of group, a CUDA graph
    passes: int | None = None  # where they are not the mode's
    is_reference_limit: bool = False  # the limit that the ratios of this family and mode are to


class Compiler:
    """What a run compiles, each function once for a case, until the seconds that the run may spend on it are spent."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._seconds, self._spent = seconds, 0.0
        self._functions, self._took = {}, {}  # by name; by name and whether with the gradient

    def reset(self) -> None:
        """Forget what was compiled for the last case; without that, the compiler is not even imported."""
        if self._functions:
            torch._dynamo.reset()
        self._functions, self._took = {}, {}

    def function(self, name: str, function: FunctionType, options: Mapping[str, Any] | None = None) -> Callable:
        """It, compiled, and known by the name."""
        if name not in self._functions:
            # Dynamo finds what it compiled by the code, and would try that of every other closure of the same.
            code, known, closure = function.__code__.replace(), function.__globals__, function.__closure__
            own = FunctionType(code, known, argdefs=function.__defaults__, closure=closure)
            own.__kwdefaults__ = function.__kwdefaults__
            self._functions[name] = torch.compile(own, fullgraph=True, dynamic=False, options=options or None)
        return self._functions[name]

    def seconds(self, name: str, call: Call, wants_grad: bool) -> float:
        """Run the call that compiles; the seconds it took, or had taken."""
        if (name, wants_grad) not in self._took:
            if self._spent >= self._seconds:
                raise TimeoutError(f"the run's {self._seconds:g} seconds for compiling are spent")
            start = perf_counter()
            try:
                call()
            finally:
                self._took[name, wants_grad] = perf_counter() - start
                self._spent += self._took[name, wants_grad]
        return self._took[name, wants_grad]


class Peer(NamedTuple):
    """An implementation of the penalty: parameters, strengths -> a 0-dim tensor, which is differentiable, or whose
    gradient is in `.grad` already; in `value_and_grad` with the gradients."""

    name: str
    penalty: Callable[..., Any]
    modes: Sequence[str] = ("value", "fresh", "present")
    role: str = "peer"
    options: Mapping[str, Any] | None = None  # of torch.compile, if that compiles it, anew for every case
    family: str = ""
    has_backward: bool = True
    devices: Sequence[str] = ("cpu", "cuda")

    @property
    def strengths(self) -> Strengths:
        return ({"": ELASTIC_NET} | ALONE | NORMS)[self.family]


# The names that targets and the picture ask for.
OURS, COMPILED_LOOP, LOOP, FOREACH_NORM = "fused_reg", "torch.compile", "loop", "torch._foreach_norm"
EMPTY = "empty autograd.Function"
NO_PENALTY = "no penalty"
ACCUMULATE = MODES["present"].ours
_COMBO, _COOPERATIVE, _GPU = {"combo_kernels": True}, {"triton.cooperative_reductions": True}, ("cuda",)

_ALONE_MODES = ("value", "fresh")

PEERS = [
    Peer(OURS, fused_reg.fused_penalty, role="ours"),
    Peer(OURS, fused_reg.value_and_grad, ("value_and_grad",), "ours", has_backward=False),
    Peer(ACCUMULATE, fused_reg.accumulate_grad_, ("present",), "ours", has_backward=False),
    Peer(COMPILED_LOOP, reference.loop, ("value", "fresh", "present", "step", *COMPILED_MODES), options={}),
    Peer("torch.compile, combo kernels", reference.loop, options=_COMBO, devices=_GPU),
    Peer("torch.compile, cooperative reductions", reference.loop, options=_COOPERATIVE, devices=_GPU),
    Peer(LOOP, reference.loop, ("value", "fresh", "present", "step")),
    Peer(FOREACH_NORM, loops.foreach_norm),
    Peer(EMPTY, lambda params, **strengths: loops.Empty.apply(*params), ("fresh",), "limit"),
    *(Peer(OURS, fused_reg.fused_penalty, _ALONE_MODES, "ours", family=family) for family in ALONE),
    Peer("loop of vector_norm", loops.loop_of_l1, _ALONE_MODES, family="L1 alone"),
    Peer("loop of vector_norm", loops.loop_of_l2, _ALONE_MODES, family="L2 alone"),
    Peer("loop of dot", loops.loop_of_dots, _ALONE_MODES, family="L2 alone"),
    *(Peer(OURS, fused_reg.fused_penalty, NORM_MODES, "ours", family=family) for family in NORMS),
    *(Peer("loop of vector_norm", loops.loop_of_norms, NORM_MODES, family=family) for family in NORMS),
    *(Peer("loop of square, sum, sqrt", loops.loop_of_roots, NORM_MODES, family=family) for family in NORMS),
    Peer(FOREACH_NORM, loops.foreach_of_norms, NORM_MODES, family="norms of tensors"),
]


def penalties(problem: Problem, mode: str, peers: Sequence[Peer]) -> Iterator[Contender]:
    """Each of the peers, called and, on a GPU and without norms, in a CUDA graph."""
    for is_graph in (False, True) if problem.device == "cuda" else (False,):
        for peer in peers:
            if not (peer.family and is_graph):
                family = CUDA_GRAPH if is_graph else peer.family
                yield Contender(peer.name, peer.role, partial(_work, problem, mode, peer, is_graph), family)


def _work(problem: Problem, mode: str, peer: Peer, is_graph: bool) -> Work:
    is_compiled, wants_grad, compiler = peer.options is not None, bool(MODES[mode].grad), problem.compiler
    penalty = compiler.function(peer.name, peer.penalty, peer.options) if is_compiled else peer.penalty
    once = partial(penalty, problem.params, **peer.strengths)
    if peer.has_backward:
        once = partial(forward_backward, once) if wants_grad else torch.no_grad()(once)
    compile_s = compiler.seconds(peer.name, once, wants_grad) if is_compiled else None
    return penalty_work(problem, mode, peer, once, is_graph)._replace(compile_s=compile_s)


def forward_backward(penalty: Callable[[], Tensor]) -> Tensor:
    value = penalty()
    value.backward()
    return value


def penalty_work(problem: Problem, mode: str, peer: Peer, once: Call, is_graph=False, task: Call | None = None) -> Work:
    """`once` is what is timed: it computes a value and the mode's gradients. `task`: what else is in the loss."""
    params, grad, allocated = problem.params, MODES[mode].grad, None

    def run() -> tuple[Tensor, Tensors | None]:
        if grad == "fresh":  # in a graph the gradients are written anew, to the same memory
            clear(params)
        result = once()
        return result if mode == "value_and_grad" else (result.detach(), gradients(params) if grad else None)

    def call() -> None:
        once()
        if grad == "fresh":  # the one who allocated them pays for freeing them
            clear(params)

    if is_graph:
        set_gradients(params, mode)
        call, result, allocated = capture(run)

    def verify() -> Errors:
        base = set_gradients(params, mode)
        if task:  # to its gradients too those of the penalty are added
            task().backward()
            base = [gradient.clone() for gradient in gradients(params)]
            set_gradients(params, mode)
        value, grads = (call(), result)[1] if is_graph else run()
        errors, in_one_pass = (None, None), not peer.has_backward
        if peer.role != "limit":
            errors = problem.check(peer.role, peer.strengths, value, grads, base, not task, in_one_pass)
        if grad == "fresh":
            clear(params)
        return errors

    return Work(call, verify, capture_bytes=allocated)


def clear(params: Tensors) -> None:
    for p in params:
        p.grad = None


def gradients(params: Tensors) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def set_gradients(params: Tensors, mode: str) -> list[Tensor] | None:
    """What the mode finds in `.grad`: a copy of the gradients returned, in the same memory every time; or nothing."""
    if MODES[mode].grad != "present":
        return clear(params)
    base = [p.detach() * 0.5 for p in params]
    for p, gradient in zip(params, base, strict=True):
        p.grad = torch.empty_like(gradient) if p.grad is None else p.grad
        p.grad.copy_(gradient)
    return base
