// The launches of optimizers' steps.
#include "kernels.h"
#include "launch.cuh"
#include "step_kernels.cuh"

namespace fused_reg::cuda {

namespace {

template <size_t size>
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
    return launch_on(ctas, stream, step_kernel<Table, name##Pass>, table);
    FUSED_REG_STEPS(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH
    default:
      return cudaErrorInvalidDeviceFunction;
  }
}

}  // namespace

cudaError_t launch_step(Pass optimizer, const Call& call, const StepCall& step, const void* bytes, size_t count,
                        cudaStream_t stream) {
  return count <= kSmallStep ? launch_step<kSmallStep>(optimizer, call, step, bytes, count, stream)
                             : launch_step<kLargeStep>(optimizer, call, step, bytes, count, stream);
}

}  // namespace fused_reg::cuda
