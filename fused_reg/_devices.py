"""What differs between types of devices: a row for each that a folder of ``csrc`` has kernels for.

Nothing else asks a device for its type. The host, where Python runs, is no type among others: it may look at its own
memory, and every device takes numbers from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

import torch
from torch import Tensor

HOST = torch.device("cpu")


class Device(NamedTuple):
    """What devices of a type can do."""

    #: In a sentence, where parameters can be on one.
    title: str = ""
    #: Parameters have values there, not shapes alone.
    has_data: bool = True
    #: How to build the kernels, where a build may be without.
    build: str = ""
    #: Whether the calls of now go to a graph, which runs them later.
    is_captured: Callable[[], bool] = lambda: False
    #: The compiler computes products and sums as the kernels do. Others contract them, and give gradients other bits.
    has_bits_of_kernels: bool = False
    #: Random numbers are drawn on the device.
    has_random_state: bool = False
    #: Gradients of norms come in the pass that finds these.
    gives_gradients_of_norms: bool = False
    #: There are kernels of an optimizer's step.
    has_steps: bool = False


_ROWS = {
    "cpu": Device("the CPU", has_bits_of_kernels=True, gives_gradients_of_norms=True, has_steps=True),
    "cuda": Device(
        "a CUDA device",
        build="fused_reg is built without CUDA; where nvcc and a CUDA build of torch are installed, build it again "
        "with `FORCE_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps .` in its source",
        is_captured=lambda: torch.cuda.is_current_stream_capturing(),
        has_steps=True,
        has_random_state=True,
    ),
    "meta": Device(has_data=False),
}
_UNKNOWN = Device()


def row_of(device: torch.device) -> Device:
    return _ROWS.get(device.type, _UNKNOWN)


def is_at_hand(tensor: Tensor) -> bool:
    """Whether the host has its values, so that a look at them waits for nothing."""
    return tensor.is_cpu


def has_steps(tensor: Tensor) -> bool:
    """Whether the kernels take an optimizer's step there."""
    return row_of(tensor.device).has_steps


def is_captured(tensor: Tensor) -> bool:
    """Whether what is done with it now goes to a graph."""
    return not tensor.is_cpu and row_of(tensor.device).is_captured()


def has_data(tensor: Tensor) -> bool:
    """Whether it has values, and not a shape alone, as in a dry run."""
    return row_of(tensor.device).has_data


def present() -> list[torch.device]:
    """The devices of this machine that parameters can be on."""
    counts = {t: torch.get_device_module(t).device_count() for t in _ROWS if t != HOST.type and _is_ready(t)}
    return [HOST, *(torch.device(type_, i) for type_, count in counts.items() for i in range(count))]


def _is_ready(type_: str) -> bool:
    """Whether there are kernels that compute something."""
    key = torch._C._dispatch_key_for_device(type_)
    return _ROWS[type_].has_data and torch._C._dispatch_has_kernel_for_dispatch_key("fused_reg::penalty", key)


def refused(where: str, device: torch.device) -> Exception | None:
    """The error for a parameter on a device that has no kernels; None where it has some."""
    row = row_of(device)
    if device.type not in _ROWS:
        titles = [row.title for row in _ROWS.values() if row.title]
        return TypeError(f"{where} must be on {', '.join(titles[:-1])} or {titles[-1]}, got {device}")
    if _is_ready(device.type) or not row.has_data:
        return None
    return RuntimeError(f"{where} is on {device}, and {row.build}")


def can_mix(devices: AbstractSet[torch.device]) -> bool:
    """Whether they are several whose penalties have a sum."""
    return len(devices) > 1 and all(row_of(device).title for device in devices)


def joint(tensors: Sequence[Tensor]) -> torch.device:
    """Where numbers from several places are gathered: not on the host, unless all are there."""
    return next((t.device for t in tensors if not is_at_hand(t)), tensors[0].device)


def reachable(number: Tensor, device: torch.device) -> Tensor:
    """The number as a launch on the device takes it: from the host, or from there."""
    return number if is_at_hand(number) else number.to(device)


def kept_random_states(tensors: Iterable[Tensor]) -> Any:
    """A context that leaves the random numbers of the host, and of the devices of these tensors, as they were."""
    devices = {t.device for t in tensors if row_of(t.device).has_random_state}
    return torch.random.fork_rng(devices, device_type=next((d.type for d in devices), "cuda"))
