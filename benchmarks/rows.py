"""What a run consists of: one row per measurement, one figure per target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

#: ours; peer: another way to the same result; limit: what the machine can do, or the step without a penalty.
Role = Literal["ours", "peer", "limit"]

#: value: no gradient wanted. value_and_grad: outside of autograd, into fresh memory. fresh, present: forward and
#: backward with `.grad` None, whose freeing is timed too, and with a `.grad` to add to. norm_value, norm_fresh: value
#: and fresh of a sum of norms. prox: the proximal step, in place. step: an optimizer's step. compiled_fresh,
#: compiled_present: fresh and present of a task's loss with a penalty, all of it compiled.
Mode = Literal[
    "value",
    "value_and_grad",
    "fresh",
    "present",
    "norm_value",
    "norm_fresh",
    "prox",
    "step",
    "compiled_fresh",
    "compiled_present",
]
MODES: tuple[Mode, ...] = get_args(Mode)

#: The modes in which everything is compiled, by torch.compile.
COMPILED_MODES: tuple[Mode, ...] = ("compiled_fresh", "compiled_present")

#: The family of the calls that a CUDA graph replays.
CUDA_GRAPH = "CUDA graph"

#: The bytes that must be moved at least, per byte of parameter.
#: A step is an optimizer's own and has them in `optimizers.py`.
PASSES: dict[Mode, int] = {
    "value": 1,
    "value_and_grad": 2,
    "fresh": 2,
    "present": 3,
    "norm_value": 1,
    "norm_fresh": 3,  # the norms must be known before the first gradient
    "prox": 2,
    "compiled_fresh": 2,
    "compiled_present": 3,
}


class UnavailableError(Exception):
    """An implementation cannot be had here; the message continues its name."""


@dataclass(frozen=True)
class Circumstances:
    """What a time is a time of, besides the implementation."""

    case: str
    mode: Mode
    device: str
    dtype: str
    capability: str  # the CPU's instruction set
    threads: int
    tensors: int
    elements: int


@dataclass(frozen=True)
class Costs:
    """What a call on a GPU costs besides the GPU's time."""

    host_us: float  # until the call returns, with an empty queue
    launches: int | None  # of kernels; these three are None if the profiler saw nothing
    copies: int | None  # memcpy
    fills: int | None  # memset
    peak_bytes: int  # above what was allocated before; of a CUDA graph, what its capture allocated
    percent_of_roofline: float | None = None  # of the bandwidth of the matching `Roofline`

    @property
    def operations(self) -> int | None:
        """Everything that the call makes the GPU do."""
        if self.launches is None or self.copies is None or self.fills is None:
            return None
        return self.launches + self.copies + self.fills


@dataclass(frozen=True)
class Row(Circumstances):
    """The time of one implementation of one mode on one case."""

    implementation: str
    role: Role
    family: str  # within a mode, what is compared with what: an optimizer, a kind of group, CUDA_GRAPH, else ""
    is_reference_limit: bool  # the limit that the ratios of this family and mode are to
    bytes: int  # that any implementation of the mode must move
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    calls_per_sample: int
    gb_per_s: float
    ratio_to_ours: float | None  # above 1: slower than ours; None: ours is not in the run
    ratio_to_limit: float | None  # above 1: slower than the limit
    value_error: float | None  # relative, to float64
    gradient_error: float | None  # of the largest gradient, to float64; of a step, the step's
    compile_s: float | None  # not part of the times
    costs: Costs | None = None  # of a GPU

    @property
    def cost_us(self) -> float:
        """What the call adds to a loop of calls: the time of the device or of the host, whichever is longer."""
        return max(self.median_ms * 1e3, self.costs.host_us if self.costs else 0.0)


@dataclass(frozen=True)
class MemoryRow:
    """What one forward and backward with `.grad` None needs at its peak, above what was there before, and what of it
    stays with the process when the gradients are freed, for the next step or for the system to take.
    """

    case: str
    implementation: str
    role: Role
    parameter_bytes: int
    peak_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class Absent:
    """What a run left out, and why."""

    case: str
    what: str  # a mode, or memory
    implementation: str
    reason: str


@dataclass(frozen=True)
class Figure:
    """A target and what was measured for it; `measured` is None if this run did not measure it."""

    claim: str
    measured: float | None
    target: float
    at_least: bool

    @property
    def passed(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.target if self.at_least else self.measured <= self.target


@dataclass(frozen=True)
class Roofline:
    """The bandwidth of a GPU, measured on memory far larger than its L2 cache."""

    name: str
    modes: list[Mode]  # whose rows it bounds
    bytes: int  # moved by a call
    median_us: float
    gb_per_s: float


@dataclass(frozen=True)
class Agreement:
    """How the values of random lists on a GPU compare with the CPU's."""

    lists: int
    equal: int  # bit by bit
    max_ulp: int


#: What one part of a run adds to its results.
Record = Row | MemoryRow | Absent | Roofline | Agreement
