"""What scripts/machine_code.py reads in what ptxas and nvdisasm print, and what scripts/check_cuda_compile.py makes a
failure."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import build_config
import cuda_toolkit
from scripts import check_cuda_compile
from scripts.machine_code import (
    FIGURES,
    MAX_REGISTERS,
    Kernel,
    Loop,
    failures,
    parse_code,
    parse_report,
    read_record,
    readable,
    regressions,
    short_name,
)
from scripts.predicted_share import CARDS, FLOAT64, predicted_share, resident_threads, table

ROOT = Path(__file__).parent.parent
# Of nvcc 13.0.
CLEAN = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3fooILb0EEEvPd' for 'sm_75'
ptxas info    : Function properties for _ZN3fooILb0EEEvPd
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 2.581 ms
ptxas info    : Compiling entry function '_ZN3fooILb1EEEvPf' for 'sm_75'
ptxas info    : Function properties for _ZN3fooILb1EEEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 1.874 ms
"""
SPILLS = """\
ptxas warning : Local memory used for function 'spill', size of stack frame: 1184 bytes
ptxas warning : Registers are spilled to local memory in function 'f', 16 bytes spill stores
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'spill' for 'sm_90'
ptxas info    : Function properties for spill
    1184 bytes stack frame, 1232 bytes spill stores, 1200 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1184 bytes cumulative stack size
ptxas info    : Compile time = 67.779 ms
ptxas info    : Function properties for f
    0 bytes stack frame, 16 bytes spill stores, 8 bytes spill loads
"""


def test_clean_report():
    kernels = parse_report(CLEAN)
    assert kernels == [Kernel("_ZN3fooILb0EEEvPd", 75, 8, 0), Kernel("_ZN3fooILb1EEEvPf", 75, 32, 0)]
    assert failures(kernels) == []


def test_spills_and_stack_frames():
    """Of the kernel and of a function that it calls."""
    kernels = parse_report(CLEAN + SPILLS)
    assert kernels[-1] == Kernel("spill", 90, 32, 1184 + 1232 + 1200 + 16 + 8)
    assert failures(kernels) == ["spill for sm_90 uses local memory: 3640 bytes of stack frame, spills and lmem"]


def test_local_memory():
    """As older versions of ptxas write it."""
    kernels = parse_report(CLEAN.replace("364 bytes cmem[0]", "40 bytes lmem, 364 bytes cmem[0]"))
    assert [k.local_bytes for k in kernels] == [40, 40]


def test_too_many_registers():
    (most, over) = (Kernel("f", 80, n, 0) for n in (MAX_REGISTERS, MAX_REGISTERS + 1))
    assert failures([most]) == []
    assert failures([most, over]) == [f"f for sm_80 uses {MAX_REGISTERS + 1} registers, more than {MAX_REGISTERS}"]


def test_nothing_was_compiled():
    assert failures(parse_report("")) == ["no kernel is in the report"]


@pytest.mark.parametrize("missing", ["Used 8 registers", "0 bytes stack frame", "sm_75"])
def test_report_of_another_form(missing):
    with pytest.raises(ValueError, match="ptxas wrote what this script cannot read"):
        parse_report(CLEAN.replace(missing, ""))


# Machine code

CODE = """\
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM90"
	.section	.nv.constant0.first,"a",@progbits
//--------------------- .text.first                      --------------------------
	.section	.text.first,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=32"
first:
.text.first:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   S2R R0, SR_TID.X ;
{}
.L_x_9:
        /*00f0*/                   BRA `(.L_x_9);
	.section	.text.second,"ax",@progbits
        /*0000*/                   EXIT ;
"""
BATCH = """\
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x200] ;
        /*0040*/                   LDG.E R3, desc[UR4][R2.64+0x400] ;
        /*0050*/                   LDG.E.128 R12, desc[UR4][R2.64+0x600] ;
"""


LOOP = """\
.L_x_1:
        /*0020*/                   MOV R3, R2 ;
.L_x_2:
        /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   LD.E.128 R8, desc[UR4][R2.64] ;
        /*0050*/                   F2F.F64.F32 R12, R4 ;
        /*0058*/                   IADD3 R14, R14, 0x1, RZ ;
        /*0060*/                   DADD R12, R12, R8 ;
        /*0068*/                   ST.E.128 desc[UR4][R2.64], R8 ;
        /*006c*/                   STS.128 [R2], R8 ;
        /*0070*/                   DSETP.GEU.AND P1, PT, R12, R8, PT ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/               @P0 BRA `(.L_x_1) ;
"""


def figures(middle):
    found = parse_code(CODE.format(middle))["first"]
    return found["code_bytes"], found["loads"], found["conversions"]


LOOPED = Loop(32, 16, 32, 1, 2, 1, 9, is_float64=True)


def changed(loop, *changes):
    for old, new in changes:
        assert old in loop
        loop = loop.replace(old, new)
    return loop


@pytest.mark.parametrize(
    ("middle", "loops"),
    [
        ("", ()),
        (LOOP, (LOOPED,)),
        (LOOP + changed(LOOP, ("L_x_2", "L_x_4"), ("L_x_1", "L_x_5")), (LOOPED, LOOPED)),
        # The outer one, where it is innermost.
        (changed(LOOP, ("@P1 BRA `(.L_x_2)", "@P1 BRA `(.L_x_9)")), (LOOPED._replace(instructions=11),)),
        # Float64 is not what is loaded, but what is made of it.
        (
            changed(LOOP, ("R12, R12, R8", "R12, R12, R14"), ("PT, R12, R8", "PT, R12, R14")),
            (Loop(32, 16, 32, 1, 2, 1, 9),),
        ),
        (changed(LOOP, ("F2F.F64.F32 R12, R4", "MOV R8, R4")), (Loop(32, 16, 32, 0, 2, 1, 9),)),
        # Vectors of four half elements; doubles one by one are sums of chunks.
        (
            changed(
                LOOP, ("E.128", "E.64"), ("DADD R12, R12, R8", "DADD R12, R12, R14"), ("PT, R12, R8", "PT, R12, R14")
            ),
            (Loop(16, 8, 16, 1, 2, 1, 9),),
        ),
        (changed(LOOP, ("E.128", "E.64")), ()),
        # Ends of chunks, which are also read by less.
        (changed(LOOP, ("LD.E.128", "LD.E.64")), ()),
        (changed(LOOP, ("LD.E.128", "LD.E.U16")), ()),
        # A loop within another that loads, too: to each its own.
        (
            changed(LOOP, ("MOV R3, R2", "LDG.E.128 R4, desc[UR4][R2.64]"), ("LD.E.128 R8", "LDS.128 R8")),
            (Loop(16, 0, 16, 0, 0, 0, 2), Loop(16, 16, 16, 1, 2, 1, 9)),
        ),
    ],
)
def test_loops(middle, loops):
    """Branches back; that at the end of the kernel loads nothing."""
    assert parse_code(CODE.format(middle))["first"]["loops"] == loops


@pytest.mark.parametrize(
    ("middle", "loads", "conversions"),
    [
        ("", 0, 0),
        (BATCH, 3, 0),
        # Each is used before the next.
        (BATCH.replace("        /*0030", "        /*0028*/ FADD R30, R7, R30 ;\n        /*0030"), 2, 0),
        # Other registers, and numbers that begin alike.
        (BATCH.replace("        /*0030", "        /*0028*/ FADD R30, R41, UR4 ;\n        /*0030"), 3, 0),
        # An address that is loaded itself.
        (BATCH.replace("[R2.64+0x600]", "[R8.64]"), 2, 0),
        # In another block.
        (BATCH.replace("        /*0050", ".L_x_3:\n        /*0050"), 2, 0),
        (BATCH.replace("        /*0050", "        /*0048*/ @P0 BRA `(.L_x_9) ;\n        /*0050"), 2, 0),
        # 32 bytes at once; no more than there are registers.
        ("        /*0020*/ LDG.E.ENL2.256 R4, desc[UR4][R2.64] ;\n", 2, 0),
        (BATCH + BATCH, 3, 0),
        # Less than 16 bytes, and another memory.
        (BATCH.replace("E.128", "E.64"), 0, 0),
        (BATCH.replace("LDG", "LDS"), 0, 0),
        # To and from float64, and other conversions.
        ("        /*0020*/ F2F.F64.F32 R4, R3 ;\n        /*0030*/ @P1 F2F.F32.F64 R4, R4 ;\n", 0, 2),
        ("        /*0020*/ I2F.F64 R4, R3 ;\n        /*0030*/ F2I.F64.TRUNC R4, R4 ;\n", 0, 2),
        ("        /*0020*/ F2F.BF16.F32 R4, R3 ;\n        /*0030*/ DADD.F64 R4, R4, R6 ;\n", 0, 0),
    ],
)
def test_figures_of_machine_code(middle, loads, conversions):
    assert figures(middle) == (0x100, loads, conversions)
    assert parse_code(CODE.format(middle))["second"] == {
        "code_bytes": 16,
        "loads": 0,
        "conversions": 0,
        "loops": (),
        "unordered_atomics": 0,
    }


WAYS = """\
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   DADD R12, R12, |R8| ;
        /*0050*/                   DFMA R14, R8, R8, R14 ;
        /*0060*/                   BRA `(.L_x_4) ;
.L_x_2:
        /*0070*/               @P2 BRA `(.L_x_3) ;
        /*0080*/                   DADD R12, R12, |R8| ;
        /*0090*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*00a0*/                   F2F.F64.F32 R12, R4 ;
{}
.L_x_4:
        /*00b0*/               @P1 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("middle", "work"),
    [
        ("", (0, 2, 0, 6, 0)),
        ("ST.E.128 desc[UR4][R2.64], R8 ; SHF.L.U32 R4, R4, 0x1, RZ", (0, 2, 0, 6, 0)),
        ("DMUL R4, R4, R4 ; ST.E.64 desc[UR4][R2.64], R8 ; LOP3.LUT R4, R4, R5, RZ, 0xc0, !PT", (1, 1, 1, 8, 8)),
        ("DMUL R4, R4, R4 ; DMUL R4, R4, R4", (1, 2)),
        ("DMUL R4, R4, R4 ; DMUL R4, R4, R4 ; PMTRIG 0x1", (0, 2)),  # is rare
        ("DMUL R4, R4, R4 ; DMUL R4, R4, R4 ; @P3 BRA `(.L_x_4) ; PMTRIG 0x1", (1, 2)),
        ("DMUL R4, R4, R4 ; DMUL R4, R4, R4 ; @P3 EXIT ; DADD R4, R4, R4", (1, 3)),
        ("DMUL R4, R4, R4 ; DMUL R4, R4, R4 ; EXIT ; DADD R4, R4, R4", (1, 2)),
        ("DMUL R4, R4, R4 ; DMUL R4, R4, R4 ; BRA.U UP0, `(.L_x_4) ; DADD R4, R4, R4", (1, 3)),
    ],
)
def test_what_runs_in_a_loop(middle, work):
    """Of sums of both terms, of one, and of something else: the way with most conversions and operations; of ways with
    as many, that with most instructions."""
    more = "".join(f"        /*00a8*/                   {line} ;\n" for line in middle.split(" ; ") if line)
    (loop,) = parse_code(CODE.format(WAYS.format(more)))["first"]["loops"]
    assert (loop.conversions, loop.float64, loop.integers, loop.instructions, loop.stored)[: len(work)] == work


MEMBAR = "        /*0020*/                   MEMBAR.ALL.GPU ;\n"
ATOM = "        /*0030*/              @!P0 ATOM.E.INC.STRONG.GPU PT, R8, desc[UR4][R8.64], R11 ;\n"
CCTL = "        /*0040*/                   CCTL.IVALL ;\n"


@pytest.mark.parametrize(
    ("middle", "count"),
    [
        (MEMBAR + ATOM + CCTL, 0),
        (ATOM, 1),
        (ATOM + CCTL, 1),  # acquires alone
        (MEMBAR + ATOM, 1),  # releases alone
        (MEMBAR + ".L_x_1:\n" + ATOM + CCTL + ATOM, 2),
        (MEMBAR + ATOM.replace("ATOM.E.INC", "RED.E.ADD") + ATOM.replace("ATOM", "ATOMG"), 2),
        (MEMBAR + ATOM.replace("ATOM.E.INC.STRONG.GPU", "REDUX.SUM"), 0),  # of registers
    ],
)
def test_atomics_that_order_no_memory(middle, count):
    assert parse_code(CODE.format(middle))["first"]["unordered_atomics"] == count
    kernel = Kernel("f", 80, 1, 0, unordered_atomics=count)
    said = f"f for sm_80 has atomics that do not release and acquire: {count}"
    assert failures([kernel]) == ([said] if count else [])


def test_code_of_another_form():
    with pytest.raises(ValueError, match="nvdisasm wrote what this script cannot read: second has no instruction"):
        parse_code(CODE.format("").replace("EXIT", "0x1234"))


def test_names_of_the_source():
    names = [k.name for k in readable(parse_report(CLEAN.replace("_ZN3fooILb0EEEvPd", "_ZN9fused_reg1fIdLb0EEEvPd")))]
    assert names == ["f<double,false>", "foo<true>"]
    assert short_name("void fused_reg::(anonymous namespace)::g<(int)3, float>(float*)") == "g<3,float>"


# The record

LOOPS = (Loop(32, 0, 16, 10, 30, 7, 90), Loop(32, 32, 16, 30, 10, 8, 99, is_float64=True))
KERNELS = [
    Kernel("b<int>", 120, 30, 0, 4096, 4, 20, (Loop(64, 0, 64, 0, 0),)),
    Kernel("a", 75, 100, 0, 1000, 8, 0, LOOPS),
    Kernel("b<int>", 75, 8, 0),
]


def test_the_record_is_read_as_it_was_written():
    kernels = [replace(k, architecture=a) for a in sorted(FLOAT64) for k in KERNELS[:2]]  # as many columns of cards
    text = check_cuda_compile.page(kernels, "13.0")
    assert read_record(text) == ("13.0", sorted(kernels, key=lambda k: (k.architecture, k.name)))
    assert regressions(*[read_record(text)[1]] * 2) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 110, "code_bytes": 1100}, []),
        ({"registers": 111}, ["a for sm_75: registers 111, recorded 100"]),
        ({"code_bytes": 1101}, ["a for sm_75: bytes of code 1101, recorded 1000"]),
        ({"loads": 7}, ["a for sm_75: loads under way 7, recorded 8"]),
        ({"conversions": 1}, ["a for sm_75: conversions 1, recorded 0"]),
        ({"loops": (Loop(32, 32, 0, 44, 0),)}, ["a for sm_75: conversions per 16 bytes in loops 22.0, recorded 10.0"]),
        ({"loops": (Loop(64, 32, 0, 44, 45),)}, ["a for sm_75: float64 per 16 bytes in loops 11.2, recorded 10.0"]),
        ({"loops": ()}, []),
        ({"registers": 1, "code_bytes": 1, "loads": 99}, []),
        ({"name": "c"}, ["a for sm_75 is recorded, and was not compiled", "c for sm_75 is not recorded"]),
    ],
)
def test_what_is_worse_than_recorded(change, said):
    assert regressions([KERNELS[0], replace(KERNELS[1], **change), KERNELS[2]], KERNELS) == said


def test_another_version_of_nvcc(tmp_path, monkeypatch, capsys):
    """What differs is printed, and only for the recorded version a failure."""
    monkeypatch.setattr(check_cuda_compile, "RECORD", tmp_path / "record.md")
    check_cuda_compile.RECORD.write_text(check_cuda_compile.page(KERNELS, "13.0"))
    worse = [replace(KERNELS[0], loads=1), *KERNELS[1:]]
    assert check_cuda_compile.compare(worse, "13.0") == ["b<int> for sm_120: loads under way 1, recorded 4"]
    assert check_cuda_compile.compare(worse, "13.1") == []
    said = capsys.readouterr().out
    assert said.count("+| `b<int>` | 30 | 4096 | 1 | 20 | 64/0/64/0/0/0/0 |") == 2
    assert said.endswith("is of nvcc 13.0, this is 13.1: a difference is no failure\n")


def test_what_is_compiled(monkeypatch):
    """Every source for one architecture; for each other that nvcc knows a kernel of each pass, and of references."""
    known = "\n".join(f"compute_{a}" for a in (70, *check_cuda_compile.ARCHITECTURES[:-1], 121))
    kernel = lambda toolkit, nvdisasm, source, architecture, top: [Kernel(source.name, architecture, 1, 0)]  # noqa: E731
    monkeypatch.setattr(check_cuda_compile, "run", lambda command: known)
    monkeypatch.setattr(check_cuda_compile, "compile_kernels", kernel)
    monkeypatch.setattr(check_cuda_compile, "compile_torch_side", lambda *_: [Kernel("torch", 0, 1, 0)])
    monkeypatch.setattr(check_cuda_compile, "readable", lambda kernels: {(k.name, k.architecture) for k in kernels})
    toolkit, sources = cuda_toolkit.Toolkit(Path("nvcc"), "13.0", Path(), Path()), build_config.sources("cuda")
    ours = {(Path(source).name, check_cuda_compile.QUICK) for source in sources if source.endswith(".cu")}
    others = {*check_cuda_compile.ARCHITECTURES[:-1]} - {check_cuda_compile.QUICK}
    assert check_cuda_compile.compile_all(toolkit, None, quick=True) == ours
    names = ("machine_code.cu", "relative_kernels.cu")
    rest = {("torch", 0), *((name, architecture) for architecture in others for name in names)}
    assert check_cuda_compile.compile_all(toolkit, None, quick=False) == ours | rest


def test_where_nvdisasm_is(tmp_path, monkeypatch):
    """In the toolkit, else on the PATH, else in pip's wheel."""
    places = [tmp_path / "toolkit" / "bin", tmp_path / "path", tmp_path / "nvidia" / "cu13" / "bin"]
    monkeypatch.setenv("PATH", str(places[1]))
    monkeypatch.setattr(cuda_toolkit, "wheels", lambda: [tmp_path / "nvidia"])
    toolkit = cuda_toolkit.Toolkit(places[0] / "nvcc", "13.0", tmp_path / "toolkit", tmp_path)
    assert check_cuda_compile.disassembler(toolkit) is None
    for place in reversed(places):
        place.mkdir(parents=True)
        (place / "nvdisasm").touch(mode=0o755)
        assert check_cuda_compile.disassembler(toolkit) == place / "nvdisasm"


def test_predicted_shares():
    """Of an H200: 18.4 bytes a clock and multiprocessor, of which 16 conversions a clock, 64 operations of float64;
    47,273 bytes under way."""
    (h200,) = [card for card in CARDS if card.name == "H200"]
    share = lambda *loop, threads=512: round(predicted_share(Loop(*loop), threads, h200), 3)  # noqa: E731
    assert share(64, 0, 128, 64, 64) == 0.871  # 64 bytes in 3.48 clocks, conversions in 4
    assert share(32, 32, 128, 64, 64) == 0.871
    assert share(64, 0, 128, 32, 512) == 0.436
    assert share(64, 0, 128, 0, 0) == share(64, 0, 128, 32, 64) == 1
    assert share(64, 0, 128, 0, 0, 256, 512) == 0.871  # 3.48 of 4 clocks
    assert share(64, 0, 128, 0, 0, 128, 1024) == 0.436
    assert share(64, 0, 64, 0, 0) == share(64, 0, 128, 0, 0, threads=256) == 0.693


@pytest.mark.parametrize(
    ("registers", "architecture", "threads"),
    [(128, 90, 512), (129, 90, 384), (121, 90, 512), (96, 90, 640), (16, 75, 1024), (16, 86, 1536), (16, 90, 2048)],
)
def test_resident_threads(registers, architecture, threads):
    assert resident_threads(Kernel("f", architecture, registers, 0)) == threads


def test_table_of_predicted_shares():
    """The slowest loops, in brackets of float64 where these are slower."""
    kernel = lambda name, *loops: Kernel(name, 90, 128, 0, 0, 4, 0, loops)  # noqa: E731
    narrow, wide = Loop(64, 0, 64, 0, 0), Loop(64, 0, 64, 0, 512, is_float64=True)
    kernels = [
        kernel("cuda::f<cuda::DeviceTable,3>", Loop(64, 0, 128, 0, 0), wide),
        kernel("cuda::f<cuda::InlineTable<16ul>,3>", narrow),
        kernel("cuda::g", narrow, narrow._replace(is_float64=True)),
        kernel("cuda::h"),
    ]
    assert table(kernels).splitlines()[-4:] == [
        "| kernel | H100 | H200 |",
        "| --- | ---: | ---: |",
        "| `cuda::f<3>` | 99 (62) | 69 (44) |",
        "| `cuda::g` | 99 | 69 |",
    ]


def test_a_record_of_another_form():
    text = "nvcc 13.0\n## sm_90\n\n" + "| `kernel` | " + "1 | " * len(FIGURES) + "8/8/0/96* |\n"
    with pytest.raises(ValueError, match="a loop of the record must have 7 numbers, got"):
        read_record(text)


def test_the_committed_record():
    """It is of every architecture that is compiled, as all are that ship, with every figure, within the limits."""
    version, kernels = read_record(check_cuda_compile.RECORD.read_text())
    recorded, compiled = {k.architecture for k in kernels}, set(check_cuda_compile.ARCHITECTURES)
    assert version
    assert recorded == compiled
    assert {int(name.replace(".", "")) for name in cuda_toolkit.ARCHITECTURES} <= compiled
    assert failures(kernels) == []
    for figure in (*FIGURES, "loops"):
        assert {k.architecture for k in kernels if getattr(k, figure)} == recorded


@pytest.mark.parametrize(
    ("required", "status", "line"),
    [("0", 0, "skipped, no nvcc"), ("1", 1, "failed, FUSED_REG_REQUIRE_NVCC=1 and no nvcc")],
)
def test_without_nvcc(tmp_path, required, status, line):
    done = subprocess.run(
        [sys.executable, "-m", "scripts.check_cuda_compile"],
        cwd=ROOT,
        env={**os.environ, "CUDA_HOME": str(tmp_path), "FUSED_REG_REQUIRE_NVCC": required},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (status, f"CUDA compile check: {line}\n")
