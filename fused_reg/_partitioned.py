"""Placeholders and pieces: what other libraries leave of a parameter, which looks like a plain tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fused_reg import _ops

_ZERO_3 = (
    "a placeholder, as of DeepSpeed ZeRO-3; take the value inside `deepspeed.zero.GatheredParameters`, and train with "
    "`fully_shard` (FSDP2) or with the optimizer's weight_decay"
)
_FSDP_1 = (
    "a piece, as of FullyShardedDataParallel (FSDP1); train with `fully_shard` (FSDP2), or take the value inside "
    "`summon_full_params`"
)


def check_whole(function: str, params: list[Any], names: Sequence[str] | None = None) -> None:
    """Raises where a parameter is not whole. Who cuts parameters leaves attributes, which few have."""
    if is_compiling() or not _ops.survey(params) & _ops.HAS_ATTRIBUTES:
        return
    lazy = (UninitializedParameter, UninitializedBuffer)
    if not all(isinstance(p, Tensor) and not isinstance(p, lazy) for p in params):  # the other checks speak of these
        return
    # FSDP1 shows what it has gathered in the old shapes and one memory, and pieces in one dimension.
    gathered = {_memory(p) for p in params if "_fsdp_flattened" in vars(p) and p.ndim != 1}
    for i, p in enumerate(params):
        if (found := _cut(p, gathered)) is not None:
            raise ValueError(f"{function}: params[{i if names is None else repr(names[i])}] must be whole, got {found}")


def _cut(p: Tensor, gathered: set[int]) -> str | None:
    """What a parameter is, and what to use; None if it is whole."""
    marks = vars(p)
    if "_is_flat_param" in marks or ("_fsdp_flattened" in marks and p.ndim == 1 and _memory(p) not in gathered):
        return _FSDP_1
    shape = marks.get("ds_shape", p.shape if p.numel() > 0 or "ds_id" not in marks else None)
    if shape is None or tuple(shape) != tuple(p.shape):
        return _ZERO_3
    if any(isinstance(mark, torch.Size) and mark.numel() > p.numel() for mark in marks.values()):
        return _FSDP_1
    if p.numel() == 0 and any(isinstance(mark, Tensor) and mark.numel() > 0 for mark in marks.values()):
        return _ZERO_3
    return None


def _memory(p: Tensor) -> int:
    return p.untyped_storage().data_ptr()
