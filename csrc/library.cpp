// The library without its kernels, as one translation unit: torch's headers take several times as long to compile as
// all that stands here. The kernels are files of their own (sources.txt), each compiled for its instruction set.
#include "build_info.cpp"
#include "cpu/grad_memory.cpp"
#include "cpu/penalty_cpu.cpp"
#include "meta/penalty_meta.cpp"
#include "ops.cpp"
