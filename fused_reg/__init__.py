"""L1/L2 weight penalties for PyTorch: value and gradient of a whole list of parameters in one pass."""

from pathlib import Path as _Path

from fused_reg._library import take_installed as _take_installed

__version__ = "0.1.0"

__all__ = [
    "NORMS",
    "Regularizer",
    "accumulate_grad_",
    "fused_penalty",
    "largest_strength",
    "optim",
    "prox_",
    "reference",
    "regularized",
    "schedules",
    "value_and_grad",
]

if not _take_installed(_Path(__file__).parent):
    from fused_reg import optim, reference, schedules
    from fused_reg.functional import fused_penalty, value_and_grad
    from fused_reg.in_place import accumulate_grad_, prox_
    from fused_reg.regularizer import Regularizer
    from fused_reg.regularizer.keys import NORMS
    from fused_reg.regularizer.marks import regularized
    from fused_reg.search import largest_strength
