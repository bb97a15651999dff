"""Gradients of parameters whose optimizer takes no step: what trains them is something else."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_reg import _devices
from fused_reg._warnings import warn
from fused_reg.regularizer import strays

if TYPE_CHECKING:
    from fused_reg.regularizer.attachment import Attachment

_CHANGES = 2  # one alone may be a checkpoint that is loaded


@dataclass
class _Last:
    """A parameter as it was at its last gradient."""

    count: int
    changes: int
    version: int
    sample: Tensor


class Watch:
    """Warns once if a parameter changes from gradient to gradient before `end`, which the first step calls: until then
    something else steps it. It keeps no parameter alive, and a copied parameter is not watched."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = weakref.ref(attachment)
        self._last: dict[int, _Last] = {}
        self._has_warned = False
        watched = [p for p in (entry.param for entry in attachment.entries) if p.requires_grad and p.is_leaf]
        register: Any = Tensor.register_post_accumulate_grad_hook
        self._handles = [register(p, self._look) for p in watched]

    def end(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _look(self, p: Tensor) -> None:
        """At every gradient on the CPU. A GPU is waited for where the version has changed, and now and then, because
        not every change is counted there."""
        attachment, last = self._attachment(), self._last.get(id(p))
        if attachment is None or _devices.is_captured(p):
            return
        if last is None:
            self._last[id(p)] = _Last(1, 0, p._version, sample(p))
            return
        last.count += 1
        if _devices.is_at_hand(p) or p._version != last.version or last.count & (last.count - 1) == 0:
            before, last.version, last.sample = last.sample, p._version, sample(p)
            last.changes += not is_same(before, last.sample)
            if last.changes == _CHANGES and not self._has_warned and strays.is_handled(p, attachment):
                self._has_warned = True
                self._warn(next(entry.name for entry in attachment.entries if entry.param is p), attachment)

    def _warn(self, name: str, attachment: Attachment) -> None:
        warn(
            f"attach: {name!r} is trained without its penalty: it changes from gradient to gradient, but no step of "
            f"the attached {type(attachment.optimizer).__name__} comes; attach to the optimizer whose step() is "
            "called, or add regularizer() to the loss",
        )


def is_same(a: Tensor, b: Tensor) -> bool:
    """Of two samples. Those without data, as in a dry run, do not tell."""
    return type(a) is not Tensor or not _devices.has_data(a) or torch.equal(a, b)


def sample(p: Tensor) -> Tensor:
    """A few of its elements, or of its shard's."""
    flat = (p.to_local() if hasattr(p, "to_local") else p).detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 16)].clone()
