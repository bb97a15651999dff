"""The two networks of pat.py, and what a user writes to prune them: with fused_reg, and with torchao's pruning-aware
training (PAT), which need not be installed. ``python -m benchmarks.pat`` times the same functions."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fused_reg import Regularizer
from fused_reg.schedules import CubicRamp, LinearRamp

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao's sources, when they are compiled: at its first import
        from torchao.prototype.pat.optim import PruneOptimizer
        from torchao.prototype.pat.utils import get_param_groups
except ModuleNotFoundError:
    PruneOptimizer = None

RAMP = 0.6  # the part of the steps in which groups become zero; the rest is for those that are left

Setup = Callable[..., Optimizer]  # of a network, the share of zero groups (or a strength) and the number of steps


class Block(nn.Module):
    """Attention and a ReLU network, each behind its normalization. What is pruned has no bias, so that a group with
    zero weights gives exactly zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (layer(normed).unflatten(-1, (self.heads, -1)) for layer in (self.query, self.key, self.value))
        attended = nn.functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """For images of 8 x 8 pixels, whose rows are the sequence."""

    def __init__(self, width: int = 64, heads: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(8, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)) + self.position
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def dense_convolutions(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)


def dense_transformer(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)


def ours_convolutions(model: nn.Module, share: float, steps: int, optim: ModuleType = torch.optim) -> Optimizer:
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    zeros = CubicRamp(0.0, share, int(RAMP * steps))
    regularizer = Regularizer(model, types=nn.Conv2d, group="output", zeros=zeros, zeros_per="parameter")
    regularizer.attach(optimizer, mode="prox")
    return optimizer


def pat_convolutions(model: nn.Module, share: float, steps: int) -> Optimizer:
    zeros = {"prox_type": "MinSparsityConstraint", "min_sparsity": share, "min_sparsity_schedule": True}
    config = {(nn.Conv2d, "weight"): {"group_type": "Dim0Grouper", **zeros}}
    base = torch.optim.SGD(get_param_groups(model, config, verbose=False), lr=0.1, momentum=0.9, fused=True)
    return PruneOptimizer(base, healing_start_step=int(RAMP * steps))


def ours_transformer(model: nn.Module, share: float, steps: int, optim: ModuleType = torch.optim) -> Optimizer:
    optimizer = optim.Adam(model.parameters(), lr=3e-3, fused=True)
    zeros = CubicRamp(0.0, share, int(RAMP * steps))
    heads = ("*.value.weight", {"group": ("row", model.blocks[0].value.out_features // model.blocks[0].heads)})
    names = ["*.value.weight", "*.up.weight"]
    regularizer = Regularizer(model, include=names, group="row", rules=[heads], zeros=zeros, zeros_per="parameter")
    regularizer.attach(optimizer, mode="prox")
    return optimizer


def pat_transformer(model: nn.Module, share: float, steps: int) -> Optimizer:
    zeros = {"prox_type": "MinSparsityConstraint", "min_sparsity": share, "min_sparsity_schedule": True}
    heads = {"group_type": "AttentionHeadGrouperDim0", "num_heads": model.blocks[0].heads, **zeros}
    config = {r":.*\.value\.weight": heads, r":.*\.up\.weight": {"group_type": "Dim0Grouper", **zeros}}
    base = torch.optim.Adam(get_param_groups(model, config, verbose=False), lr=3e-3, fused=True)
    return PruneOptimizer(base, healing_start_step=int(RAMP * steps))


def ours_lasso(model: nn.Module, strength: float, steps: int, optim: ModuleType = torch.optim) -> Optimizer:
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
    full = LinearRamp(0.0, strength, int(RAMP * steps))
    regularizer = Regularizer(model, l2_norm=full, types=nn.Conv2d, group="output", group_weights="sqrt_size")
    regularizer.attach(optimizer, mode="prox")
    return optimizer


def pat_lasso(model: nn.Module, strength: float, steps: int) -> Optimizer:
    config = {(nn.Conv2d, "weight"): {"group_type": "Dim0Grouper", "prox_type": "ProxGroupLasso"}}
    base = torch.optim.SGD(get_param_groups(model, config, verbose=False), lr=0.1, momentum=0.9, fused=True)
    return PruneOptimizer(base, healing_start_step=int(RAMP * steps), reg_lambda=strength)


def size(setup: Setup) -> list[int]:
    """The lines of the function's body, as it is formatted, and its characters without spaces."""
    body = inspect.getsource(setup).splitlines()[1:]
    return [len(body), len("".join("".join(body).split()))]


def groups(model: nn.Module) -> dict[str, Tensor]:
    """What is pruned, as matrices with a row for each group: output channels, or heads and neurons."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name] = module.weight.flatten(1)
        elif isinstance(module, Block):
            found[f"{name}.value"] = module.value.weight.reshape(module.heads, -1)
            found[f"{name}.up"] = module.up.weight
    return {name: weight.detach() for name, weight in found.items()}


def zero_groups(model: nn.Module) -> dict[str, Tensor]:
    """Which groups are exactly zero."""
    return {name: (rows == 0).all(dim=1) for name, rows in groups(model).items()}
