// The kernel of one chunk, as the launcher sees it: one entry for each instruction set, the same bits from
// all of them. Free of torch, so that no inline function of a header is compiled for a CPU that this one is not.
#pragma once

#include <cstdint>

#include "../dtypes.h"
#include "../passes/passes.h"
#include "../summation.h"

namespace fused_reg {

struct ChunkTask {
  Dtype dtype;
  Pass pass;
  void* streams[kStreams];  // those of the pass: [size] elements, any alignment
  int64_t size;
  StepNumbers numbers;
};

using ChunkKernel = ChunkSums (*)(const ChunkTask&);

#if defined(__x86_64__)
ChunkSums chunk_kernel_avx512(const ChunkTask&);
ChunkSums chunk_kernel_avx2(const ChunkTask&);
#endif
ChunkSums chunk_kernel_baseline(const ChunkTask&);

}  // namespace fused_reg
