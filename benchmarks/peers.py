"""The implementations of the penalty, by one signature: parameters, l1, l2 -> a 0-dim tensor, which is differentiable,
or whose gradient is in `.grad` already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import fused_reg
from benchmarks.rows import COMPILED_MODES, Mode, Role, UnavailableError
from fused_reg import reference

Penalty = Callable[[Sequence[Tensor], float, float], Tensor]

_APEX_CHUNK = 2048 * 32  # apex's own choice


@dataclass(frozen=True)
class Peer:
    """An implementation, and the modes and devices on which it is measured."""

    name: str
    penalty: Penalty
    role: Role = "peer"
    modes: tuple[Mode, ...] = ("value", "fresh", "present")
    compiled: bool = False  # by torch.compile, anew for every case
    options: tuple[tuple[str, Any], ...] = ()  # torch.compile's
    has_l1: bool = True
    has_backward: bool = True  # False: it has added its gradient itself
    devices: tuple[str, ...] = ("cpu", "cuda")


def foreach_norm(params: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """By the multi-tensor norms of PyTorch's gradient clipping: a call per term, a number per tensor."""
    absolute = torch.stack(torch._foreach_norm(params, 1))
    euclidean = torch.stack(torch._foreach_norm(params, 2))
    return l1 * absolute.sum() + l2 * euclidean.square().sum()


@torch.no_grad()
def foreach_add(params: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """The gradient by hand, by PyTorch's multi-tensor operations: added to `.grad`, which is present."""
    grads = [p.grad for p in params]
    torch._foreach_add_(grads, torch._foreach_sign(params), alpha=l1)
    torch._foreach_add_(grads, params, alpha=2 * l2)
    return foreach_norm(params, l1, l2)


def foreach_powsum(params: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """By PyTorch's multi-tensor sums of powers, which have no derivative: a call per term, a number per tensor."""
    if not hasattr(torch, "_foreach_powsum"):
        raise UnavailableError(f"is not in torch {torch.__version__}")
    absolute = torch.stack(torch._foreach_powsum(params, 1))
    squares = torch.stack(torch._foreach_powsum(params, 2))
    return l1 * absolute.sum() + l2 * squares.sum()


def apex_l2norm(params: Sequence[Tensor], l1: float, l2: float) -> Tensor:
    """By the norm of NVIDIA apex's gradient clipping, which has neither an L1 term nor a derivative."""
    try:
        import amp_C
    except ImportError:
        raise UnavailableError("is not installed") from None
    norm, _ = amp_C.multi_tensor_l2norm(_APEX_CHUNK, _apex_overflow(params[0].device), [list(params)], False)
    return l2 * norm.reshape(()).square()


@cache
def _apex_overflow(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


OURS = Peer("fused_reg", fused_reg.fused_penalty, role="ours")
ACCUMULATE = Peer(
    "fused_reg.accumulate_grad_", fused_reg.accumulate_grad_, role="ours", modes=("present",), has_backward=False
)
COMPILED_LOOP = Peer(
    "torch.compile", reference.loop, modes=("value", "fresh", "present", *COMPILED_MODES), compiled=True
)
COMBO_LOOP = Peer(
    "torch.compile, combo kernels",
    reference.loop,
    compiled=True,
    options=(("combo_kernels", True),),
    devices=("cuda",),
)
COOPERATIVE_LOOP = Peer(
    "torch.compile, cooperative reductions",
    reference.loop,
    compiled=True,
    options=(("triton.cooperative_reductions", True),),
    devices=("cuda",),
)
LOOP = Peer("loop", reference.loop)
FOREACH_NORM = Peer("torch._foreach_norm", foreach_norm)
FOREACH_ADD = Peer("torch._foreach_add_", foreach_add, modes=("present",), has_backward=False)
FOREACH_POWSUM = Peer("torch._foreach_powsum", foreach_powsum, modes=("value",), devices=("cuda",))
APEX = Peer("apex multi_tensor_l2norm, L2 only", apex_l2norm, modes=("value",), has_l1=False, devices=("cuda",))

COMPILED = (COMPILED_LOOP, COMBO_LOOP, COOPERATIVE_LOOP)

PEERS = {
    peer.name: peer for peer in (OURS, ACCUMULATE, *COMPILED, LOOP, FOREACH_NORM, FOREACH_ADD, FOREACH_POWSUM, APEX)
}


def limited(mode: Mode) -> str:
    """The one of ours whose time the limits of a mode bound."""
    return ACCUMULATE.name if mode == "present" else OURS.name


def peers_of(device: str) -> tuple[str, ...]:
    """The names of what is measured on a kind of device."""
    return tuple(peer.name for peer in PEERS.values() if device in peer.devices)
