"""What a run measures unless its options say otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from benchmarks.cases import CASES, DEVICE_CASES
from benchmarks.peers import COMBO_LOOP, COOPERATIVE_LOOP
from benchmarks.race import Effort
from benchmarks.rows import COMPILED_MODES, MODES, Mode


@dataclass(frozen=True)
class Preset:
    """What a run measures unless its options say otherwise."""

    cases: tuple[str, ...]
    effort: Effort  # of a case and mode
    not_compiled: dict[tuple[str, Mode], str]
    not_stepped: tuple[str, ...] = ()
    not_raced: dict[str, str] = field(default_factory=dict)  # peer -> the reason
    compile_seconds: float = math.inf


# What takes too long to compile, and what --quick leaves out for the same reason.
_MINUTES = "takes minutes to compile: --compile-all"
_NOT_COMPILED: dict[tuple[str, Mode], str] = {("small_tensors", mode): _MINUTES for mode in MODES}
_NOT_QUICK = "is not in --quick"
_ON_CPU = "has its compiled training step measured on a CPU only: --compile-all"

_NOT_COMPILED_ON_CUDA = _NOT_COMPILED | {(case, mode): _ON_CPU for case in CASES for mode in COMPILED_MODES}

# A bfloat16 parameter moves by less than its rounding: a step of it cannot be checked.
_NOT_STEPPED_ON_CUDA = ("small_tensors", "vit_b16", "one_tensor", "tinyllama_bf16")

#: By the kind of device, and whether the run is quick.
PRESETS = {
    ("cpu", False): Preset(DEVICE_CASES["cpu"], Effort(rounds=30, seconds=60.0), _NOT_COMPILED),
    ("cpu", True): Preset(
        ("net", "mlp", "small_tensors", "resnet50"),
        Effort(rounds=15, seconds=1.0),
        _NOT_COMPILED | {("resnet50", mode): _NOT_QUICK for mode in ("value", *COMPILED_MODES)},
        not_stepped=("small_tensors",),
    ),
    ("cuda", False): Preset(
        DEVICE_CASES["cuda"],
        Effort(rounds=50, seconds=3.0),
        _NOT_COMPILED_ON_CUDA,
        not_stepped=_NOT_STEPPED_ON_CUDA,
        compile_seconds=200.0,
    ),
    ("cuda", True): Preset(
        ("small_tensors", "resnet50", "one_tensor", "tinyllama_bf16"),
        Effort(rounds=20, seconds=1.0),
        _NOT_COMPILED_ON_CUDA | {(case, "value"): _NOT_QUICK for case in DEVICE_CASES["cuda"]},
        not_stepped=_NOT_STEPPED_ON_CUDA,
        not_raced={COMBO_LOOP.name: _NOT_QUICK, COOPERATIVE_LOOP.name: _NOT_QUICK},
        compile_seconds=70.0,
    ),
}
