"""Lightning: ``Trainer(callbacks=[RegularizerCallback(l1=1e-5, weights_only=True)])``."""

from __future__ import annotations

from fused_reg.integrations._attached import needs
from fused_reg.integrations._lightning import LightningHooks

with needs("lightning", extra="lightning"):
    from lightning.pytorch import Callback


class RegularizerCallback(LightningHooks, Callback):
    """Attaches a :class:`.Regularizer` to every optimizer of a fit that holds parameters of it.

    - The penalty enters once in each optimizer step: after gradient accumulation, clipping and the loss scale of
      ``precision="16-mixed"``.
    - It is logged by the module's ``log`` at each batch, as ``name``, without a synchronization. With mode "prox" this
      is a pass over the parameters.
    - Checkpoints have the count of steps and the strengths. They are restored with ``fit(ckpt_path=...)``, and kept by
      another ``fit`` of the same trainer. If a checkpoint was written without this callback, the trainer's count is
      taken. Else a fit begins at step 0, with a Regularizer of its own.
    - It detaches when the fit ends, also by an exception.

    Args:
        regularizer: the one to attach. None: one is built of the module when a fit begins.
        mode: "grad" or "prox", as of :meth:`.Regularizer.attach`.
        include_unused: likewise.
        lazy_rows: likewise.
        name: what the penalty is called in the logs. Two callbacks of one trainer need two names.
        arguments: those of :class:`.Regularizer` beside the parameters, to build one: ``l1=1e-5, weights_only=True``.

    Raises:
        ValueError: when a fit begins, no optimizer of the trainer holds a parameter of the regularizer.
    """
