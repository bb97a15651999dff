// The launches of optimizers' steps.
#include "kernels.h"
#include "launch.cuh"
#include "step_kernels.cuh"

namespace fused_reg::cuda {

namespace {

template <size_t size, bool has_any>
cudaError_t launch_step(Pass optimizer, const Call& call, const StepCall& step, const void* bytes, size_t count,
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
  switch (optimizer) {
#define FUSED_REG_LAUNCH(name, terms, numbers) \
  case Pass::k##name:                          \
    return launch_on(ctas, stream, step_kernel < Table, name##Pass, has_any ? kAllTerms : terms >, table);
    FUSED_REG_STEPS(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH
    default:
      return cudaErrorInvalidDeviceFunction;
  }
}

}  // namespace

cudaError_t launch_step(Pass optimizer, bool has_any, const Call& call, const StepCall& step, const void* bytes,
                        size_t count, cudaStream_t stream) {
  return has_any                ? launch_step<kSmallStep, true>(optimizer, call, step, bytes, count, stream)
         : count <= kSmallStep  ? launch_step<kSmallStep, false>(optimizer, call, step, bytes, count, stream)
         : count <= kMediumStep ? launch_step<kMediumStep, false>(optimizer, call, step, bytes, count, stream)
                                : launch_step<kLargeStep, false>(optimizer, call, step, bytes, count, stream);
}

}  // namespace fused_reg::cuda
