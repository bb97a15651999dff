// The launch of an optimizer's step, which the file that compiles its kernels instantiates.
#pragma once

#include "kernels.h"
#include "launch.cuh"
#include "step_kernels.cuh"

namespace fused_reg::cuda {

template <Pass optimizer, size_t size, bool has_any>
cudaError_t launch_step_table(const Call& call, const StepCall& step, const void* bytes, size_t count,
                              cudaStream_t stream) {
  using Table = StepTable<size>;
  Table table;
  table.call = call;
  table.step = step;
  std::memcpy(table.bytes, bytes, count);
  uint32_t ctas = 0;
  const cudaError_t error = resident_ctas(std::max(call.runs, 1u), &ctas);  // one counts, if there is nothing else
  if (error != cudaSuccess) {
    return error;
  }
#define FUSED_REG_LAUNCH(name, terms, numbers)                                                             \
  if constexpr (optimizer == Pass::k##name) {                                                              \
    return launch_on(ctas, stream, step_kernel < Table, name##Pass, has_any ? kAllTerms : terms >, table); \
  }
  FUSED_REG_STEPS(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH
}

template <Pass optimizer>
cudaError_t launch_step(bool has_any, const Call& call, const StepCall& step, const void* bytes, size_t count,
                        cudaStream_t stream) {
  return has_any                ? launch_step_table<optimizer, kSmallStep, true>(call, step, bytes, count, stream)
         : count <= kSmallStep  ? launch_step_table<optimizer, kSmallStep, false>(call, step, bytes, count, stream)
         : count <= kMediumStep ? launch_step_table<optimizer, kMediumStep, false>(call, step, bytes, count, stream)
                                : launch_step_table<optimizer, kLargeStep, false>(call, step, bytes, count, stream);
}

}  // namespace fused_reg::cuda
