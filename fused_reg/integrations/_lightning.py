"""The hooks of Lightning, which are the same under both of its names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_reg.integrations._attached import Attached


class LightningHooks(Attached):
    """Lightning's calls. It tells a callback of an exception, and keeps its state in the checkpoints."""

    @property
    def state_key(self) -> str:
        return f"fused_reg.RegularizerCallback{{'name': {self.name!r}}}"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._goes_on = self._saved is not None or trainer.global_step > 0
        self._begin(pl_module, trainer.optimizers, self._goes_on)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step > 0 and not self._goes_on:  # a checkpoint without this callback: the count of all steps
            self._restore(trainer.global_step // len(trainer.optimizers))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.log(self.name, self.penalty)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.detach()

    def state_dict(self) -> dict[str, Any]:
        state = self._state()
        return dict(state) if isinstance(state, Mapping) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if any(attachment.is_active for attachment in self.attachments):  # a strategy that restores after the setup
            self._restore(state_dict)
            self._goes_on = True
        else:
            self._saved = state_dict or None
