"""Optimizers of torch with the L1/L2 penalty in the pass of their own step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fused_reg._one_pass import OnePass
from fused_reg._step_launches import AMSGRAD, CENTERED, DECOUPLED, MOMENTUM, NESTEROV
from fused_reg._step_plans import Formula

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]


class SGD(OnePass, torch.optim.SGD):
    r"""``torch.optim.SGD`` with the penalty in its pass.

    With ``prox="preconditioned"`` the threshold is that of ``lr`` times the sum of the weights that momentum gives a
    gradient, ``(1 - dampening) / (1 - momentum)``; with nesterov 1 plus ``momentum`` times that.

    Example:
        >>> import torch, fused_reg.optim
        >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.05]))
        >>> optimizer = fused_reg.optim.SGD([w], lr=0.5, l1=0.2, prox=True)
        >>> (w.sum() * 0).backward()
        >>> optimizer.step()
        >>> w.data
        tensor([ 0.9000, -1.9000,  0.0000])
        >>> optimizer.penalty  # of the weights before the step
        tensor(0.6100)
    """

    _pass, _makes_states, _takes_sparse = 0, False, True

    def _formula(self, group: Mapping[str, Any]) -> Formula:
        rates = group["weight_decay"], group["momentum"], group["dampening"], 0.0
        if group["momentum"] == 0:
            return Formula(0, rates, ())
        return Formula(MOMENTUM | (NESTEROV if group["nesterov"] else 0), rates, ("momentum_buffer",))


class Adam(OnePass, torch.optim.Adam):
    r"""``torch.optim.Adam`` with the penalty in its pass.

    With ``prox="preconditioned"`` the rate of an element is ``lr / (sqrt(v) + eps)``, ``v`` without its bias.

    Source: Yun, Lozano and Yang 2021, "Adaptive proximal gradient methods for structured neural networks".
    """

    _pass = 1

    def _formula(self, group: Mapping[str, Any]) -> Formula:
        options = (AMSGRAD if group["amsgrad"] else 0) | (DECOUPLED if group["decoupled_weight_decay"] else 0)
        keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        rates = group["weight_decay"], *group["betas"], group["eps"]
        return Formula(options, rates, keys if group["amsgrad"] else keys[:2])


class AdamW(Adam, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` with the penalty in its pass, beside the decoupled ``weight_decay``. As :class:`Adam`."""

    _pass = 1


class RMSprop(OnePass, torch.optim.RMSprop):
    r"""``torch.optim.RMSprop`` with the penalty in its pass.

    With ``prox="preconditioned"`` the rate of an element is ``lr / (sqrt(v) + eps)``, with momentum
    ``1 / (1 - momentum)`` times that.
    """

    _pass = 2

    def _formula(self, group: Mapping[str, Any]) -> Formula:
        has_momentum, is_centered = bool(group["momentum"] > 0), bool(group["centered"])
        options = (MOMENTUM if has_momentum else 0) | (CENTERED if is_centered else 0)
        keys = ("square_avg", *("momentum_buffer",) * has_momentum, *("grad_avg",) * is_centered)
        return Formula(options, (group["weight_decay"], group["momentum"], group["alpha"], group["eps"]), keys)


class Adagrad(OnePass, torch.optim.Adagrad):
    r"""``torch.optim.Adagrad`` with the penalty in its pass.

    With ``prox="preconditioned"`` the rate of an element is ``lr / (sqrt(sum) + eps)``: the step of TensorFlow's
    ``ProximalAdagrad``, whose ``l2_regularization_strength`` is twice ``l2``.
    """

    _pass, _takes_sparse = 3, True

    def _formula(self, group: Mapping[str, Any]) -> Formula:
        return Formula(0, (group["weight_decay"], group["lr_decay"], 0.0, group["eps"]), ("sum",))
