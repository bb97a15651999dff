// The kernel of one chunk, as the launcher sees it: one entry for each instruction set, the same bits from
// all of them. Free of torch, so that no inline function of a header is compiled for a CPU that this one is not.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../summation.h"

namespace fused_reg {

// What a pass over the elements computes.
enum class Pass {
  kSums,               // of the terms
  kSumsAndGradient,    // the sums, and out = gradient
  kSumsAndAccumulate,  // the sums, and out = out + gradient
  kGradient,           // out = gradient
  kAccumulate,         // out = out + gradient
  kProx,               // out = prox(param)
  kSoftSquares,        // the sum of soft(param)^2, as that of L2
  kZeros,              // how many elements are 0, as the sum of L2
};

struct ChunkTask {
  Dtype dtype;
  Terms terms;  // a term that is absent is neither summed nor differentiated
  Pass pass;
  const void* param;  // [size] elements, any alignment
  void* out;          // [size] elements, of the passes that write; may be the parameter
  int64_t size;
  double c1, c2;                // gradient_factor of each term, exact in the compute type
  NormGradient<double> norm;    // of kNorm, exact in the compute type
  double threshold, shrinkage;  // of the proximal operator, exact in the compute type
};

using ChunkKernel = ChunkSums (*)(const ChunkTask&);

#if defined(__x86_64__)
ChunkSums chunk_kernel_avx512(const ChunkTask&);
ChunkSums chunk_kernel_avx2(const ChunkTask&);
#endif
ChunkSums chunk_kernel_baseline(const ChunkTask&);

}  // namespace fused_reg
