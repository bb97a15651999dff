#pragma once

#include "chunk_kernel.h"

namespace fused_reg {

struct CpuCapability {
  const char* name;
  ChunkKernel kernel;
};

// The widest instruction set that this CPU has and ATEN_CPU_CAPABILITY allows.
const CpuCapability& cpu_capability();

}  // namespace fused_reg
