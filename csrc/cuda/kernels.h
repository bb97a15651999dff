// The launches, as the torch side sees them. They return at once, with CUDA's error code.
#pragma once

#include <cuda_runtime_api.h>

#include "table.h"

namespace fused_reg::cuda {

enum class Kernel {
  // Whose rows of strengths are kTermStrengths long:
  kPenalty,     // and gradients, written
  kAccumulate,  // the same, times the factor, or added
  kGradient,    // times the factor
  // kAllStrengths:
  kSums,          // Call.sums
  kNormGradient,  // of the terms and of the norms, times the factor, written or added
  kProx,          // in place
};

constexpr int strengths_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kPenalty:
    case Kernel::kAccumulate:
    case Kernel::kGradient:
      return kTermStrengths;
    case Kernel::kSums:
    case Kernel::kNormGradient:
    case Kernel::kProx:
      return kAllStrengths;
  }
  return 0;
}

// One launch on the current device. A table of more than kLargeTable bytes must lie in device memory; a shorter one
// lies on the host, and is free once this returns.
cudaError_t launch(Kernel kernel, const Call& call, const void* table, size_t table_bytes, cudaStream_t stream);

// The sums of every tensor into out [call.tensors], on the device, by way of call.chunk_sums: of Sums::kTerms as
// TermSums, of Sums::kZeros as int64.
cudaError_t launch_tensor_sums(const Call& call, const void* device_table, void* out, cudaStream_t stream);

// Copies a table to device memory by launches alone, so that a graph can capture it.
cudaError_t upload(void* to, const void* table, size_t table_bytes, cudaStream_t stream);

}  // namespace fused_reg::cuda
