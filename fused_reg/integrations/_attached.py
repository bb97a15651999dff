"""What the callbacks share: a `Regularizer` that is attached from the beginning of a training to its end."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import Self

from fused_reg.regularizer import Regularizer
from fused_reg.regularizer.attachment import Attachment, Mode
from fused_reg.regularizer.wrapped import held


@contextmanager
def needs(*packages: str, extra: str) -> Iterator[None]:
    """Says what to install if one of these is missing. An error within one that is there stays as it is."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").partition(".")[0]) not in packages:
            raise
        raise ModuleNotFoundError(
            f"fused_reg.integrations: needs {missing}; run pip install 'fused_reg[{extra}]'", name=error.name
        ) from None


class Attached:
    """The part of a callback that is the same in every trainer.

    Args:
        regularizer: the one to attach. None: one is built of the model when a training begins.
        mode: as of :meth:`.Regularizer.attach`.
        include_unused: likewise.
        lazy_rows: likewise.
        name: what the penalty is called in the logs. Two callbacks of one trainer need two names.
        arguments: those of :class:`.Regularizer` beside the parameters, to build one.
    """

    def __init__(
        self,
        regularizer: Regularizer | None = None,
        *,
        mode: Mode = "grad",
        include_unused: bool = False,
        lazy_rows: bool = False,
        name: str = "penalty",
        **arguments: Any,
    ) -> None:
        if regularizer is not None and not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"RegularizerCallback: regularizer must be a Regularizer or None, got {type(regularizer).__name__}"
            )
        if regularizer is not None and arguments:
            raise TypeError(
                f"RegularizerCallback: {min(arguments)} must be None where a regularizer is given, which has its own"
            )
        if unknown := arguments.keys() - (inspect.signature(Regularizer).parameters.keys() - {"params"}):
            raise TypeError(f"RegularizerCallback: arguments must be those of Regularizer, got {min(unknown)!r}")
        self.mode, self.include_unused, self.lazy_rows, self.name = mode, include_unused, lazy_rows, name
        self.regularizer = regularizer  #: The one that is attached, or was last; None before the first training.
        self.attachments: list[Attachment] = []  #: Of the last training, one for each optimizer.
        self._is_given = regularizer is not None
        self._arguments = arguments
        self._saved: Mapping[str, Any] | int | None = None  # the state, or the step alone, to go on from

    @property
    def penalty(self) -> Tensor | None:
        """The penalty of all that is attached, or was in the last training, as :attr:`.Attachment.value` gives it:
        0-dim, without a synchronization. None before the first training."""
        values = [attachment.value for attachment in self.attachments]
        return torch.stack([value.to(values[0].device) for value in values]).sum() if values else None

    def detach(self) -> None:
        """Takes the penalty out of the optimizers. A second call does nothing. The next training attaches again."""
        for attachment in self.attachments:
            attachment.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """A copy is attached nowhere, and goes on from the same step."""
        own = {} if self._is_given else {"regularizer": None}
        return {**vars(self), **own, "attachments": [], "_saved": self._state()}

    def _options(self) -> dict[str, Any]:
        """Its own arguments."""
        return {name: getattr(self, name) for name in ("mode", "include_unused", "lazy_rows", "name")}

    def _state(self) -> Mapping[str, Any] | int | None:
        return self._saved if self.regularizer is None else self.regularizer.state_dict()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raises where the trainer's checkpoints cannot hold the state of the regularizer."""

    def _check_name(self, names: Iterable[str]) -> None:
        """``names``: those of all such callbacks of the trainer."""
        if list(names).count(self.name) > 1:
            raise ValueError(
                f"RegularizerCallback: name must be another for each callback of a trainer, got {self.name!r} twice"
            )

    def _begin(self, module: Module, optimizers: Iterable[Any], goes_on: bool) -> None:
        """Attaches to those of the optimizers that hold something of the regularizer; ``goes_on``: whether the training
        continues an earlier one, with its count of steps and its strengths."""
        self.detach()  # from a training that was interrupted
        self.attachments = []
        if self.regularizer is None or not (self._is_given or (goes_on and self._is_of(self.regularizer, module))):
            self.regularizer = Regularizer(module, **self._arguments)
        if goes_on and self._saved is not None:
            self._restore(self._saved)
        self._saved = None
        self._check_state(self.regularizer.state_dict())
        own = {id(p): name for name, p in self.regularizer.named_parameters()}
        found = [optimizer for optimizer in optimizers if optimizer is not None]
        holders = [optimizer for optimizer in found if own.keys() & held(optimizer)]
        if not holders:
            got = ", ".join(type(optimizer).__name__ for optimizer in found) or "none"
            raise ValueError(
                f"RegularizerCallback: an optimizer of the trainer must hold {min(own.values())!r} or another "
                f"parameter of the regularizer, got {got}; where it has shards or copies, add regularizer() to the loss"
            )
        how = {key: x for key, x in self._options().items() if key != "name"}
        try:
            for optimizer in holders:
                self.attachments.append(self.regularizer.attach(optimizer, **how))
        except BaseException:
            self.detach()
            raise

    def _restore(self, saved: Mapping[str, Any] | int) -> None:
        assert self.regularizer is not None
        if isinstance(saved, int):
            self.regularizer.step = saved
        else:
            self.regularizer.load_state_dict(saved)

    @staticmethod
    def _is_of(regularizer: Regularizer, module: Module) -> bool:
        own = {id(p) for _, p in regularizer.named_parameters()}
        return own <= {id(p) for p in module.parameters()}
