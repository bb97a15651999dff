// The kernels of relative terms: one of each pass and step, whose table lies in device memory.
#include "launch_pass.cuh"
#include "launch_step.cuh"

namespace fused_reg::cuda {

namespace {

template <class Kernel>
cudaError_t launch_kernel(Kernel kernel, uint32_t work, const Call& call, const void* device_table,
                          cudaStream_t stream) {
  const uint32_t teams = kWarps / call.team;  // of a CTA
  uint32_t ctas = 0;
  const cudaError_t error = resident_ctas(kernel, (work + teams - 1) / teams, &ctas);
  const DeviceTable table{call, static_cast<const unsigned char*>(device_table)};
  return error == cudaSuccess ? launch_on(ctas, stream, kernel, table) : error;
}

}  // namespace

cudaError_t launch_relative(Pass pass, const Call& call, const void* device_table, cudaStream_t stream) {
  constexpr int kSummed = kL1L2 | kRelative, kAll = kAllTerms | kRelative, kShrunk = kL1 | kFurther | kRelative;
  switch (pass) {
    case Pass::kPenalty:
      return launch_kernel(sums_kernel<DeviceTable, PenaltyPass, kSummed, kNumbers>, call.runs, call, device_table,
                           stream);
    case Pass::kSoftSquares:
      return launch_kernel(sums_kernel<DeviceTable, SoftSquaresPass, kRelative, kGroupNumbers>, call.runs, call,
                           device_table, stream);
    case Pass::kAccumulate:
      return launch_kernel(group_element_kernel<DeviceTable, AccumulatePass, kAll, kNumbers>, call.chunks, call,
                           device_table, stream);
    case Pass::kProx:
      return launch_kernel(group_element_kernel<DeviceTable, ProxPass, kShrunk, kNumbers>, call.chunks, call,
                           device_table, stream);
    default:
      return cudaErrorInvalidDeviceFunction;
  }
}

cudaError_t launch_relative_step(Pass optimizer, const Call& call, const StepCall& step, const void* bytes,
                                 size_t count, cudaStream_t stream) {
  StepTable<kSmallStep> table;
  table.call = call;
  table.step = step;
  std::memcpy(table.bytes, bytes, count);
  switch (optimizer) {
#define FUSED_REG_LAUNCH(name, terms, numbers) \
  case Pass::k##name:                          \
    return launch_step_kernel < kAllTerms | kRelative, name##Pass > (table, stream);
    FUSED_REG_STEPS(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH
    default:
      return cudaErrorInvalidDeviceFunction;
  }
}

}  // namespace fused_reg::cuda
