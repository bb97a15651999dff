"""Steps of optimizers that are without the penalty that their parameters have in the steps of another one."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.__future__ import get_swap_module_params_on_conversion
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from fused_reg._terms import TERMS
from fused_reg._warnings import warn
from fused_reg.regularizer.closures import closure_of
from fused_reg.regularizer.steps import may_change
from fused_reg.regularizer.wrapped import optimizers_in

if TYPE_CHECKING:
    from fused_reg.regularizer.attachment import Attachment
    from fused_reg.regularizer.table import Entry

#: The rows of parameters; of those that torch may swap, which a weak reference forbids, an attribute. (With one, every
#: operator takes longer.)
_handled: Any = WeakTensorKeyDictionary()
_ATTRIBUTE = "_fused_reg_handled"
#: Optimizers of which is known, since the last attachment, whether they step without a penalty; and their hooks, which
#: an initializer that is called again replaces.
_known: dict[int, tuple[weakref.ref[Optimizer], object]] = {}
#: Steps within which that of an attached optimizer may come.
_begun: dict[int, list[tuple[str, Attachment, int]]] = {}
_hooks: list[Any] = []


@dataclass
class Handler:
    """The attachment, which dies with its optimizer; and whether there is nothing more to say of it: it was removed,
    because no penalty is meant, or it was said."""

    attachment: Callable[[], Attachment | None]  # a weak reference
    is_over: bool = False


class _Rows(dict[object, tuple[str, Handler]]):
    """Of a parameter, by the regularizer: its name there, and what handles it. It is pickled as nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which `torch.load(weights_only=True)` takes


def handle(attachment: Attachment, regularizer: object) -> None:
    """Its parameters are handled by it from now on: instead of an earlier one of the same regularizer, and of those
    to other optimizers where the regularizer is new."""
    _register()
    is_said = False
    for entry in attachment.entries:
        own = _Rows(_rows_of(entry.param))
        if regularizer not in own:
            for key, (_, handler) in list(own.items()):
                if (other := handler.attachment()) is None or other.optimizer is not attachment.optimizer:
                    del own[key]
                elif other.is_active and not is_said:
                    is_said = _is_twice(entry, other)
        own[regularizer] = entry.name, attachment.handler
        _note(entry.param, own)
    _known.clear()


def orphan(entries: Sequence[Entry], regularizer: object) -> Handler:
    """Nothing handles these parameters, which are copies of what an attachment does."""
    _register()
    handler = Handler(lambda: None)
    for entry in entries:
        _note(entry.param, _Rows({**_rows_of(entry.param), regularizer: (entry.name, handler)}))
    _known.clear()
    return handler


def _register() -> None:
    if not _hooks:
        _hooks.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))


def _note(p: Tensor, rows: _Rows) -> None:
    if is_traceable_wrapper_subclass(p) or get_swap_module_params_on_conversion():
        vars(p)[_ATTRIBUTE] = rows
    else:
        _handled[p] = rows


def _is_twice(entry: Entry, other: Attachment) -> bool:
    """Whether a strength of a parameter counts twice in the steps of one optimizer, which is said."""
    others = next((e for e in other.entries if e.param is entry.param), None)
    for kind in TERMS:
        if others is not None and entry.has(kind) and others.has(kind):
            warn(
                f"attach: {kind} of {entry.name!r} counts twice, because another Regularizer is attached to the same "
                f"{type(other.optimizer).__name__}; call remove() of its attachment if this one is in its place"
            )
            return True
    return False


def _rows_of(p: Tensor) -> dict[object, tuple[str, Handler]]:
    rows: dict[object, tuple[str, Handler]] = vars(p).get(_ATTRIBUTE) or _handled.get(p, {})
    return {key: row for key, row in rows.items() if not row[1].is_over}


def is_handled(p: Tensor, attachment: Attachment) -> bool:
    return any(handler is attachment.handler for _, handler in _rows_of(p).values())


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Of every optimizer's step. A compiler that traces it finds nothing."""
    if is_dynamo_compiling():
        return
    hooks: OrderedDict[int, Any] | None = vars(optimizer).get("_optimizer_step_pre_hooks")
    if (
        hooks is not None and len(hooks) > 1
    ):  # others may change gradients: the penalty enters behind them, as weight_decay does
        for key in [key for key, hook in hooks.items() if _is_penalty(hook)]:
            hooks.move_to_end(key)
    if _begun:
        _begun.pop(id(optimizer), None)  # of a step that raised
    known = _known.get(id(optimizer))
    if known is None or known[0]() is not optimizer or known[1] is not hooks:
        outside_of_graphs: Any = torch.compiler.disable
        outside_of_graphs(_look)(optimizer, closure_of(args, kwargs) is not None)


def _is_penalty(hook: Any) -> bool:
    return isinstance(getattr(getattr(hook, "__self__", None), "handler", None), Handler)


def _look(optimizer: Optimizer, evaluates: bool) -> None:
    groups = getattr(optimizer, "param_groups", ())
    found = [row for group in groups for p in group["params"] for row in _rows_of(p).values()]
    if found and not may_change(optimizer, evaluates):
        return
    _known[id(optimizer)] = weakref.ref(optimizer), vars(optimizer).get("_optimizer_step_pre_hooks")
    own = [optimizer, *optimizers_in(optimizer).values()]
    begun = []
    for name, handler in found:
        attachment = handler.attachment()
        if attachment is None or not attachment.is_active:
            handler.is_over = True
            _warn(optimizer, name, "an optimizer that is gone")
            return
        if attachment.is_stepping and optimizer is not attachment.optimizer:
            attachment.look_within(optimizer)
        elif all(x is not attachment.optimizer for x in own):
            begun.append((name, attachment, attachment.entered))
    if begun:
        _begun[id(optimizer)] = begun


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if is_dynamo_compiling() or not _begun:
        return
    for name, attachment, entered in _begun.pop(id(optimizer), ()):
        if attachment.entered == entered:
            attachment.handler.is_over = True
            _warn(optimizer, name, f"another optimizer, {type(attachment.optimizer).__name__}")
            return


def _warn(optimizer: Optimizer, name: str, where: str) -> None:
    warn(
        f"attach: {name!r} has its penalty in the steps of {where}, and {type(optimizer).__name__} steps it without; "
        "call attach(optimizer) of its Regularizer, or remove() of what attach returned where no penalty is meant",
    )
