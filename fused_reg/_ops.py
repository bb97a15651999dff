"""Loads the compiled operators, or says how to mend it. The only user of ``torch.ops.fused_reg``."""

from __future__ import annotations

import importlib
import importlib.machinery
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

_MEND = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _release(version: str) -> tuple[int, ...]:
    """``(2, 13)`` of ``"2.13.0+cpu"``: the part within which torch keeps its C++ interface."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _library() -> Path:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_C{suffix}")
        if path.exists():
            return path
    raise ImportError(f"fused_reg: the compiled part is missing; build it with `{_MEND}` in its source")


def _load() -> ModuleType:
    path = _library()
    # The version is read from the file's bytes, because another torch's library may crash while it loads.
    mark = re.search(rb"fused_reg built with torch ([\w.]+)", path.read_bytes())
    built = mark.group(1).decode() if mark else "an unknown version"
    if _release(built) != _release(torch.__version__):
        raise ImportError(
            f"fused_reg: built with torch {built}, but torch {torch.__version__} is running; "
            f"build it again with `{_MEND}` in its source"
        )
    try:
        return importlib.import_module("fused_reg._C")
    except ImportError as error:
        raise ImportError(
            f"fused_reg: built with torch {built}, which torch {torch.__version__} cannot load ({error}); "
            f"build it again with `{_MEND}` in its source"
        ) from error


library = _load()

_operators = torch.ops.fused_reg

penalty: Callable[..., Tensor] = _operators.penalty.default
penalty_and_norms: Callable[..., tuple[Tensor, Tensor]] = _operators.penalty_and_norms.default
penalty_and_grad: Callable[..., tuple[Tensor, list[Tensor]]] = _operators.penalty_and_grad.default
penalty_grad: Callable[..., list[Tensor]] = _operators.penalty_grad.default
rescale_grad_: Callable[..., None] = _operators.rescale_grad_.default
accumulate_grad_: Callable[..., tuple[Tensor, list[Tensor]]] = _operators.accumulate_grad_.default
check_accumulation: Callable[..., None] = _operators.check_accumulation.default
prox_: Callable[..., None] = _operators.prox_.default
check_writable: Callable[..., None] = _operators.check_writable.default
group_norms: Callable[..., Tensor] = _operators.group_norms.default
term_sums: Callable[..., Tensor] = _operators.term_sums.default
zero_counts: Callable[..., Tensor] = _operators.zero_counts.default
