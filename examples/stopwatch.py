"""The time that a penalty adds to a step of the Hugging Face Trainer: for ``finetune.py``."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from fused_reg import Regularizer


class Stopwatch(TrainerCallback):
    """Gives every step another penalty, in rounds of all of them in random order, and takes the step's CPU time: on
    one thread the time of the step, without what other programs take of the processor.

    Args:
        trainer: one that adds its ``penalty()`` to the loss, if that is not None.
        in_loss: penalties for that, by name.
        regularizer: the one to be attached, in the steps called "attach". Those called "none" have no penalty.
        advance: called after each step.
    """

    def __init__(
        self,
        trainer: Any,
        in_loss: Mapping[str, Callable[[], Tensor]],
        regularizer: Regularizer,
        advance: Callable[[], None],
    ) -> None:
        self.trainer, self.in_loss, self.regularizer, self.advance = trainer, in_loss, regularizer, advance
        self.kinds = ["none", *in_loss, "attach"]
        self.random = random.Random(0)
        self.rounds: list[dict[str, float]] = []  # seconds of the step of each kind

    def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
        if state.global_step % len(self.kinds) == 0:
            self.order = self.random.sample(self.kinds, len(self.kinds))
            self.rounds.append({})
        self.kind = self.order[state.global_step % len(self.kinds)]
        self.trainer.penalty = self.in_loss.get(self.kind)
        self.attachment = self.regularizer.attach(optimizer.optimizer) if self.kind == "attach" else None
        self.start = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.rounds[-1][self.kind] = time.process_time() - self.start
        if self.attachment is not None:
            self.attachment.remove()
        self.advance()


def times(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of every kind the median step, what it adds to the step of kind "none" of the same round (median, and its 95 %
    interval by ranks), both in milliseconds, and the median ratio of these two steps."""
    middle, off = len(rounds) // 2, round(0.98 * len(rounds) ** 0.5)
    table = {}
    for kind in rounds[0]:
        added = sorted(1e3 * (r[kind] - r["none"]) for r in rounds)
        table[kind] = {
            "step": 1e3 * statistics.median(r[kind] for r in rounds),
            "added": statistics.median(added),
            "added_low": added[max(middle - off, 0)],
            "added_high": added[min(middle + off, len(rounds) - 1)],
            "ratio": statistics.median(r[kind] / r["none"] for r in rounds),
        }
    return table
