"""The differentiable penalty of any list: sharded, on several devices, in compiled code.

In compiled code it is an operator that the compiler takes apart. Dynamo looks at every global that a function uses, in
each run of what it compiled, and of an operator it sees the arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_reg import distributed
from fused_reg._arguments import PLAIN_TYPES, as_list, raise_explained
from fused_reg._terms import Strengths
from fused_reg.autograd import functions
from fused_reg.distributed import by_device


def penalty(params: list[Tensor], strengths: Strengths) -> Tensor:
    """The penalty of a list that is not empty."""
    # DTensors are left to Dynamo, which turns their collective into one that can be traced.
    if not is_compiling() or distributed.is_sharded(params):
        return _of_any_list(functions.penalty, params, strengths)
    if not all(isinstance(p, Tensor) for p in params):  # the operator would say so in other words
        raise_explained("fused_penalty", params, TypeError("fused_penalty: params must be tensors"))
    return penalty_in_graph(params, *strengths, False)


def _of_any_list(
    of_one_device: Callable[[list[Tensor], Strengths], Tensor], params: list[Tensor], strengths: Strengths
) -> Tensor:
    try:
        if distributed.is_sharded(params):
            return distributed.penalty(params, strengths)
        return of_one_device(params, strengths)
    except Exception as error:
        if by_device.is_mixed(params, error):
            return by_device.penalty(of_one_device, params, strengths)
        raise_explained("fused_penalty", params, error)


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
    is_run = PLAIN_TYPES.issuperset(map(type, params)) and torch._C._len_torch_dispatch_stack() == 0
    if is_run and not torch._C._are_functorch_transforms_active():  # by an exported program, or the backend "eager"
        return _of_any_list(functions.penalty, params, strengths)
    return _of_any_list(partial(functions.traced_penalty, are_positive=are_positive), params, strengths)


# The caches of torch know an operator by its name, not by what it decomposes into. When that changes, add a revision:
# programs that were exported with an older one go on.
_REVISIONS = ("r1",)

for _revision in _REVISIONS:
    _name = f"fused_reg::penalty_in_graph.{_revision}"
    torch.library.define(
        _name,
        "(Tensor[] params, float[] floats, Tensor[] tensors, int[] counts, int group, bool are_positive) -> Tensor",
    )
    for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        torch.library.impl(_name, _key, _decomposition)

penalty_in_graph: Callable[..., Tensor] = getattr(torch.ops.fused_reg.penalty_in_graph, _REVISIONS[-1])
