// The kernel of one chunk, as the launcher sees it: one entry for each instruction set, the same bits from
// all of them. Free of torch, so that no inline function of a header is compiled for a CPU that this one is not.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../summation.h"

namespace fused_reg {

// What a pass over the elements computes.
enum class Pass { kSums, kSumsAndGradient, kGradient };

struct ChunkTask {
  Dtype dtype;
  Terms terms;  // a term that is absent is neither summed nor differentiated
  Pass pass;
  const void* param;  // [size] elements, any alignment
  void* grad;         // [size] elements, written by the passes with a gradient
  int64_t size;
  double l1_scale, l2_scale;  // of the elements in each sum; float64 only
  double c1, c2;              // gradient_factor of each term, exact in the compute type
};

using ChunkKernel = ChunkSums (*)(const ChunkTask&);

#if defined(__x86_64__)
ChunkSums chunk_kernel_avx512(const ChunkTask&);
ChunkSums chunk_kernel_avx2(const ChunkTask&);
#endif
ChunkSums chunk_kernel_baseline(const ChunkTask&);

}  // namespace fused_reg
