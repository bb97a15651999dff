"""Which way a list takes: the one place that asks, and the one that says which function an error is of.

- On one device: one launch. The autograd of the penalty then takes the way of `autograd.functions`.
- In parts: on several devices, cut into shards (DTensor), or with groups that are in several tensors (``joint``): as
  `distributed`, whose buckets are lists on one device.
- In compiled code the penalty is an operator that the compiler takes apart into one of these: Dynamo looks at every
  global that a function uses, in each run of what it compiled, and of an operator it sees the arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch.compiler import is_compiling

from fused_reg import _one_device, _ops
from fused_reg._arguments import are_run, as_list, check_closed_form, check_params
from fused_reg._partitioned import check_whole
from fused_reg._terms import NUMBERS, Strengths
from fused_reg.autograd import functions
from fused_reg.distributed import parts
from fused_reg.distributed.joint import Joint
from fused_reg.distributed.shards import is_sharded

_T = TypeVar("_T")

#: How the errors begin that are to be named: those of an argument, as the operators and the checks word them.
_OURS = ("params", "strengths", "scale", "toward", "importance", *NUMBERS, "torch.func.")


def run(
    function: str,
    on_one_device: Callable[..., _T],
    in_parts: Callable[..., _T],
    params: list[Tensor],
    *args: Any,
    odd: int = 0,
    are_whole: bool = False,
) -> _T:
    """One of the two, of ``(params, *args)``, in the name of a function; ``odd``: what else is for the second;
    ``are_whole``: the caller has seen to it that they are."""
    try:
        return (in_parts if _are_parts(function, params, odd, are_whole) else on_one_device)(params, *args)
    except (TypeError, ValueError, NotImplementedError) as error:
        if not str(error).startswith(_OURS):
            raise
        named = type(error)(f"{function}: {error}")
    raise named


def _are_parts(function: str, params: list[Tensor], odd: int, are_whole: bool) -> bool:
    """Whether a list is in several places, or has something odd. Raises where it is nothing that has a way."""
    if is_compiling():
        if not all(isinstance(p, Tensor) for p in params):  # an operator would say so in other words
            check_params(f"{function}: ", params)
        return is_sharded(params) or parts.are_mixed(params)
    if _is_tracing():  # which would lose what is written, and take the value for a constant
        raise NotImplementedError(
            f"{function}: torch.jit.trace is not supported; trace without the penalty, or take torch.compile or "
            "torch.export"
        )
    found = _ops.survey(params)
    if found & _ops.HAS_ATTRIBUTES and not are_whole:
        check_whole(function, params)
    if found & _ops.UNUSUAL:
        check_params(f"{function}: ", params)
    elif not found & (_ops.SEVERAL_DEVICES | odd):
        return False
    return bool(found & odd) or is_sharded(params) or parts.are_mixed(params)


def penalty(
    params: list[Tensor], strengths: Strengths, are_positive: bool = False, joint: Joint | None = None
) -> Tensor:
    """The differentiable penalty of a list that is not empty; ``are_positive``: no tensor of strengths has a 0."""
    if joint is not None:
        return run("fused_penalty", parts.penalty, parts.penalty, params, strengths, joint)
    # DTensors are left to Dynamo, which turns their collective into one that can be traced.
    if is_compiling() and not is_sharded(params):
        if not all(isinstance(p, Tensor) for p in params):
            check_params("fused_penalty: ", params)
        return penalty_in_graph(params, *strengths, are_positive)
    return run("fused_penalty", functions.penalty, parts.penalty, params, strengths)


def value_and_grad(params: list[Tensor], strengths: Strengths) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and the gradient of every parameter of a list that is not empty."""
    return run("value_and_grad", _one_device.value_and_grad, parts.value_and_grad, params, strengths)


def accumulate_grad_(
    params: list[Tensor],
    strengths: Strengths,
    factor: tuple[float, Tensor | None],
    skip_missing: bool = False,
    are_whole: bool = False,
    joint: Joint | None = None,
) -> Tensor:
    """The penalty, whose gradient has been added to ``.grad``; ``skip_missing``: where that is None, none is."""
    if not params:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    on_one_device, in_parts = _one_device.accumulate_grad_, parts.accumulate_grad_
    args = params, strengths, factor, skip_missing
    if joint is not None:
        return run("accumulate_grad_", in_parts, in_parts, *args, joint, are_whole=are_whole)
    return run("accumulate_grad_", on_one_device, in_parts, *args, odd=_ops.ODD_GRAD, are_whole=are_whole)


def check_accumulation(
    params: list[Tensor], strengths: Strengths, factor: tuple[float, Tensor | None], skip_missing: bool = False
) -> None:
    """Raises what `accumulate_grad_` would of these arguments, of parameters that are whole."""
    check = parts.check_accumulation
    run("accumulate_grad_", check, check, params, strengths, factor, skip_missing, are_whole=True)


def prox_(params: list[Tensor], strengths: Strengths, are_whole: bool = False, joint: Joint | None = None) -> None:
    """The proximal step; the step is among the strengths."""
    if params:
        check_closed_form("prox_: ", strengths, len(params))
        if joint is not None:
            run("prox_", parts.prox_, parts.prox_, params, strengths, joint, are_whole=are_whole)
            return
        run("prox_", _one_device.prox_, parts.prox_, params, strengths, odd=_ops.NEGATED, are_whole=are_whole)


def check_prox(params: list[Tensor], strengths: Strengths) -> None:
    """Raises what `prox_` would of these arguments, of parameters that are whole."""
    check_closed_form("prox_: ", strengths, len(params))
    run("prox_", parts.check_prox, parts.check_prox, params, strengths, are_whole=True)


def _decomposition(
    params: list[Tensor],
    floats: Sequence[float],
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    group: int,
    are_positive: bool,
) -> Tensor:
    params = as_list("fused_penalty", params)
    strengths = Strengths(tuple(floats), tuple(tensors), tuple(counts), group)
    of_list = functions.penalty
    if not are_run(params):  # else it is run by an exported program, or the backend "eager"
        of_list = partial(functions.penalty, is_traced=True, are_positive=are_positive)
    return run("fused_penalty", of_list, partial(parts.penalty, of_list=of_list), params, strengths)


# The caches of torch know an operator by its name, not by what it decomposes into. When that changes, add a revision:
# programs that were exported with an older one go on.
_REVISIONS = ("r1", "r2")

for _revision in _REVISIONS:
    _name = f"fused_reg::penalty_in_graph.{_revision}"
    torch.library.define(
        _name,
        "(Tensor[] params, float[] floats, Tensor[] tensors, int[] counts, int group, bool are_positive) -> Tensor",
    )
    for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        torch.library.impl(_name, _key, _decomposition)

penalty_in_graph: Callable[..., Tensor] = getattr(torch.ops.fused_reg.penalty_in_graph, _REVISIONS[-1])
