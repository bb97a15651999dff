"""The differentiable penalty of any list: sharded, on several devices, in compiled code.

In compiled code it is an operator that the compiler takes apart. Dynamo looks at every global that a function uses, in
each run of what it compiled, and of an operator it sees the arguments alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fused_reg import _autograd, _devices, distributed
from fused_reg._arguments import Strengths, as_list, raise_explained


def penalty(params: list[Tensor], strengths: Strengths) -> Tensor:
    """The penalty of a list that is not empty."""
    if is_compiling() and not distributed.is_sharded(params):  # Dynamo sees to collectives
        return penalty_in_graph(params, *strengths, False)
    return _of_any_list(_autograd.penalty, params, strengths)


def _of_any_list(
    of_one_device: Callable[[list[Tensor], Strengths], Tensor], params: list[Tensor], strengths: Strengths
) -> Tensor:
    try:
        if distributed.is_sharded(params):
            return distributed.penalty(params, strengths)
        return of_one_device(params, strengths)
    except Exception as error:
        if _devices.is_mixed(params, error):
            return _devices.penalty(of_one_device, params, strengths)
        raise_explained("fused_penalty", params, error)


torch.library.define(
    "fused_reg::penalty_in_graph",
    "(Tensor[] params, float[] l1, float[] l2, float[] l2_norm, Tensor? l1_tensor, Tensor? l2_tensor, "
    "Tensor? l2_norm_tensor, bool rows, bool are_positive) -> Tensor",
)


@torch.library.impl("fused_reg::penalty_in_graph", "CompositeImplicitAutograd")
def _decomposition(params: list[Tensor], *arguments: Any) -> Tensor:
    *strengths, are_positive = arguments
    traced_penalty = partial(_autograd.traced_penalty, are_positive=are_positive)
    return _of_any_list(traced_penalty, as_list("fused_penalty", params), Strengths(*strengths))


penalty_in_graph: Callable[..., Tensor] = torch.ops.fused_reg.penalty_in_graph.default
