#pragma once

#include <string>

#include "../torch_compat.h"
#include "chunk_kernel.h"

namespace fused_reg {

struct CpuCapability {
  const char* name;
  const Kernels* kernels;
  const Kernels* small_kernels;  // for lists of at most kSmallList elements
};

// 512-bit instructions lower the clock for a while, also for what runs next: that costs more than they gain here.
constexpr int64_t kSmallList = 32768;

// The widest instruction set that this CPU has and ATEN_CPU_CAPABILITY allows.
inline const CpuCapability& cpu_capability() {
  static const CpuCapability capability = [] {
#if defined(__x86_64__)
    const std::string name = at::get_cpu_capability();
    if (name == "AVX512") {
      return CpuCapability{"AVX512", &kernels_avx512, &kernels_avx2};
    }
    if (name == "AVX2") {
      return CpuCapability{"AVX2", &kernels_avx2, &kernels_avx2};
    }
#endif
    return CpuCapability{"baseline", &kernels_baseline, &kernels_baseline};
  }();
  return capability;
}

}  // namespace fused_reg
