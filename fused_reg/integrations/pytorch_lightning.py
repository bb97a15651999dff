"""Lightning by its old name: the callback for ``pytorch_lightning.Trainer``."""

from __future__ import annotations

from fused_reg.integrations._attached import needs
from fused_reg.integrations._lightning import LightningHooks

with needs("pytorch_lightning", extra="pytorch-lightning"):
    from pytorch_lightning import Callback


class RegularizerCallback(LightningHooks, Callback):
    """The same for ``pytorch_lightning.Trainer``."""
