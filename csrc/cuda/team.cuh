// The warps that take a chunk together, and how what their threads have summed becomes the sums of the chunk, in the
// order of summation.h: shuffles fold the 64 lanes of a block to 8; shared memory collects the blocks of the chunk.
#pragma once

#include "../passes/pass.h"
#include "element.cuh"

namespace fused_reg::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = kWarp * kWarps;
constexpr int kCtasPerSm = 4;  // resident, at least: bounds the registers
// Where the rows of a block are read for its sums by integers (exact_sums.cuh), and kept for what is written.
constexpr int kSummingCtasPerSm = kFewDoubles ? 3 : kCtasPerSm;
constexpr unsigned kAll = 0xffffffff;

// The folded lanes of every block of a chunk.
struct Blocks {
  double sums[kBlocks][kPassSums][kFoldedLanes];
};

// The warps that take a chunk together: all of a CTA.
struct WholeCta {
  __device__ int warps() const { return kWarps; }
  __device__ int warp() const { return threadIdx.x / kWarp; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
};

// The same, or every warp for itself: where chunks are short, as rows are.
class Team {
 public:
  __device__ explicit Team(int warps) : warps_(warps) {}
  __device__ int warps() const { return warps_; }
  __device__ int warp() const { return threadIdx.x / kWarp % warps_; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  __device__ bool is_first_thread() const { return warp() == 0 && threadIdx.x % kWarp == 0; }

  // Among those of the grid.
  __device__ uint32_t index() const { return blockIdx.x * (kWarps / warps_) + threadIdx.x / kWarp / warps_; }
  __device__ uint32_t count() const { return gridDim.x * (kWarps / warps_); }

  __device__ void sync() const {
    if (warps_ == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

 private:
  int warps_;
};

// The halving tree over lanes that neighbouring threads hold, `count` each: thread i has the lanes from i * count on.
// Two threads whose indices differ in a bit add their lanes, and each keeps half of the sums; once a thread has one
// sum, both keep the same. The bits go from `mask` down to `last`.
template <int count, int mask, int last>
struct Fold {
  static constexpr int kKept = count > 1 ? count / 2 : 1;
  using Next = Fold<kKept, mask / 2, last>;

  static __device__ __forceinline__ double sum(const double (&x)[count], int thread) {
    double kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const bool upper = count > 1 && (thread & mask) != 0;
      const double mine = upper ? x[i + count - kKept] : x[i];
      const double others = upper ? x[i] : x[i + count - kKept];
      kept[i] = mine + __shfl_xor_sync(kAll, others, mask);
    }
    if constexpr (mask == last) {
      static_assert(kKept == 1);
      return kept[0];
    } else {
      return Next::sum(kept, thread);
    }
  }

  // Which of its lanes a thread ends with, and whether it is the first of those that have it.
  static __device__ __forceinline__ int lane(int thread) {
    const int skipped = count > 1 && (thread & mask) != 0 ? kKept : 0;
    if constexpr (mask == last) {
      return skipped;
    } else {
      return skipped + Next::lane(thread);
    }
  }
  static __device__ __forceinline__ bool is_first(int thread) {
    const bool first = count > 1 || (thread & mask) == 0;
    if constexpr (mask == last) {
      return first;
    } else {
      return first && Next::is_first(thread);
    }
  }
};

// The sums of a pass over a chunk.
struct PassSums {
  double of[kPassSums];
};

// These, in every thread of a warp: the trees over its blocks and then over the folded lanes.
__device__ __forceinline__ PassSums total(const Blocks& blocks, int count, int thread) {
  const int lane = thread % kFoldedLanes, term = thread / kFoldedLanes % 2, odd = thread / kFoldedLanes / 2;
  const auto block = [&](int b) { return b < count ? blocks.sums[b][term][lane] : 0.0; };
  const auto pair = [&](int b) { return block(b) + block(b + 8); };
  double x = (pair(odd) + pair(odd + 4)) + (pair(odd + 2) + pair(odd + 6));
  x = x + __shfl_xor_sync(kAll, x, 16);
#pragma unroll
  for (int mask = kFoldedLanes / 2; mask > 0; mask /= 2) {
    x = x + __shfl_xor_sync(kAll, x, mask);
  }
  return {__shfl_sync(kAll, x, 0), __shfl_sync(kAll, x, kFoldedLanes)};
}

}  // namespace fused_reg::cuda
