"""A step of an attachment that repeats the one before it: only numbers are others, so that little is looked at."""

from __future__ import annotations

from collections.abc import Callable
from itertools import compress
from typing import Any

from torch import Tensor
from torch._C import _is_tracing
from torch.optim import Optimizer

from fused_reg import _ops
from fused_reg._one_device import SKIP, grads_of
from fused_reg.regularizer.share import Share
from fused_reg.regularizer.steps import is_inert

_NO_STATES: dict[Any, Any] = {}


class Repeat:
    """How the last step added the gradient of its penalty, if that was one call for parameters that are usual tensors
    without attributes, all of them with a ``.grad`` that was there or left alone."""

    def __init__(self, share: Share, optimizer: Optimizer) -> None:
        """After a step, which has looked at everything."""
        self._share = share
        self._version, self._calls = share.table.version, share.part.calls
        self._tensors: bytes | None = None
        found = _ops.fingerprint(optimizer.param_groups, _NO_STATES)
        if found is not None and len(self._calls) == 1 and self._calls[0].is_plain and not _ops.survey(share.params):
            params = self._calls[0].params
            self._modes, _ = grads_of(params, SKIP)
            self._with_grad = list(compress(params, self._modes))
            self._note(found, optimizer)

    def _note(self, found: tuple[bytes, bytes], optimizer: Optimizer) -> None:
        """Equal bytes are equal objects as long as these are kept."""
        self._tensors, self._options = found
        self._kept = [(*group["params"], *group.items()) for group in optimizer.param_groups]
        self._has_numbers = all(type(group.get("lr")) is float for group in optimizer.param_groups)

    def run(self, optimizer: Optimizer, follow: Callable[[Optimizer], None]) -> Tensor | None:
        """The same again; returns the penalty. None, and nothing is done, where more than numbers has changed.
        ``follow``: finds out what new options of the optimizer change."""
        share, own = self._share, optimizer.__dict__
        found = _ops.fingerprint(optimizer.param_groups, _NO_STATES)
        if found is None or found[0] != self._tensors:
            return None
        if is_new := found[1] != self._options:
            follow(optimizer)
        else:
            share.table.follow()
        if (
            share.table.version != self._version
            or share.part.calls is not self._calls
            or own.get("found_inf") is not None
            or own.get("grad_scale") is not None
            or ((is_new or not self._has_numbers) and is_inert(optimizer))
            or _is_tracing()
        ):
            return None
        share.part.check()
        if is_new:
            self._note(found, optimizer)
        grads = _ops.gather(self._with_grad, [], ())
        try:
            return None if grads is None else self._calls[0].add_to(grads[0], self._modes)
        except (TypeError, ValueError, NotImplementedError):
            return None  # whoever tries again finds the words
