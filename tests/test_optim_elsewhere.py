"""`fused_reg.optim` in other people's loops."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIGHTNING = """
import lightning.pytorch as pl
import torch
from fused_reg import optim
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.make = torch.nn.Linear(8, 1), lambda params: kind(params, 0.01, **options)

    def configure_optimizers(self):
        return self.make(self.parameters())

    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()

def train(kind, precision, clip=None, **options):
    net, data = Net(kind, **options), TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))
    trainer = pl.Trainer(max_steps=4, accelerator="cpu", devices=1, precision=precision, gradient_clip_val=clip,
                         logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False)
    trainer.fit(net, DataLoader(data, batch_size=8))
    return net.layer.weight.detach(), trainer.optimizers[0]

for precision in ("32", "16-mixed", "bf16-mixed"):
    for clip, options in ((0.5, {}), (None, {"fused": True})):
        expected, _ = train(torch.optim.AdamW, precision, clip, **options)
        torch.testing.assert_close(train(optim.AdamW, precision, clip, **options)[0], expected)
        found, optimizer = train(optim.AdamW, precision, clip, l1=0.1, prox=True, **options)
        assert not torch.equal(found, expected) and optimizer.penalty > 0
for kind in (torch.optim.AdamW, optim.AdamW):  # what unscales its gradients itself cannot be clipped
    try:
        train(kind, "16-mixed", 0.5, fused=True)
    except RuntimeError as error:
        assert "does not allow for gradient clipping" in str(error)
    else:
        raise AssertionError(kind)
print("the same")
"""

ACCELERATE = """
import torch
from accelerate import Accelerator
from fused_reg import optim

def train(kind):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(8, 1)
    model, optimizer = accelerator.prepare(model, kind(model.parameters(), 0.01))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda i: 1 / (1 + i)))
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(2, 8)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model).weight.detach()

torch.testing.assert_close(train(optim.AdamW), train(torch.optim.AdamW))
print("the same")
"""


HUGGING_FACE = """
import tempfile
import torch
from fused_reg import optim
from huggingface_trainer import PrinterCallback, Trainer, TrainingArguments, examples, tiny_model

def train(folder, kind, as_class, resumes=False, **options):
    model, options = tiny_model(), {"lr": 0.01, "weight_decay": 0.1, **options}
    given = {"optimizer_cls_and_kwargs": (kind, options)}
    if not as_class:
        optimizer = kind(model.parameters(), **options)
        given = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i)))}
    args = TrainingArguments(folder, max_steps=4, save_steps=2, use_cpu=True, per_device_train_batch_size=16,
                             gradient_accumulation_steps=2, max_grad_norm=0.5, report_to="none", disable_tqdm=True,
                             dataloader_pin_memory=False)
    trainer = Trainer(model, args, train_dataset=examples(), **given)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=folder + "/checkpoint-2" if resumes else None)
    return [p.detach() for p in trainer.model.parameters()]

for as_class in (False, True):
    with tempfile.TemporaryDirectory() as folder:
        straight = train(folder, optim.AdamW, as_class, l1=1e-3, prox=True)
        torch.testing.assert_close(train(folder, optim.AdamW, as_class, resumes=True), straight)
        expected = train(folder, torch.optim.AdamW, as_class)
        torch.testing.assert_close(train(folder, optim.AdamW, as_class, resumes=True), expected)
        torch.testing.assert_close(train(folder, optim.AdamW, as_class), expected)
print("the same")
"""
CODE = {"lightning": LIGHTNING, "accelerate": ACCELERATE, "transformers": HUGGING_FACE}


@pytest.mark.long
@pytest.mark.parametrize("module", CODE)
def test_trainers(module, tmp_path):
    pytest.importorskip(module)
    examples = str(Path(__file__).parents[1] / "examples")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE[module]],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([*sys.path, examples])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip().endswith("the same"), done.stderr
