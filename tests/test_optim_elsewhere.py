"""`fused_reg.optim` in other people's loops."""

import os
import subprocess
import sys

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
    return net.layer.weight.detach()

for precision in ("32", "16-mixed", "bf16-mixed"):
    for clip, options in ((0.5, {}), (None, {"fused": True})):  # Lightning does not clip for a fused optimizer
        torch.testing.assert_close(train(optim.AdamW, precision, clip, **options),
                                   train(torch.optim.AdamW, precision, clip, **options))
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


@pytest.mark.long
@pytest.mark.parametrize(("module", "code"), [("lightning", LIGHTNING), ("accelerate", ACCELERATE)])
def test_trainers(module, code, tmp_path):
    pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.strip().endswith("the same"), done.stderr
