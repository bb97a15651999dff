"""The examples of trainers run, each in a process of its own, and find the plain loop's weights."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "lightning_callback": ("lightning",),
    "huggingface_trainer": ("transformers", "accelerate"),
}


SKIPS_AN_OPTIMIZER = """
import torch
from lightning_callback import RegularizerCallback, batches, pl

class Two(pl.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 1).double(), torch.nn.Linear(8, 1).double()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.a, self.b)]

    def training_step(self, batch, _):
        for optimizer, layer in zip(self.optimizers(), (self.a, self.b), strict=True):
            optimizer.zero_grad()
            self.manual_backward((layer(batch[0]) - batch[1]).square().mean())
            optimizer.step()

callback = RegularizerCallback(l1=0.1, include="b.*")
trainer = pl.Trainer(max_steps=4, callbacks=[callback], accelerator="cpu", devices=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Two(), torch.utils.data.DataLoader(batches(), batch_size=None))
(attachment,) = callback.attachments
print(attachment.optimizer is trainer.optimizers[1], float(attachment.value) > 0, callback.regularizer.step)
"""

RESUMES_A_SCHEDULE = """
import tempfile
import torch
from huggingface_trainer import PrinterCallback, RegularizerCallback, Trainer, TrainingArguments, examples, tiny_model

def train(folder, **arguments):
    callback = RegularizerCallback(l1=lambda step: 0.01 * step)
    args = TrainingArguments(folder, max_steps=4, save_steps=2, optim="sgd", learning_rate=0.1, use_cpu=True,
                             lr_scheduler_type="constant", per_device_train_batch_size=16, max_grad_norm=0.0,
                             report_to="none", disable_tqdm=True, dataloader_pin_memory=False)
    trainer = Trainer(tiny_model(), args, train_dataset=examples(), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    trainer.train(**arguments)
    return [p.detach() for p in trainer.model.parameters()], callback.regularizer.step

with tempfile.TemporaryDirectory() as folder:
    straight, steps = train(folder)
    resumed, steps_then = train(folder, resume_from_checkpoint=folder + "/checkpoint-2")
same = all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(straight, resumed, strict=True))
print(same, steps, steps_then)
"""


def run(example: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return python(str(ROOT / "examples" / f"{example}.py"), *arguments, **environment)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    own = (environment.pop("first", ""), str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", ""))
    paths = os.pathsep.join(filter(None, own))
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # a CPU's run, and nothing is downloaded
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **offline, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def skip_without(example: str) -> None:
    for package in EXAMPLES[example]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package} (pip install fused_reg[integrations])")


@pytest.mark.parametrize("example", EXAMPLES)
def test_finds_the_plain_loops_weights(example):
    """Under gradient accumulation, and where the order of examples is shuffled; the example asserts how near."""
    skip_without(example)
    done = run(example)
    assert done.returncode == 0, done.stderr
    assert "Regularizer(\n  l1=0.001, l2=0.001: " in done.stdout
    assert "largest difference of a weight from the plain loop: " in done.stdout
    assert 'mode="prox": ' in done.stdout


@pytest.mark.parametrize(("example", "package"), [(e, packages[0]) for e, packages in EXAMPLES.items()])
def test_missing_package(example, package, tmp_path):
    """One sentence that names the command, and no traceback."""
    (tmp_path / f"{package}.py").write_text(f"raise ImportError('no {package}')\n")
    done = run(example, first=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"examples/{example}.py: needs ")
    assert f"; pip install {' '.join(EXAMPLES[example])}\n" in done.stderr


def test_lightning_skips_an_optimizer_without_regularized_parameters():
    skip_without("lightning_callback")
    done = python("-c", SKIPS_AN_OPTIMIZER)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True True 2", done.stdout


def test_hugging_face_resumes_a_schedule():
    skip_without("huggingface_trainer")
    done = python("-c", RESUMES_A_SCHEDULE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True 4 4", done.stdout
