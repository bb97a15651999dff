"""Figures of the kernels' machine code, read in what ptxas and nvdisasm print, their limits and their record."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

MAX_REGISTERS = 168  # a thread, of 65,536 a multiprocessor: 384 threads are resident
TOLERANCE = 0.1  # so much worse than recorded is a failure


class Loop(NamedTuple):
    """An innermost loop that loads 16 bytes at a time, as the loops over the elements of each dtype do."""

    loads: int  # of 16 bytes
    stores: int  # likewise
    conversions: int  # to and from float64, of what runs: see work()
    float64: int  # additions, multiplications and comparisons, likewise


@dataclass(frozen=True)
class Kernel:
    """The figures of one kernel for one architecture."""

    name: str
    architecture: int
    registers: int
    local_bytes: int  # stack frame, spill stores and loads, and local memory together
    code_bytes: int = 0
    loads: int = 0  # of 16 bytes of global memory: the most that are under way at a time in a basic block
    conversions: int = 0  # to and from float64, in all of it
    loops: tuple[Loop, ...] = ()
    unordered_atomics: int = 0

    def per_load(self, what: str) -> float:
        """Over all loops."""
        loads = sum(loop.loads for loop in self.loops)
        return sum(getattr(loop, what) for loop in self.loops) / loads if loads else 0.0


# The figures that are recorded, each in a column: their title, and whether less is better.
FIGURES = {
    "registers": ("registers", True),
    "code_bytes": ("bytes of code", True),
    "loads": ("loads under way", False),
    "conversions": ("conversions", True),
}


# What ptxas and nvdisasm print


def parse_report(text: str) -> list[Kernel]:
    """The kernels in the output of ``nvcc -Xptxas -v``, by their mangled names."""
    kernels = []
    for part in text.split("Compiling entry function ")[1:]:
        head = re.match(r"'(.+)' for 'sm_(\d+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if not (head and registers and frames):
            raise ValueError(f"ptxas wrote what this script cannot read: {part}")
        local = [*sum(frames, ()), *re.findall(r"(\d+) bytes lmem", part)]
        kernels.append(Kernel(head[1], int(head[2]), int(registers[1]), sum(map(int, local))))
    return kernels


_SECTION = re.compile(r"^\s*\.section\s+\.text\.([^,\s]+).*$", re.MULTILINE)
_LABEL = re.compile(r"(\.L\w+):")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)([.\w]*)\s*(.*);")
_ENDS_BLOCK = ("BRA", "BRX", "JMP", "JMX", "CALL", "RET", "EXIT")
_FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP")
_INSTRUCTION_BYTES = 16


class Instruction(NamedTuple):
    address: str
    predicate: str | None
    operation: str
    modifiers: str
    operands: str

    @property
    def loads(self) -> int:
        """How often 16 bytes of global memory; a generic load is of it, where shared memory has loads of its own."""
        width = re.search(r"\.(128|256)\b", self.modifiers) if self.operation in ("LDG", "LD") else None
        return int(width[1]) // 128 if width else 0

    @property
    def stores(self) -> bool:
        return self.operation in ("STG", "ST") and ".128" in self.modifiers

    @property
    def converts(self) -> bool:
        return self.operation in ("F2F", "F2I", "I2F") and ".F64" in self.modifiers


Line = Instruction | str  # or a label


def parse_code(text: str) -> dict[str, dict[str, Any]]:
    """Mangled name -> figures, of each kernel that nvdisasm prints."""
    _, *parts = _SECTION.split(text)
    found = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        lines: list[Line] = []
        for line in body.splitlines():
            if label := _LABEL.match(line):
                lines.append(label[1])
            elif instruction := _INSTRUCTION.match(line):
                lines.append(Instruction(*instruction.groups()))
        instructions = [line for line in lines if isinstance(line, Instruction)]
        if not instructions:
            raise ValueError(f"nvdisasm wrote what this script cannot read: {name} has no instruction")
        found[name] = {
            "code_bytes": int(instructions[-1].address, 16) + _INSTRUCTION_BYTES,
            "loads": loads_under_way(lines),
            "conversions": sum(x.converts for x in instructions),
            "loops": hot_loops(lines),
            "unordered_atomics": unordered_atomics(lines),
        }
    return found


def loads_under_way(lines: list[Line]) -> int:
    """The most loads of 16 bytes at a time of which nothing is used yet, within a basic block."""
    most = 0
    under_way: dict[str, int] = {}  # a register that is being loaded -> the first one of its load
    for line in lines:
        if isinstance(line, str):
            under_way = {}
            continue
        used = re.findall(r"\bR\d+", line.operands)
        loaded = int(used.pop(0)[1:]) if line.loads else 0
        done = {under_way[register] for register in used if register in under_way}
        under_way = {register: first for register, first in under_way.items() if first not in done}
        under_way |= {f"R{i}": i // 4 for i in range(loaded, loaded + 4 * line.loads)}
        most = max(most, len(set(under_way.values())))
        if line.operation in _ENDS_BLOCK:
            under_way = {}
    return most


def unordered_atomics(lines: list[Line]) -> int:
    """How many do not release, by a barrier of memory before, and acquire, by an invalidated cache after."""
    count = 0
    block: list[str] = []
    for line in [*lines, ""]:
        if isinstance(line, Instruction):
            block.append(line.operation + line.modifiers)
        if isinstance(line, str) or line.operation in _ENDS_BLOCK:
            for i, operation in enumerate(block):
                is_ordered = any("MEMBAR" in x for x in block[:i]) and "CCTL.IVALL" in block[i:]
                count += operation.startswith(("ATOM", "RED.")) and not is_ordered
            block = []
    return count


def work(body: list[Line]) -> tuple[int, int]:
    """The conversions and operations of float64 that run in the body of a loop: on the way with most of them.

    Branches exclude one another: the sums of L1 alone, of L2 alone, and of both, the usual and the longest. A way that
    calls ``__prof_trigger`` is rare, and not taken.
    """
    places = {line: i for i, line in enumerate(body) if isinstance(line, str)}
    ways: list[tuple[int, int] | None] = [(0, 0)] * (len(body) + 1)  # from each line to the end; None: rare
    for i, line in reversed(list(enumerate(body))):
        nexts = [ways[i + 1]]
        if isinstance(line, Instruction) and line.operation in ("BRA", "EXIT", "BRX"):
            target = re.search(r"\.L\w+", line.operands)
            place = places.get(target[0], 0) if target else 0
            to = ways[place] if place > i else (0, 0)  # or out of the body
            is_choice = line.predicate or "," in line.operands
            nexts = [to, *nexts] if is_choice else [to]
        most = max((way for way in nexts if way is not None), key=sum, default=None)
        if isinstance(line, Instruction) and most is not None:
            most = (most[0] + line.converts, most[1] + (line.operation in _FLOAT64))
            most = None if line.operation == "PMTRIG" else most
        ways[i] = most
    return ways[0] or (0, 0)


def hot_loops(lines: list[Line]) -> tuple[Loop, ...]:
    places = {line: i for i, line in enumerate(lines) if isinstance(line, str)}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"\.L\w+", line.operands) if isinstance(line, Instruction) else None
        if target and line.operation == "BRA" and places.get(target[0], end) < end:
            loops.append((places[target[0]], end))
    found = []
    for begin, end in loops:
        if not any(begin <= first and last <= end and (first, last) != (begin, end) for first, last in loops):
            body = [line for line in lines[begin : end + 1] if isinstance(line, Instruction)]
            found.append(Loop(sum(x.loads for x in body), sum(x.stores for x in body), *work(lines[begin : end + 1])))
    return tuple(sorted(loop for loop in found if loop.loads))


def short_name(signature: str) -> str:
    """``twice<float,true>`` of ``void fused_reg::(anonymous namespace)::twice<float, true>(float*, int)``."""
    for noise in ("(anonymous namespace)::", "fused_reg::", "(bool)", "(int)", "void "):
        signature = signature.replace(noise, "")
    return re.sub(r"\(.*\)$", "", signature).replace(" ", "")


def readable(kernels: list[Kernel]) -> list[Kernel]:
    """With the names of the source."""
    names = "".join(f"{kernel.name}\n" for kernel in kernels)
    plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout.splitlines()
    return [replace(kernel, name=short_name(name)) for kernel, name in zip(kernels, plain, strict=True)]


# Limits and record


def failures(kernels: list[Kernel]) -> list[str]:
    """What no kernel may do."""
    out = [] if kernels else ["no kernel is in the report"]
    for k in kernels:
        where = f"{k.name} for sm_{k.architecture}"
        if k.local_bytes:
            out.append(f"{where} uses local memory: {k.local_bytes} bytes of stack frame, spills and lmem")
        if k.registers > MAX_REGISTERS:
            out.append(f"{where} uses {k.registers} registers, more than {MAX_REGISTERS}")
        if k.unordered_atomics:
            out.append(f"{where} has atomics that do not release and acquire: {k.unordered_atomics}")
    return out


def regressions(kernels: list[Kernel], recorded: list[Kernel]) -> list[str]:
    """What is worse than recorded, and which kernels are on one side only."""
    new, old = ({(k.name, k.architecture): k for k in of} for of in (kernels, recorded))
    out = []
    for key in sorted(new.keys() | old.keys()):
        where = f"{key[0]} for sm_{key[1]}"
        if key not in new or key not in old:
            out.append(f"{where} is {'recorded, and was not compiled' if key in old else 'not recorded'}")
            continue
        for figure, (title, less_is_better) in FIGURES.items():
            now, before = getattr(new[key], figure), getattr(old[key], figure)
            worse = now - before if less_is_better else before - now
            if worse > TOLERANCE * before:
                out.append(f"{where}: {title} {now}, recorded {before}")
        for what in ("conversions", "float64"):
            rate, rate_before = new[key].per_load(what), old[key].per_load(what)
            if rate > (1 + TOLERANCE) * rate_before:
                out.append(f"{where}: {what} per load in loops {rate:.1f}, recorded {rate_before:.1f}")
    return out


def record(kernels: list[Kernel], version: str) -> str:
    """The page: a table for each architecture."""
    parts = [HEAD.format(version=version)]
    for architecture in sorted({k.architecture for k in kernels}):
        titles = ["kernel", *(title for title, _ in FIGURES.values()), "loops: loads/stores/conversions/float64"]
        rows = [titles, ["---", *["---:"] * len(FIGURES), "---"]]
        for k in sorted((k for k in kernels if k.architecture == architecture), key=lambda k: k.name):
            loops = ", ".join("/".join(map(str, loop)) for loop in k.loops)
            rows.append([f"`{k.name}`", *(str(getattr(k, figure)) for figure in FIGURES), loops])
        parts.append(f"\n## sm_{architecture}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "".join(parts)


HEAD = """\
# Machine code of the kernels

By nvcc {version} (`python -m scripts.check_cuda_compile --update`). Loads under way: of 16 bytes of global memory, the
most at a time within a basic block. Conversions: instructions that convert to or from float64. Loops: the innermost
ones that load 16 bytes at a time, at least one for each dtype (a load has 2 elements of float64, 4 of float32, 8 of 16
bits); of each these loads and stores, and of what runs, the conversions, and additions, multiplications and comparisons
of float64: of branches that exclude one another the longest, the sums of both terms, and none that is rare. A figure
that gets worse by more than a tenth, of loops per load of all, fails `make cuda-compile` where nvcc has this
version.
"""


def read_record(text: str) -> tuple[str, list[Kernel]]:
    """The version of nvcc, and the kernels."""
    version, kernels = re.search(r"nvcc (\d+\.\d+)", text), []
    for architecture, part in re.findall(r"^## sm_(\d+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        for name, *cells, loops in re.findall(r"\| `(.+)` " + r"\| (\d+) " * len(FIGURES) + r"\| (.*) \|", part):
            figures = dict(zip(FIGURES, map(int, cells), strict=True))
            read = tuple(Loop(*map(int, loop.split("/"))) for loop in loops.split(", ") if loop)
            kernels.append(Kernel(name, int(architecture), local_bytes=0, loops=read, **figures))
    return version[1] if version else "", kernels
