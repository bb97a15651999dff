"""Figures of the kernels' machine code, read in what ptxas and nvdisasm print, their limits and their record."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

MAX_REGISTERS = 168  # a thread, of 65,536 a multiprocessor: 384 threads are resident
TOLERANCE = 0.1  # so much worse than recorded is a failure


class Loop(NamedTuple):
    """A loop that loads by vectors alone, as those over whole blocks of each dtype do; without the loops in it."""

    loaded: int  # bytes of global memory
    stored: int  # likewise, of what runs: see work()
    under_way: int  # of the bytes loaded, the most at a time
    conversions: int  # to and from float64, of what runs
    float64: int  # additions, multiplications and comparisons, likewise
    integers: int = 0  # likewise, of the units for integers, comparisons and choices
    instructions: int = 0  # all that run
    is_float64: bool = False  # of elements of float64

    def __str__(self) -> str:
        return "/".join(map(str, self[:-1])) + "*" * self.is_float64


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
        """For 16 bytes, over all loops."""
        loaded = sum(loop.loaded for loop in self.loops)
        return 16 * sum(getattr(loop, what) for loop in self.loops) / loaded if loaded else 0.0


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
# Those of the unit that also compares and chooses; products (IMAD) are another's.
_INTEGERS = re.compile(r"V?IADD|V?IMNMX|LOP|SHF|ISETP|LEA|PRMT|SEL|FMNMX|FSETP|FSEL")
_INSTRUCTION_BYTES = 16


class Instruction(NamedTuple):
    address: str
    predicate: str | None
    operation: str
    modifiers: str
    operands: str

    @property
    def width(self) -> int:
        """Bytes of what it moves."""
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", self.modifiers)
        return int(bits[1]) // 8 if bits else 4

    @property
    def loaded(self) -> int:
        """Bytes of global memory; a generic load is of it, where shared memory has loads of its own."""
        return self.width if self.operation in ("LDG", "LD") else 0

    @property
    def stored(self) -> int:
        return self.width if self.operation in ("STG", "ST") else 0

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
            "loads": under_way(lines, 16) // 16,
            "conversions": sum(x.converts for x in instructions),
            "loops": hot_loops(lines),
            "unordered_atomics": unordered_atomics(lines),
        }
    return found


def under_way(lines: list[Line], least: int) -> int:
    """The most bytes of loads of which nothing is used yet, within a basic block; of those of at least so many."""
    most = 0
    loads: dict[int, range] = {}  # by the first register of a load all of them
    for line in lines:
        if isinstance(line, str):
            loads = {}
            continue
        used = [int(register[1:]) for register in re.findall(r"\bR\d+", line.operands)]
        is_load = line.loaded >= least and used
        own = range(used[0], used[0] + line.loaded // 4) if is_load else range(0)
        of_use = used[1:] if is_load else used
        loads = {
            first: held
            for first, held in loads.items()
            if not any(register in held for register in of_use) and (held.stop <= own.start or own.stop <= held.start)
        }
        if own:
            loads[own.start] = own
        most = max(most, 4 * sum(map(len, loads.values())))
        if line.operation in _ENDS_BLOCK:
            loads = {}
    return most


def is_of_float64(body: list[Instruction]) -> bool:
    """Whether operations of float64 take what is loaded as it is."""
    loaded: set[str] = set()
    for line in body:
        used = re.findall(r"\bR\d+", line.operands)
        if line.loaded and used:
            first = int(used[0][1:])
            loaded |= {f"R{i}" for i in range(first, first + line.loaded // 4)}
        elif line.operation in _FLOAT64 and loaded.intersection(used if line.operation == "DSETP" else used[1:]):
            return True
        elif used:
            loaded.discard(used[0])
    return False


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


class Work(NamedTuple):
    """What runs: a way through the body of a loop."""

    conversions: int = 0
    float64: int = 0
    integers: int = 0
    instructions: int = 0
    stored: int = 0

    def after(self, line: Instruction) -> Work:
        is_integer = _INTEGERS.match(line.operation) is not None
        more = (line.converts, line.operation in _FLOAT64, is_integer, 1, line.stored)
        return Work(*(own + new for own, new in zip(self, more, strict=True)))

    @property
    def length(self) -> tuple[int, int]:
        return self.conversions + self.float64, self.instructions


def work(body: list[Line]) -> Work:
    """What runs in the body of a loop: the way with most conversions and operations of float64.

    Branches exclude one another: the sums of L1 alone, of L2 alone, and of both, the usual and the longest. A way that
    calls ``__prof_trigger`` is rare, and not taken.
    """
    places = {line: i for i, line in enumerate(body) if isinstance(line, str)}
    ways: list[Work | None] = [Work()] * (len(body) + 1)  # from each line to the end; None: rare
    for i, line in reversed(list(enumerate(body))):
        nexts = [ways[i + 1]]
        if isinstance(line, Instruction) and line.operation in ("BRA", "EXIT", "BRX"):
            target = re.search(r"\.L\w+", line.operands)
            place = places.get(target[0], 0) if target else 0
            to = ways[place] if place > i else Work()  # or out of the body
            is_choice = line.predicate or "," in line.operands
            nexts = [to, *nexts] if is_choice else [to]
        most = max((way for way in nexts if way is not None), key=lambda way: way.length, default=None)
        if isinstance(line, Instruction) and most is not None:
            most = None if line.operation == "PMTRIG" else most.after(line)
        ways[i] = most
    return ways[0] or Work()


def hot_loops(lines: list[Line]) -> tuple[Loop, ...]:
    places = {line: i for i, line in enumerate(lines) if isinstance(line, str)}
    loops = []
    for end, line in enumerate(lines):
        target = re.search(r"\.L\w+", line.operands) if isinstance(line, Instruction) else None
        if target and line.operation == "BRA" and places.get(target[0], end) < end:
            loops.append((places[target[0]], end))
    found = []
    for begin, end in loops:
        inner = [loop for loop in loops if begin <= loop[0] and loop[1] <= end and loop != (begin, end)]
        of_inner = {i for first, last in inner for i in range(first, last + 1)}
        own = [i for i in range(begin, end + 1) if i not in of_inner]
        body = [line for line in map(lines.__getitem__, own) if isinstance(line, Instruction)]
        widths = {x.loaded for x in body if x.loaded}
        is_float64 = is_of_float64(body)
        # What loads also by less is for the ends of chunks; doubles one by one are sums of chunks.
        if len(widths) == 1 and min(widths) >= (16 if is_float64 else 8):
            loaded, held = sum(x.loaded for x in body), under_way([lines[i] for i in own], 8)
            way = [lines[i] for i in range(begin, end + 1) if i not in of_inner or isinstance(lines[i], str)]
            *runs, stored = work(way)
            found.append(Loop(loaded, stored, held, *runs, is_float64))
    return tuple(sorted(found))


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
                out.append(f"{where}: {what} per 16 bytes in loops {rate:.1f}, recorded {rate_before:.1f}")
    return out


def record(kernels: list[Kernel], version: str) -> str:
    """The page: a table for each architecture."""
    parts = [HEAD.format(version=version)]
    for architecture in sorted({k.architecture for k in kernels}):
        titles = [
            "kernel",
            *(title for title, _ in FIGURES.values()),
            f"loops: {'/'.join(Loop._fields[:-1]).replace('_', ' ')}",
        ]
        rows = [titles, ["---", *["---:"] * len(FIGURES), "---"]]
        for k in sorted((k for k in kernels if k.architecture == architecture), key=lambda k: k.name):
            loops = ", ".join(map(str, k.loops))
            rows.append([f"`{k.name}`", *(str(getattr(k, figure)) for figure in FIGURES), loops])
        parts.append(f"\n## sm_{architecture}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows))
    return "".join(parts)


HEAD = """\
# Machine code of the kernels

By nvcc {version} (`python -m scripts.check_cuda_compile --update`). Loads under way: of 16 bytes of global memory, the
most at a time within a basic block. Conversions: instructions that convert to or from float64. Loops: those over whole
blocks, at least one for each dtype, and with a star those of float64 elements; of each the bytes that it loads, stores,
and has under way at a time, and of what runs, the conversions, the additions, multiplications and comparisons of
float64, the instructions of the units for integers, comparisons and choices, and all: of branches that exclude one
another the longest, the sums of both terms, and none that is rare. A figure that gets worse by more than a tenth, of
loops per byte that all load, fails `make cuda-compile` where nvcc has this version.
"""


def read_record(text: str) -> tuple[str, list[Kernel]]:
    """The version of nvcc, and the kernels."""
    version, kernels = re.search(r"nvcc (\d+\.\d+)", text), []
    for architecture, part in re.findall(r"^## sm_(\d+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        for name, *cells, loops in re.findall(r"\| `(.+)` " + r"\| (\d+) " * len(FIGURES) + r"\| (.*) \|", part):
            figures = dict(zip(FIGURES, map(int, cells), strict=True))
            read = tuple(_read_loop(loop) for loop in loops.split(", ") if loop)
            kernels.append(Kernel(name, int(architecture), local_bytes=0, loops=read, **figures))
    return version[1] if version else "", kernels


def _read_loop(text: str) -> Loop:
    numbers = [int(number) for number in text.removesuffix("*").split("/")]
    if len(numbers) != len(Loop._fields) - 1:
        raise ValueError(f"a loop of the record must have {len(Loop._fields) - 1} numbers, got {text!r}")
    return Loop(*numbers, text.endswith("*"))
