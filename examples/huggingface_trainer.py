"""A penalty in the Hugging Face Trainer by the callback of `fused_reg.integrations.transformers`, and the check that it
is the plain loop. A tiny BERT with random weights; nothing is downloaded.

    python examples/huggingface_trainer.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from fnmatch import fnmatch

import torch
from torch import Tensor

from fused_reg import fused_penalty

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what their own imports deprecate
        import accelerate  # noqa: F401  (what Trainer needs)
        from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        from transformers.trainer_callback import PrinterCallback

        from fused_reg.integrations.transformers import RegularizerCallback
except ImportError:
    sys.exit("examples/huggingface_trainer.py: needs transformers and accelerate; pip install transformers accelerate")

STRENGTHS = {"l1": 1e-3, "l2": 1e-3}
# Attention does not depend on the bias of its keys: its loss gradient is a rounding error about 0, and so the sign that
# L1 takes of it is chance. Without these, two ways to the same gradients are one training.
WITHOUT = "*.key.bias"
LEARNING_RATE = 0.1
MICRO_BATCH, ACCUMULATE = 8, 2  # together all examples: the order in which they are drawn does not matter


def tiny_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=12, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2,
    )  # fmt: skip
    # In float32 a rounding may flip the sign of a weight near zero, and the gradient of L1 with it.
    return BertForSequenceClassification(config).double()


def examples() -> list[dict[str, Tensor]]:
    """Twelve tokens each; the label says whether the first is among the lower half of the vocabulary."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 40, (MICRO_BATCH * ACCUMULATE, 12), generator=generator)
    return [{"input_ids": row, "labels": (row[0] < 20).long()} for row in tokens]


def plain_loop(steps: int) -> list[Tensor]:
    """The penalty in the loss, once for each step of ``ACCUMULATE`` micro-batches."""
    model, data = tiny_model().train(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        for i in range(ACCUMULATE):
            batch = data[i * MICRO_BATCH : (i + 1) * MICRO_BATCH]
            loss = model(**{name: torch.stack([e[name] for e in batch]) for name in batch[0]}).loss / ACCUMULATE
            if i == ACCUMULATE - 1:
                chosen = [p for name, p in model.named_parameters() if not fnmatch(name, WITHOUT)]
                loss = loss + fused_penalty(chosen, **STRENGTHS)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def with_trainer(steps: int, callback: RegularizerCallback) -> list[Tensor]:
    """The same training by Trainer."""
    model = tiny_model()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=ACCUMULATE,
            learning_rate=LEARNING_RATE, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=examples(), callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        # BERT's forward takes the number of items and ignores it: let the trainer divide by the micro-batches.
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
    return [p.detach() for p in model.parameters()]


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(arguments).steps
    warnings.filterwarnings("ignore", module="transformers|accelerate")

    callback = RegularizerCallback(**STRENGTHS, exclude=WITHOUT)
    ours, loop = with_trainer(steps, callback), plain_loop(steps)
    unpenalized = with_trainer(steps, RegularizerCallback(l1=0.0))
    difference = max((a - b).abs().max().item() for a, b in zip(ours, loop, strict=True))
    effect = max((a - b).abs().max().item() for a, b in zip(ours, unpenalized, strict=True))
    print(callback.regularizer)
    print(f"penalty of the last step: {callback.penalty.item():.6f}")
    print(f"largest difference of a weight from the plain loop: {difference:.1e}; from no penalty: {effect:.1e}")
    assert difference < 1e-9 < 1e-3 < effect

    sparse = RegularizerCallback(mode="prox", l1=0.01, weights_only=True)
    weights = with_trainer(steps, sparse)
    share = sum((p == 0).sum().item() for p in weights) / sum(p.numel() for p in weights)
    print(f'mode="prox": {100 * share:.0f} % of all weights are exactly zero')
    assert share > 0.1
    return difference


if __name__ == "__main__":
    main()
