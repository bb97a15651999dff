"""What a GPU's results are held against: the bandwidth of memory, of which its L2 cache holds next to nothing, and the
CPU's values of random lists."""

import random

import torch

import fused_reg
from benchmarks.cases import COPY, MODES, READ, SCALE, UPDATE
from benchmarks.devices import Device, race
from benchmarks.limits import FACTOR
from benchmarks.results import Results

LISTS = 1000
LEAST_BYTES, _L2_CACHES = 1 << 30, 16
_DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16)  # the value of all of them is a float32
_SIZES = (1, 7, 64, 1000, 4099, 70_000)  # at most, of a tensor


def measure_rooflines(results: Results, device: Device) -> None:
    """Race the plain operations against each other."""
    x = torch.rand(max(LEAST_BYTES, _L2_CACHES * results.gpu["l2_bytes"]) // 4, device=device.name)
    y = torch.zeros_like(x)
    calls = {READ: x.sum, COPY: lambda: y.copy_(x), UPDATE: lambda: y.add_(x), SCALE: lambda: x.mul_(FACTOR)}
    timings = race(list(calls.values()), 30, 5.0, device)
    for (name, passes), timing in zip({READ: 1, COPY: 2, UPDATE: 3, SCALE: 2}.items(), timings, strict=True):
        bounded, moved = [mode for mode in MODES if MODES[mode].roofline == name], passes * x.nbytes
        times = {"median_us": timing.median_ms * 1e3, "gb_per_s": moved / timing.median_ms / 1e6}
        results.rooflines.append({"name": name, "modes": bounded, "bytes": moved} | times)


def measure_agreement(results: Results, device: str) -> None:
    """Compare the values of random lists, on the device and on the CPU."""
    choose, generator, ulps = random.Random(0), torch.Generator().manual_seed(0), []
    for _ in range(LISTS):
        sizes = [choose.randint(1, choose.choice(_SIZES)) for _ in range(choose.randint(1, 8))]
        scales = [choose.choice((0.01, 1.0, 30.0)) for _ in sizes]
        drawn = [torch.randn(n, generator=generator) * scale for n, scale in zip(sizes, scales, strict=True)]
        params = [t.to(choose.choice(_DTYPES)) for t in drawn]
        l1, l2 = choose.uniform(0, 1), choose.uniform(0, 1)
        there = fused_reg.fused_penalty([p.to(device) for p in params], l1, l2).cpu()
        here = fused_reg.fused_penalty(params, l1, l2)
        # The places of positive float32 numbers among them all.
        ulps.append(abs(int(here.view(torch.int32)) - int(there.view(torch.int32))))
    results.agreement = {"lists": LISTS, "equal": ulps.count(0), "max_ulp": max(ulps)}
