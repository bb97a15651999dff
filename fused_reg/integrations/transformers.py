"""The Trainer of Hugging Face: ``Trainer(..., callbacks=[RegularizerCallback(l1=1e-5, weights_only=True)])``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fused_reg.integrations._attached import Attached, needs

with needs("transformers", "accelerate", extra="transformers"):
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState


class RegularizerCallback(Attached, TrainerCallback, ExportableState):
    """Attaches a :class:`.Regularizer` to the trainer's optimizer.

    - The penalty enters once in each optimizer step: after gradient accumulation, the loss scale of ``fp16`` and
      clipping (``max_grad_norm``).
    - It is in the logs that have the loss, and in ``trainer.state.log_history``, as ``name``. Callbacks that stand
      before this one, as those of ``report_to``, do not see it:
      ``trainer.add_callback(trainer.pop_callback(TensorBoardCallback))`` puts one behind.
    - Checkpoints have the count of steps and the strengths, which are restored with ``resume_from_checkpoint``. If one
      was written without this callback, the trainer's count is taken. Else a training begins at step 0, with a
      Regularizer of its own.
    - With ``restore_callback_states_from_checkpoint=True`` the trainer builds its callbacks anew, of arguments that
      JSON can hold: no schedules, tensors, types or given regularizers.
    - It detaches when the training ends. Of an exception the trainer tells no callback: call ``detach()``, or write
      ``with callback: trainer.train()``. The next training takes it out of an interrupted one by itself.

    Args:
        regularizer: the one to attach. None: one is built of the model when a training begins.
        mode: "grad" or "prox", as of :meth:`.Regularizer.attach`.
        include_unused: likewise.
        lazy_rows: likewise.
        name: what the penalty is called in the logs. Two callbacks of one trainer need two names.
        arguments: those of :class:`.Regularizer` beside the parameters, to build one: ``l1=1e-5, weights_only=True``.

    Raises:
        ValueError: when a training begins, the optimizer holds no parameter of the regularizer, as with DeepSpeed, or
            the trainer has built it anew, of a checkpoint that lacks an argument.
    """

    _lacks: Sequence[str] = ()  #: Arguments that the checkpoint lacks of which it was built.

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        if self._lacks:
            raise ValueError(
                f"RegularizerCallback: {', '.join(self._lacks)} must be given again, because checkpoints of the "
                "Trainer are JSON and hold no such values; leave out restore_callback_states_from_checkpoint, and the "
                "callback that is given goes on from the checkpoint"
            )
        self._arguments = _with_pairs(self._arguments)
        if isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if state.global_step == 0:
            self._check_name(saved["args"].get("name") for saved in self._states_in(state))
        else:
            own = [s for s in self._states_in(state) if s["args"].get("name") == self.name]
            self._saved = (own[-1]["attributes"]["_saved"] if own else None) or state.global_step
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())  # which a checkpoint is to replace
        self._begin(model, [optimizer], goes_on=state.global_step > 0)

    def on_log(self, args: Any, state: Any, control: Any, *, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs and (penalty := self.penalty) is not None:
            logs[self.name] = penalty.item()
            if state.log_history:  # which has a copy of the logs by now
                state.log_history[-1][self.name] = logs[self.name]

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.detach()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        given = {**self._options(), **self._arguments}
        plain = {key: value for key, value in given.items() if _is_plain(value)}
        lacks = [*sorted(given.keys() - plain.keys()), *["regularizer"] * self._is_given]
        return {"args": plain, "attributes": {"_saved": self._state(), "_lacks": lacks}}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if not _is_plain(state):
            raise ValueError(
                "RegularizerCallback: save_references must be False with the Trainer, whose checkpoints are JSON and "
                "hold no tensors; give toward as a state dict that is kept elsewhere"
            )

    def _states_in(self, state: Any) -> list[dict[str, Any]]:
        """Those of all callbacks of this kind, and again in each later checkpoint where they are several."""
        states = state.stateful_callbacks.get(type(self).__name__, [])
        return states if isinstance(states, list) else [states]


def _with_pairs(x: Any, key: str = "") -> Any:
    """Arguments as they were given, where JSON has made lists of the pairs that groups may be."""
    if isinstance(x, dict):
        return {name: _with_pairs(value, name) for name, value in x.items()}
    if isinstance(x, list):
        return tuple(x) if key == "group" else [_with_pairs(value) for value in x]
    return x


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
