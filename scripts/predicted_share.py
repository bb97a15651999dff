"""What share of a card's bandwidth the loops of the kernels can reach, by their instructions and loads: a model, which
tells where machine code is the limit before anything is measured.

A multiprocessor has so many conversions and operations of float64 a clock, of integers and of all instructions, and as
many bytes under way as its resident threads, which their registers bound, have loaded and not used; what its part of
the bandwidth wants of either is what bounds the share.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from scripts.machine_code import Kernel, Loop

THREADS = 128  # of a CTA: kThreads
REGISTERS = 65536  # of a multiprocessor
MOST_THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 103: 2048, 120: 1536}  # of it
# Of a clock and multiprocessor, by architecture (CUDA C++ programming guide, "Arithmetic Instructions").
FLOAT64 = {75: 2, 80: 32, 86: 2, 89: 2, 90: 64, 100: 64, 103: 2, 120: 2}
INTEGERS, INSTRUCTIONS = 64, 128  # of every architecture; the latter are those that start
CONVERSIONS = {75: 2, 80: 16, 86: 2, 89: 2, 90: 16, 100: 16, 103: 2, 120: 2}


class Card(NamedTuple):
    """By NVIDIA's data sheets, but for the latency under load, which is assumed."""

    name: str
    architecture: int
    bandwidth: float  # bytes a second
    multiprocessors: int
    clock: float  # boost, Hz
    latency: float = 900e-9


CARDS = (
    Card("T4", 75, 320e9, 40, 1.59e9),
    Card("A100", 80, 2039e9, 108, 1.41e9),
    Card("A10", 86, 600e9, 72, 1.695e9),
    Card("L4", 89, 300e9, 58, 2.04e9),
    Card("RTX 4090", 89, 1008e9, 128, 2.52e9),
    Card("H100", 90, 3352e9, 132, 1.98e9, 1300e-9),
    Card("H200", 90, 4800e9, 132, 1.98e9, 1300e-9),
    Card("B200", 100, 8000e9, 148, 1.965e9, 1200e-9),
    Card("B300", 103, 8000e9, 148, 1.92e9, 1200e-9),
    Card("RTX 5090", 120, 1792e9, 170, 2.407e9),
)


def resident_threads(kernel: Kernel) -> int:
    """As many CTAs as the registers suffice for, which threads get by eights."""
    registers = -(-kernel.registers // 8) * 8
    return min(REGISTERS // registers // THREADS * THREADS, MOST_THREADS[kernel.architecture])


def predicted_share(loop: Loop, threads: int, card: Card) -> float:
    """At most 1."""
    per_clock = card.bandwidth / card.multiprocessors / card.clock  # bytes
    clocks = (loop.loaded + loop.stored) / per_clock  # that the bandwidth takes for a thread
    busy = max(
        loop.conversions / CONVERSIONS[card.architecture],
        loop.float64 / FLOAT64[card.architecture],
        loop.integers / INTEGERS,
        loop.instructions / INSTRUCTIONS,
    )
    wanted = card.bandwidth / card.multiprocessors * card.latency
    return min(1.0, clocks / busy if busy else 1.0, loop.under_way * threads / wanted)


def table(kernels: list[Kernel]) -> str:
    """In percent, of each kernel's slowest loop, with the table of arguments with which it is slowest."""
    shares: dict[str, dict[str, dict[bool, float]]] = {}  # of a kernel, on a card, of elements of float64 and others
    for kernel in kernels:
        name = re.sub(r"cuda::\w+Table(<\d+ul>)?,", "", kernel.name)
        for card in [card for card in CARDS if card.architecture == kernel.architecture]:
            for loop in kernel.loops:
                share = predicted_share(loop, resident_threads(kernel), card)
                of_card = shares.setdefault(name, {}).setdefault(card.name, {})
                of_card[loop.is_float64] = min(share, of_card.get(loop.is_float64, 1.0))
    cards = [card.name for card in CARDS if any(card.name in of_kernel for of_kernel in shares.values())]
    rows = [["kernel", *cards], ["---", *["---:"] * len(cards)]]
    for name, of_kernel in sorted(shares.items()):
        rows.append([f"`{name}`", *(cell(of_kernel[card]) if card in of_kernel else "-" for card in cards)])
    return f"\n{HEAD}\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(shares: dict[bool, float]) -> str:
    narrow, wide = (shares.get(is_float64, 1.0) for is_float64 in (False, True))
    return f"{100 * narrow:.0f}" + (f" ({100 * wide:.0f})" if round(wide, 2) < round(narrow, 2) else "")


HEAD = """\
## Predicted share of bandwidth

Percent, of the slowest loop of float32 and half elements, and in brackets, where that is slower, of float64 ones:
what its instructions and its loads under way allow (`scripts/predicted_share.py`, a model; nothing of it is measured,
and the fixed costs of a launch are not in it). What runs is counted, with both terms; where float64 units are few, of
lanes whose integers are exact, and sums that come before the rest as a loop of their own. Of an optimizer's step and of
further terms it is all that they may be asked for, at a time: what runs takes less.
"""
