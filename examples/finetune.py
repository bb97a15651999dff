"""Fine-tunes a small transformer with a penalty, by the Hugging Face Trainer in bfloat16: strengths by layer, warmed up
by a schedule. The penalty is attached to the optimizer in one run, and the hand-written loop in the loss of another:
the losses are the same, and the time that each adds to a step is measured.

    python examples/finetune.py

A ViT with random weights, nothing is downloaded: it learns scikit-learn's digits 0 to 4, and is then fine-tuned on 50
images of 5 to 9. Writes pictures and numbers to ``out/finetune``.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

from fused_reg import Regularizer

with common.extras(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their own imports deprecate
    import accelerate  # noqa: F401  (what Trainer needs)
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import Progress
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification
    from transformers.trainer_callback import PrinterCallback

    from fused_reg.integrations.transformers import RegularizerCallback

from stopwatch import Stopwatch, times

WEIGHTS_L2, EMBEDDINGS_L2, HEAD_L1, HEAD_L2 = 1e-3, 1e-4, 2e-3, 1e-2  # round numbers, not tuned
WARM_UP = 30  # steps

NAMES = {"none": "none", "loop": "loop in the loss", "fused": "regularizer() in the loss", "attach": "attached"}
COLOURS = {"loop": "#E69F00", "fused": "#009E73", "attach": "#0072B2"}  # of Okabe and Ito


def warm_up(strength: float) -> Callable[[int], float]:
    """A schedule: up to the strength in the first steps, while a new head has no good gradient to give."""
    return lambda step: strength * min(1.0, (step + 1) / WARM_UP)


# None on biases and norms, less on the embeddings, more on the head.
PENALTY = {
    "l2": warm_up(WEIGHTS_L2),
    "weights_only": True,
    "rules": [
        ("*.embeddings.*", {"l2": warm_up(EMBEDDINGS_L2)}),
        ("classifier.*", {"l1": warm_up(HEAD_L1), "l2": warm_up(HEAD_L2)}),
    ],
}


def loop_penalty(model: nn.Module, step: int) -> Tensor:
    """The same by hand."""
    warm = min(1.0, (step + 1) / WARM_UP)
    total = torch.zeros(())
    for name, p in model.named_parameters():
        if p.ndim < 2:  # biases and norms
            continue
        if ".embeddings." in name:
            total = total + EMBEDDINGS_L2 * warm * (p**2).sum()
        elif name.startswith("classifier."):
            total = total + HEAD_L1 * warm * p.abs().sum()
            total = total + HEAD_L2 * warm * (p**2).sum()
        else:
            total = total + WEIGHTS_L2 * warm * (p**2).sum()
    return total


class PenaltyTrainer(Trainer):
    """Takes a penalty into the loss. ``compute_loss`` is called for each micro-batch: with gradient accumulation, the
    penalty would be computed as often."""

    penalty: Callable[[], Tensor] | None = None

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **arguments: Any) -> Any:
        self.task_loss = super().compute_loss(model, inputs, **arguments)
        if self.penalty is None:
            return self.task_loss
        self.last_penalty = self.penalty()
        return self.task_loss + self.last_penalty


class Recorder(TrainerCallback):
    """Keeps task loss and penalty of every step, and moves the progress on."""

    def __init__(self, trainer: PenaltyTrainer, advance: Callable[[], None]) -> None:
        self.trainer, self.advance = trainer, advance
        self.attached: RegularizerCallback | None = None
        self.losses: list[float] = []
        self.penalties: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.losses.append(self.trainer.task_loss.item())
        if self.attached is not None:
            self.penalties.append(self.attached.penalty.item())
        elif self.trainer.penalty is not None:
            self.penalties.append(self.trainer.last_penalty.item())
        self.advance()


class Sizes(NamedTuple):
    """How much of everything is done."""

    pretraining_steps: int = 200
    steps: int = 100
    first_rounds: int = 5  # of the stopwatch; not counted
    rounds: int = 80


@dataclass
class Run:
    """What one fine-tuning left behind."""

    losses: list[float]  # the task's, of every step
    penalties: list[float]
    weights: list[Tensor]
    accuracy: float  # on the test set


def network(seed: int) -> ViTForImageClassification:
    """A ViT for images of 8 x 8, which are four patches to it, and five classes."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=128, num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config)


class Study:
    """The pretrained network, and the images to fine-tune it on."""

    def __init__(self, sizes: Sizes, advance: Callable[[], None], folder: Path) -> None:
        self.sizes, self.advance, self.folder = sizes, advance, folder
        data = load_digits()
        images, digits = torch.tensor(data.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(data.target)
        self.images, self.labels = images[digits >= 5], digits[digits >= 5] - 5
        model = network(seed=0)
        trainer = self.trainer(model, images[digits < 5], digits[digits < 5], sizes.pretraining_steps, batch=50)
        trainer.add_callback(Recorder(trainer, advance))
        trainer.train()
        self.backbone = model.vit.state_dict()

    def trainer(
        self, model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch: int, seed: int = 0
    ) -> PenaltyTrainer:
        args = TrainingArguments(
            str(self.folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-3, bf16=True,
            use_cpu=True, max_grad_norm=0.0, dataloader_drop_last=True, dataloader_pin_memory=False, seed=seed,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
        trainer = PenaltyTrainer(model, args, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        return trainer

    def fine_tuning(self, steps: int, seed: int) -> tuple[PenaltyTrainer, list[int]]:
        """A trainer of the pretrained network with a new head, and the places of the images that are left for the
        test. The seed draws the head, the images, and the order of batches."""
        few, rest = train_test_split(
            range(len(self.labels)), train_size=50, stratify=self.labels.numpy(), random_state=seed
        )
        model = network(seed)
        model.vit.load_state_dict(self.backbone)
        return self.trainer(model, self.images[few], self.labels[few], steps, batch=10, seed=seed), rest

    def run(self, kind: str, seed: int) -> Run:
        trainer, rest = self.fine_tuning(self.sizes.steps, seed)
        recorder = Recorder(trainer, self.advance)
        trainer.add_callback(recorder)
        if kind == "attach":
            recorder.attached = RegularizerCallback(**PENALTY)
            trainer.add_callback(recorder.attached)
        elif kind == "loop":
            trainer.penalty = lambda: loop_penalty(trainer.model, trainer.state.global_step)
        trainer.train()
        model = trainer.model.eval()
        with torch.no_grad():
            right = model(pixel_values=self.images[rest]).logits.argmax(dim=1) == self.labels[rest]
        weights = [p.detach() for p in model.parameters()]
        return Run(recorder.losses, recorder.penalties, weights, right.float().mean().item())

    def time(self) -> list[dict[str, float]]:
        """The seconds of steps with each penalty, in rounds."""
        rounds = self.sizes.first_rounds + self.sizes.rounds
        trainer, _ = self.fine_tuning(rounds * len(NAMES), seed=0)
        regularizer = Regularizer(trainer.model, **PENALTY)

        def loop() -> Tensor:
            return loop_penalty(trainer.model, trainer.state.global_step)

        def fused() -> Tensor:
            regularizer.advance()  # which an attached one does by itself
            return regularizer()

        stopwatch = Stopwatch(trainer, {"loop": loop, "fused": fused}, regularizer, self.advance)
        trainer.add_callback(stopwatch)
        trainer.train()
        return stopwatch.rounds[self.sizes.first_rounds :]


def largest_differences(run: Run, other: Run) -> dict[str, float]:
    """Of the task loss and the penalty (relative) of any step, and of any weight after the last."""
    return {
        "task_loss": max(abs(a - b) for a, b in zip(run.losses, other.losses, strict=True)),
        "penalty": max(abs(a - b) / b for a, b in zip(run.penalties, other.penalties, strict=True)),
        "weight": max((a - b).abs().max().item() for a, b in zip(run.weights, other.weights, strict=True)),
    }


def draw_losses(loop: Run, attached: Run) -> Figure:
    """Task loss and penalty of both runs, and the strengths, over the steps."""
    figure = Figure(figsize=(7, 7.5), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    steps = range(1, len(loop.losses) + 1)
    for axes, series in ((top, "losses"), (middle, "penalties")):
        axes.plot(steps, getattr(loop, series), color=COLOURS["loop"], linewidth=5, label=NAMES["loop"])
        axes.plot(steps, getattr(attached, series), color=COLOURS["attach"], linewidth=1.2, label=NAMES["attach"])
    title = "One fine-tuning, its penalty computed two ways"
    figure.legend(*top.get_legend_handles_labels(), title=title, loc="outside upper center", ncols=2)
    top.set(ylabel="task loss (cross entropy)", ylim=(0, None))
    middle.set(ylabel="penalty", ylim=(0, None))
    lines = (("head, l2", HEAD_L2, 4), ("head, l1", HEAD_L1, 4), ("attention and MLP, l2", WEIGHTS_L2, -13))
    for label, strength, above in (*lines, ("embeddings, l2", EMBEDDINGS_L2, 4)):
        bottom.plot(steps, [warm_up(strength)(s - 1) for s in steps], color="black")
        place = (steps[-1], strength)
        bottom.annotate(label, place, xytext=(0, above), textcoords="offset points", ha="right")
    bottom.set(xlabel="optimizer step", ylabel="strength", yscale="log", ylim=(None, 4 * HEAD_L2))
    return figure


def draw_times(table: dict[str, dict[str, float]]) -> Figure:
    """What each penalty adds to a step."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for kind, colour in COLOURS.items():
        row = table[kind]
        interval = [[row["added"] - row["added_low"]], [row["added_high"] - row["added"]]]
        axes.barh(NAMES[kind], row["added"], color=colour, xerr=interval, capsize=4)
        text = f"{row['added']:.2f} ms, the step {100 * (row['ratio'] - 1):.1f} % longer"
        place = (row["added_high"], NAMES[kind])
        axes.annotate(text, place, xytext=(8, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(right=2 * max(row["added_high"] for row in table.values()))
    axes.set_xlabel("CPU time added to a step, ms (median and its 95 % interval)")
    axes.set_title(f"A step of the Trainer without a penalty takes {table['none']['step']:.1f} ms")
    return figure


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = common.parser(__doc__, "finetune").parse_args(arguments)
    out = common.prepare(options.out)
    sizes, seeds = (Sizes(20, 10, 1, 10), min(options.seeds, 2)) if options.quick else (Sizes(), options.seeds)
    warnings.filterwarnings("ignore", module="transformers|accelerate")
    torch.set_num_threads(1)  # tensors this small gain nothing by more
    start, cpu_start = time.perf_counter(), time.process_time()

    runs: dict[str, list[Run]] = {"none": [], "loop": [], "attach": []}
    total = sizes.pretraining_steps + seeds * len(runs) * sizes.steps + (sizes.first_rounds + sizes.rounds) * len(NAMES)
    with Progress(console=Console(stderr=True)) as progress, tempfile.TemporaryDirectory() as folder:
        bar = progress.add_task("pretraining", total=total)
        study = Study(sizes, lambda: progress.advance(bar), Path(folder))
        for seed in range(seeds):
            progress.update(bar, description=f"fine-tuning, seed {seed}")
            for kind, own in runs.items():
                own.append(study.run(kind, seed))
        progress.update(bar, description="timing")
        table = times(study.time())

    pairs = [largest_differences(a, b) for a, b in zip(runs["attach"], runs["loop"], strict=True)]
    results = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "accuracy": {kind: [run.accuracy for run in own] for kind, own in runs.items()},
        "largest_differences": {name: max(pair[name] for pair in pairs) for name in pairs[0]},
        "milliseconds": table,
        "seed_0": {kind: {"losses": own[0].losses, "penalties": own[0].penalties} for kind, own in runs.items()},
    }
    common.save_results(out, "finetune", results)
    common.save_picture(draw_losses(runs["loop"][0], runs["attach"][0]), out, "finetune-losses")
    common.save_picture(draw_times(table), out, "finetune-time")
    show(results, out)
    return results


def show(results: dict[str, Any], out: Path) -> None:
    accuracy, differences = results["accuracy"], results["largest_differences"]
    print(Regularizer(network(seed=0), **PENALTY))
    print(f"{'penalty':26}{'test accuracy':>16}{'step, ms':>10}{'added, ms':>11}{'ratio':>8}")
    for kind, name in NAMES.items():
        row = results["milliseconds"][kind]
        share = common.spread(accuracy[kind]) if kind in accuracy else ""
        print(f"{name:26}{share:>16}{row['step']:10.2f}{row['added']:11.3f}{row['ratio']:8.3f}")
    gains = [a - b for a, b in zip(accuracy["attach"], accuracy["none"], strict=True)]
    print(f"accuracy with the penalty minus that without, of {len(gains)} seeds: {common.spread(gains)}")
    print(f"largest differences of attached from loop: task loss {differences['task_loss']:.1e}", end=", ")
    print(f"weight {differences['weight']:.1e}, penalty {differences['penalty']:.1e} of it")
    print(f"{results['seconds']:.0f} s ({results['cpu_seconds']:.0f} s of CPU time); pictures and numbers are in {out}")


if __name__ == "__main__":
    main()
