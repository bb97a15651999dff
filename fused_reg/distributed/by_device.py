"""Lists whose parameters live on several devices: one launch per device, one number out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fused_reg import _devices, _ops
from fused_reg._terms import Strengths

_Key = TypeVar("_Key", bound=Hashable)


class Part(NamedTuple):
    """What one device has of a list."""

    places: list[int]  # in the list
    params: list[Tensor]
    strengths: Strengths


def is_mixed(params: list[Tensor], error: Exception) -> bool:
    """Whether a call that failed may be made device by device."""
    devices = {p.device for p in params if isinstance(p, Tensor)}
    return isinstance(error, ValueError) and _devices.can_mix(devices)


def penalty(
    one_device: Callable[[list[Tensor], Strengths], Tensor], params: list[Tensor], strengths: Strengths
) -> Tensor:
    """The penalty on the first parameter's device, from the penalty of each device."""
    return total([one_device(part.params, part.strengths) for part in _parts(params, strengths)], params)


def value_and_grad(
    one_device: Callable[[list[Tensor], Strengths], tuple[Tensor, tuple[Tensor, ...]]],
    params: list[Tensor],
    strengths: Strengths,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same, with the gradients in the order of the list."""
    values = []
    grads = list(params)
    for part in _parts(params, strengths):
        value, part_grads = one_device(part.params, part.strengths)
        values.append(value)
        for place, grad in zip(part.places, part_grads, strict=False):  # without that of the empty tensor
            grads[place] = grad
    return total(values, params), tuple(grads)


def empty_grads(params: list[Tensor]) -> list[Tensor]:
    """The operator of this name, device by device."""
    grads = list(params)
    for device in {p.device for p in params}:
        places = [i for i, p in enumerate(params) if p.device == device]
        for i, grad in zip(places, _ops.empty_grads([params[i] for i in places]), strict=True):
            grads[i] = grad
    return grads


def accumulate_grad_(
    params: list[Tensor],
    grads: list[Tensor],
    modes: list[int],
    scale: float,
    scale_tensor: Tensor | None,
    strengths: Strengths,
) -> Tensor:
    """The operator of this name, device by device. Nothing is written unless all of it can be."""
    _ops.check_writable(params, grads, modes)
    given = iter(grads)
    grad_at = {i: next(given) for i, mode in enumerate(modes) if mode != 0}
    values: list[Tensor] = []
    for part in _parts(params, strengths):
        own_modes = [modes[i] for i in part.places]
        own_grads = [grad_at[i] for i in part.places if i in grad_at]
        device = part.params[0].device
        own_scale = scale_tensor if scale_tensor is None else _devices.reachable(scale_tensor, device)
        arguments = part.params, own_grads, [*own_modes, 0], scale, own_scale, *part.strengths
        values.append(_ops.accumulate_grad_(*arguments))
    return total(values, params)


def prox_(params: list[Tensor], strengths: Strengths) -> None:
    """The operator of this name, device by device. Nothing is written unless all of it can be."""
    _ops.check_writable(params, (), ())
    for part in _parts(params, strengths):
        _ops.prox_(part.params, None, (), *part.strengths)


def _parts(params: list[Tensor], strengths: Strengths) -> Iterator[Part]:
    return (part for _, part in parts(params, strengths, [p.device for p in params]))


def parts(params: list[Tensor], strengths: Strengths, keys: Sequence[_Key]) -> Iterator[tuple[_Key, Part]]:
    """The list cut by keys, each of which is of one device. An empty float64 tensor ends each part: so its value is
    float64, not rounded yet."""
    places: dict[_Key, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    for key, own in places.items():
        device = params[own[0]].device
        exact = torch.empty(0, dtype=torch.float64, device=device)
        yield key, Part(own, [*(params[i] for i in own), exact], strengths.at([*own, own[0]], device))


def total(values: list[Tensor], params: list[Tensor]) -> Tensor:
    """The penalty of a list from the float64 penalties of its parts."""
    value = torch.stack([value.to(params[0].device) for value in values]).sum()
    return value if any(p.dtype == torch.float64 for p in params) else value.float()
