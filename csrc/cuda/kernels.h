// The launches, as the torch side sees them. They return at once, with CUDA's error code.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "../passes/passes.h"
#include "table.h"

namespace fused_reg::cuda {

// The compute capabilities that the kernels are compiled for: "7.5 9.0".
std::string architectures();

// Which rows a pass has in its table.
struct Rows {
  int streams, numbers;
};

constexpr Rows rows_of(Pass pass, bool has_further = false) {
  switch (pass) {
#define FUSED_REG_ROWS(name, terms, numbers) \
  case Pass::k##name:                        \
    return {streams_of<name##Pass<terms>>, !has_further && numbers == kNumbers ? kGroupNumbers : numbers};
    FUSED_REG_PASSES(FUSED_REG_ROWS)
#undef FUSED_REG_ROWS
#define FUSED_REG_STEP_ROWS(name, terms, numbers) \
  case Pass::k##name:                             \
    return {streams_in(name##Pass<terms>::kReads), numbers};
    FUSED_REG_STEPS(FUSED_REG_STEP_ROWS)
#undef FUSED_REG_STEP_ROWS
    default:
      break;
  }
  return {};
}

// One launch on the current device. A table of more than kLargeTable bytes must lie in device memory; a shorter one
// lies on the host, and is free once this returns.
cudaError_t launch(Pass pass, const Call& call, const void* table, size_t table_bytes, cudaStream_t stream);

// The same, of one pass: instantiated in the .cu that compiles its kernels.
template <Pass pass>
cudaError_t launch(const Call& call, const void* table, size_t table_bytes, cudaStream_t stream);

constexpr size_t kOnDevice = SIZE_MAX;  // the bytes of a table that lies in device memory, however many

// The sums of a pass over every tensor into out [call.tensors], on the device, by way of call.chunk_sums.
cudaError_t launch_tensor_sums(Pass pass, const Call& call, const void* device_table, TermSums* out,
                               cudaStream_t stream, bool is_relative = false);

// The same two of relative terms (kRelative), whose table has all streams and numbers, in device memory; and the step
// of an optimizer with any of them, without the value.
cudaError_t launch_relative(Pass pass, const Call& call, const void* device_table, cudaStream_t stream);
cudaError_t launch_relative_step(Pass optimizer, const Call& call, const StepCall& step, const void* bytes,
                                 size_t count, cudaStream_t stream);

// An optimizer's step with the penalty of L1 and L2; of its table the bytes that travel in the arguments, at most
// kLargeStep. Or with any terms and groups and without the value, at most kSmallStep.
cudaError_t launch_step(Pass optimizer, bool has_any, const Call& call, const StepCall& step, const void* bytes,
                        size_t count, cudaStream_t stream);

template <Pass optimizer>
cudaError_t launch_step(bool has_any, const Call& call, const StepCall& step, const void* bytes, size_t count,
                        cudaStream_t stream);

// Copies a table to device memory by launches alone, in words of 16 bytes, of which the memory has room for whole ones.
cudaError_t upload(void* to, const void* table, size_t table_bytes, cudaStream_t stream);

}  // namespace fused_reg::cuda
