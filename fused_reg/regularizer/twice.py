"""A `Regularizer` that an optimizer has, and that is taken by hand as well: its penalty would count twice."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.compiler import is_compiling

from fused_reg._warnings import warn
from fused_reg.regularizer.attachments import Attachments

_warned: WeakSet[Attachments] = WeakSet()


def watched(value: Tensor, attachments: Attachments) -> Tensor:
    """The penalty for a loss. To look at it is right beside an attachment; a backward through it is not."""
    if value.requires_grad and not is_compiling() and any(True for _ in attachments):
        watch: Any = value.register_hook
        watch(lambda _: warn_if_attached(attachments, "in a loss"))
    return value


def warn_if_attached(attachments: Attachments, way: str) -> None:
    """Once for each regularizer; ``way``: where else the penalty is."""
    if not is_compiling() and attachments not in _warned and any(True for _ in attachments):
        _warned.add(attachments)
        warn(
            f"Regularizer: the penalty counts twice, {way} and in the optimizer that it is attached to; take one of "
            "them (`attachment.value` is the penalty to log)"
        )
