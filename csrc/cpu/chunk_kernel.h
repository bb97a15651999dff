// The kernel of some chunks, as the launcher sees it: one entry for each instruction set, the same bits from
// all of them. Free of torch, so that no inline function of a header is compiled for a CPU that this one is not.
#pragma once

#include <cstdint>
#include <cstring>

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
  int64_t ahead = 0;                // so far behind an element is fetched; what is nearer is in the cache, or a gap
  bool is_packed = false;           // the parameter is a copy, in the cache
  // Of two or more chunks side by side, how far apart the elements of each are, in every stream; if the chunks are less
  // than a cache line, nothing is between the elements. 0: the chunks follow on one another.
  int64_t apart[kStreams] = {};

  int64_t chunks() const { return (size + chunk_size - 1) / chunk_size; }
};

// The sums of the chunks of a task.
struct TaskSums {
  double sum[kSums][kMaxVisit];
  int exponent[kSums][kMaxVisit];
  bool is_scaled = false;    // else the exponents are 0, and not written
  bool has_further = false;  // else the sums behind those of a pass are 0, and not written

  FUSED_REG_INLINE ScaledSum of(int k, int64_t chunk) const {
    return k < kPassSums || has_further ? ScaledSum{sum[k][chunk], is_scaled ? exponent[k][chunk] : 0} : ScaledSum{};
  }

  FUSED_REG_INLINE ChunkSums of(int64_t chunk) const {
    ChunkSums sums;
    for (int k = 0; k < kSums; ++k) {
      sums.of[k] = of(k, chunk);
    }
    return sums;
  }

  void set_exponent(int k, int64_t chunk, int value) {
    if (value != 0 && !is_scaled) {
      std::memset(exponent, 0, sizeof exponent);
      is_scaled = true;
    }
    exponent[k][chunk] = value;
  }
};

// What is compiled for an instruction set.
struct Kernels {
  void (*run)(const ChunkTask&, TaskSums*);  // null: the sums are not asked for
  // Of chunks that are whole groups, from their sums: the norm of each, and what it adds to the penalty, unless null.
  void (*finish)(const double* numbers, int64_t chunks, const TaskSums&, double* norms, double* penalties);
  void (*sum_runs)(const double* penalties, int64_t length, int64_t runs, double* sums);  // of so many penalties each
  double (*sum_columns)(const double* sums, int64_t count);
};

#if defined(__x86_64__)
extern const Kernels kernels_avx512, kernels_avx2;
#endif
extern const Kernels kernels_baseline;

}  // namespace fused_reg
