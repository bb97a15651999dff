// The launch of an optimizer's step, which the file that compiles its kernels instantiates.
#pragma once

#include "kernels.h"
#include "launch.cuh"
#include "step_kernels.cuh"

namespace fused_reg::cuda {

template <int terms, template <int> class P, class Table>
cudaError_t launch_step_kernel(const Table& table, cudaStream_t stream) {
  const auto kernel = step_kernel<Table, P, terms>;
  uint32_t ctas = 0;
  const uint32_t work = std::max(table.call.runs, 1u);  // one counts, if there is nothing else
  const cudaError_t error = resident_ctas(kernel, work, &ctas);
  return error == cudaSuccess ? launch_on(ctas, stream, kernel, table) : error;
}

template <Pass optimizer, size_t size, bool has_any>
cudaError_t launch_step_table(const Call& call, const StepCall& step, const void* bytes, size_t count,
                              cudaStream_t stream) {
  using Table = StepTable<size>;
  Table table;
  table.call = call;
  table.step = step;
  std::memcpy(table.bytes, bytes, count);
#define FUSED_REG_KERNEL(name, terms, numbers)                                         \
  if constexpr (optimizer == Pass::k##name) {                                          \
    return launch_step_kernel<has_any ? kAllTerms : terms, name##Pass>(table, stream); \
  }
  FUSED_REG_STEPS(FUSED_REG_KERNEL)
#undef FUSED_REG_KERNEL
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
