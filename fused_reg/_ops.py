"""Loads the compiled operators, or says how to mend it. The only user of ``torch.ops.fused_reg``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_gradtrackingtensor
from torch.compiler import is_compiling

from fused_reg import _library


def _load() -> ModuleType:
    folder = Path(__file__).parent
    path = _library.find(folder)
    # What pip installs beside a source tree does not mend the tree.
    mend = "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source"
    if _library.is_source(folder):
        mend = f"`pip install --no-build-isolation --no-deps --editable .` in {folder.parent}"
    if path is None:
        raise ImportError(f"fused_reg: the compiled part is missing; build it with {mend}")
    built = _library.built_with(path)
    if not _library.fits(path):
        raise ImportError(
            f"fused_reg: built with torch {built}, but torch {torch.__version__} is running; build it again with {mend}"
        )
    try:
        return importlib.import_module("fused_reg._C")
    except ImportError as error:
        raise ImportError(
            f"fused_reg: built with torch {built}, which torch {torch.__version__} cannot load ({error}); "
            f"build it again with {mend}"
        ) from error


library = _load()

# What is in a list, as bits (csrc/module.cpp).
survey: Callable[[list[Any]], int] = library.survey
HAS_ATTRIBUTES, UNUSUAL, SEVERAL_DEVICES, NEGATED, ODD_GRAD = 1, 2, 4, 8, 16

#: Of an optimizer's groups and states, and of parameters and their states (csrc/module.cpp).
fingerprint: Callable[[Any, Any], tuple[bytes, bytes] | None] = library.fingerprint
gather: Callable[[list[Tensor], list[Any], tuple[str, ...]], tuple[list[Any], ...] | None] = library.gather

#: Whether dictionaries have these values, in their order, and no others (csrc/module.cpp).
has_values: Callable[[list[Any], list[Any]], bool] = library.has_values

#: The penalty of a list for l1 and l2, where a number is all that is wanted; None elsewhere (csrc/module.cpp).
plain_value: Callable[[list[Tensor], Any, Any], Tensor | None] = library.plain_value

_operators = torch.ops.fused_reg


def _operator(name: str, check: Callable[[str, list[Tensor]], None] | None = None) -> Callable[..., Any]:
    """The operator, called directly where nothing traces: through ``torch.ops`` a small call takes twice as long.
    ``check``: of the parameters, in the frame that is traced, behind any graph break."""
    direct, traced = getattr(library, name), getattr(_operators, name).default

    def operator(*args: Any) -> Any:
        if not is_compiling():
            result = direct(*args)
            return traced(*args) if result is NotImplemented else result
        if check is not None:
            check("prox_: ", args[0])
        return traced(*args)

    return operator


def check_not_in_graph(where: str, params: list[Tensor]) -> None:
    """What `prox_` writes outside of autograd. A view of a leaf is the leaf; the inputs of ``torch.func`` are none."""
    for i, p in enumerate(params if torch.is_grad_enabled() else ()):
        is_leaf = p.is_leaf or (p._base is not None and p._base.is_leaf)
        if p.requires_grad and (not is_leaf or (not is_compiling() and is_gradtrackingtensor(p))):
            raise ValueError(
                f"{where}params[{i}] must be a leaf, as a parameter is, got the result of an operation, whose graph "
                "would not know of the change; call it under torch.no_grad()"
            )


penalty: Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]] = _operator("penalty")
penalty_grad: Callable[..., list[Tensor]] = _operator("penalty_grad")
rescale_grad_: Callable[..., None] = _operator("rescale_grad_")
accumulate_grad_: Callable[..., Tensor] = _operator("accumulate_grad_")
empty_grads: Callable[..., list[Tensor]] = _operator("empty_grads")
numbers: Callable[..., Tensor] = _operator("numbers")
prox_: Callable[..., None] = _operator("prox_", check_not_in_graph)
step_: Callable[..., Tensor] = _operator("step_")
norms: Callable[..., Tensor] = _operator("norms")
sums: Callable[..., Tensor] = _operator("sums")


def check_writable(params: Sequence[Tensor], grads: Sequence[Tensor], modes: Sequence[int]) -> None:
    """Raises what `accumulate_grad_` would, or without modes `prox_`, for lists that they are given in parts. A
    compiler's tensors have no memory to look at."""
    if not is_compiling():
        library.check_writable(params, grads, modes)
