// What is known only at run time: the CPU's instruction set, and whether this process was forked.
#include "dispatch.h"

#include <pthread.h>

#include <string>

#include "../torch_compat.h"
#include "parallel.h"

namespace fused_reg {

namespace {

bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

CpuCapability detect() {
#if defined(__x86_64__)
  // ATen's choice, which honours ATEN_CPU_CAPABILITY.
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return {"AVX512", chunk_kernel_avx512, chunk_kernel_avx2};
  }
  if (capability == "AVX2") {
    return {"AVX2", chunk_kernel_avx2, chunk_kernel_avx2};
  }
#endif
  return {"baseline", chunk_kernel_baseline, chunk_kernel_baseline};
}

}  // namespace

bool is_forked_child() { return forked; }

const CpuCapability& cpu_capability() {
  static const CpuCapability capability = detect();
  return capability;
}

}  // namespace fused_reg
