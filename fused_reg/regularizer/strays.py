"""Steps and gradients that are without the penalty which their parameters have in the steps of another optimizer."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.__future__ import get_swap_module_params_on_conversion
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from fused_reg import _devices
from fused_reg._terms import TERMS
from fused_reg._warnings import warn
from fused_reg.regularizer.steps import closure_of, may_change
from fused_reg.regularizer.wrapped import optimizers_in

if TYPE_CHECKING:
    from fused_reg.regularizer.attachment import Attachment
    from fused_reg.regularizer.entry import Entry

_CHANGES = 2  # one alone may be a checkpoint that is loaded


@dataclass
class Handler:
    """The attachment, which dies with its optimizer; and whether there is nothing more to say of it: it was removed,
    because no penalty is meant, or it was said."""

    attachment: Callable[[], Attachment | None]  # a weak reference
    is_over: bool = False


class _Row(NamedTuple):
    """The name of a parameter in a regularizer, and what handles it."""

    name: str
    handler: Handler


class _Rows(dict[object, _Row]):
    """Of a parameter, by the regularizer. It is pickled as nothing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # which `torch.load(weights_only=True)` takes


@dataclass
class _Known:
    """An optimizer whose parameters were looked at since the last attachment."""

    hooks: weakref.ref[Any]  # which an initializer that is called again replaces
    begun: list[tuple[_Row, int]]  # within its step that of these attachments may come, whose steps were so many


#: Of those that torch may swap, which a weak reference forbids, an attribute has the rows. (With one, the look for
#: pieces of parameters takes longer.)
_handled: Any = WeakTensorKeyDictionary()
_ATTRIBUTE = "_fused_reg_handled"
_known: dict[int, _Known] = {}
_hooks: list[Any] = []


def handle(attachment: Attachment, regularizer: object) -> None:
    """Its parameters are handled by it from now on: instead of an earlier one of the same regularizer, and of those
    to other optimizers where the regularizer is new."""
    is_said = False
    for entry in attachment.entries:
        rows = _rows_of(entry.param)
        if regularizer not in rows:
            others = {key: row.handler.attachment() for key, row in rows.items()}
            others = {k: a for k, a in others.items() if a is not None and a.optimizer is attachment.optimizer}
            is_said = is_said or any(a is not None and _is_twice(entry, a) for a in others.values())
            rows = {key: rows[key] for key in others}
        _note(entry.param, {**rows, regularizer: _Row(entry.name, attachment.handler)})


def orphan(entries: Sequence[Entry], regularizer: object) -> Handler:
    """Nothing handles these parameters, which are copies of what an attachment does. (A shallow copy has the same.)"""
    handler = Handler(lambda: None)
    for entry in entries:
        if not _rows_of(entry.param):
            _note(entry.param, {regularizer: _Row(entry.name, handler)})
    return handler


def _note(p: Tensor, rows: Mapping[object, _Row]) -> None:
    if not _hooks:
        _hooks.extend((register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)))
    if is_traceable_wrapper_subclass(p) or get_swap_module_params_on_conversion():
        vars(p)[_ATTRIBUTE] = _Rows(rows)
    else:
        _handled[p] = _Rows(rows)
    _known.clear()


def _rows_of(p: Tensor) -> dict[object, _Row]:
    rows: dict[object, _Row] = vars(p).get(_ATTRIBUTE) or _handled.get(p, {})
    return {key: row for key, row in rows.items() if not row.handler.is_over}


def _is_twice(entry: Entry, other: Attachment) -> bool:
    """Whether a strength of a parameter counts twice in the steps of one optimizer, which is said."""
    theirs = next((e for e in other.entries if e.param is entry.param), None) if other.is_active else None
    for kind in TERMS:
        if theirs is not None and entry.has(kind) and theirs.has(kind):
            warn(
                f"attach: {kind} of {entry.name!r} counts twice, because another Regularizer is attached to the same "
                f"{type(other.optimizer).__name__}; call remove() of its attachment if this one is in its place"
            )
            return True
    return False


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Of every optimizer's step. A compiler that traces it finds nothing."""
    if is_dynamo_compiling():
        return
    hooks: Any = vars(optimizer).get("_optimizer_step_pre_hooks")
    if not isinstance(hooks, OrderedDict):
        hooks = optimizer
    elif len(hooks) > 1:  # others may change gradients: the penalty enters behind them, as weight_decay does
        for key in [key for key, hook in hooks.items() if _is_penalty(hook)]:
            hooks.move_to_end(key)
    known = _known.get(id(optimizer))
    if known is None or known.hooks() is not hooks:
        outside_of_graphs: Any = torch.compiler.disable
        outside_of_graphs(_look)(optimizer, hooks, closure_of(args, kwargs) is not None)
    elif known.begun:
        known.begun = []  # of a step that raised


def _is_penalty(hook: Any) -> bool:
    return isinstance(getattr(getattr(hook, "__self__", None), "handler", None), Handler)


def _look(optimizer: Optimizer, hooks: Any, evaluates: bool) -> None:
    groups = getattr(optimizer, "param_groups", ())
    found = [row for group in groups for p in group["params"] for row in _rows_of(p).values()]
    if found and not may_change(optimizer, evaluates):
        return
    known = _known[id(optimizer)] = _Known(weakref.ref(hooks), [])
    own = [optimizer, *optimizers_in(optimizer).values()]
    for row in found:
        attachment = row.handler.attachment()
        if attachment is None or not attachment.is_active:
            known.begun.clear()
            _say(row, optimizer, "an optimizer that is gone")
            return
        if attachment.is_stepping and optimizer is not attachment.optimizer:
            attachment.look_within(optimizer)
        elif all(x is not attachment.optimizer for x in own):
            known.begun.append((row, attachment.entered))


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    known = None if is_dynamo_compiling() else _known.get(id(optimizer))
    if known is None or not known.begun:
        return
    begun, known.begun = known.begun, []
    for row, entered in begun:
        attachment = row.handler.attachment()
        if attachment is not None and attachment.entered == entered:
            _say(row, optimizer, f"another optimizer, {type(attachment.optimizer).__name__}")
            return


def _say(row: _Row, optimizer: Optimizer, where: str) -> None:
    row.handler.is_over = True
    warn(
        f"attach: {row.name!r} has its penalty in the steps of {where}, and {type(optimizer).__name__} steps it "
        "without; call attach(optimizer) of its Regularizer, or remove() of what attach returned where no penalty is "
        "meant",
    )


class Watch:
    """Looks whether a parameter changes from gradient to gradient before the first step: something else steps it. It
    keeps no parameter alive, and a copied parameter is not watched."""

    def __init__(self, entry: Entry, attachment: Attachment) -> None:
        self._name = entry.name
        self._attachment = weakref.ref(attachment)
        self._gradients = self._changes = 0
        self._version = -1
        self._sample: Tensor | None = None  # of the parameter as it was when it was last looked at
        register: Any = entry.param.register_post_accumulate_grad_hook
        self.hook = register(self._look)

    def _look(self, p: Tensor) -> None:
        """At every gradient on the CPU. A GPU is waited for where the version has changed, and now and then, because
        not every change is counted there."""
        attachment = self._attachment()
        if attachment is None or _devices.is_captured(p):
            return
        self._gradients += 1
        if _devices.is_at_hand(p) or p._version != self._version or self._gradients & (self._gradients - 1) == 0:
            before, self._version, self._sample = self._sample, p._version, sample(p)
            self._changes += before is not None and not is_same(before, self._sample)
            if self._changes == _CHANGES and any(r.handler is attachment.handler for r in _rows_of(p).values()):
                attachment.warn_once(
                    "no step",
                    f"attach: {self._name!r} is trained without its penalty: it changes from gradient to gradient, but "
                    f"no step of the attached {type(attachment.optimizer).__name__} comes; attach to the optimizer "
                    "whose step() is called, or add regularizer() to the loss",
                )


def is_same(a: Tensor, b: Tensor) -> bool:
    """Of two samples. Those without data, as in a dry run, do not tell."""
    return type(a) is not Tensor or not _devices.has_data(a) or torch.equal(a, b)


def sample(p: Tensor) -> Tensor:
    """A few of its elements, or of its shard's."""
    flat = (p.to_local() if hasattr(p, "to_local") else p).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 16)].clone()
