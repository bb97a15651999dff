// The kernel of some chunks, as the launcher sees it: one entry for each instruction set, the same bits from
// all of them. Free of torch, so that no inline function of a header is compiled for a CPU that this one is not.
#pragma once

#include <cstdint>

#include "../chunks.h"
#include "../dtypes.h"
#include "../passes/passes.h"

namespace fused_reg {

struct ChunkTask {
  Dtype dtype;
  Pass pass;
  void* streams[kStreams];  // those of the pass: [size] elements, any alignment
  int64_t size;
  StepNumbers numbers;
  int64_t chunk_size = kChunkSize;  // at most kMaxVisit chunks, of which the last may be shorter
  const double* norms = nullptr;    // of the group of each chunk; null: that of the numbers
  int64_t ahead = 0;                // to where, behind an element, all are in the cache
  // Of chunks side by side, how far apart the elements of each are, in every stream; there is a whole vector of chunks,
  // as far as memory goes. 0: they follow on one another.
  int64_t apart[kStreams] = {};
};

// The sums of each chunk; null: they are not asked for.
using ChunkKernel = void (*)(const ChunkTask&, ChunkSums*);

#if defined(__x86_64__)
void chunk_kernel_avx512(const ChunkTask&, ChunkSums*);
void chunk_kernel_avx2(const ChunkTask&, ChunkSums*);
#endif
void chunk_kernel_baseline(const ChunkTask&, ChunkSums*);

}  // namespace fused_reg
