#pragma once

#include "chunk_kernel.h"

namespace fused_reg {

struct CpuCapability {
  const char* name;
  ChunkKernel kernel;
  ChunkKernel small_kernel;  // for lists of at most kSmallList elements
};

// 512-bit instructions lower the clock for a while, also for what runs next: that costs more than they gain here.
constexpr int64_t kSmallList = 32768;

// The widest instruction set that this CPU has and ATEN_CPU_CAPABILITY allows.
const CpuCapability& cpu_capability();

}  // namespace fused_reg
