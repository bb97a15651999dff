// Strips: short groups that follow on one another, as rows, which a warp sums side by side.
#pragma once

#include "cursor.cuh"
#include "jobs.cuh"

namespace fused_reg::cuda {

// Whether short groups are summed in strips: where float64 units do not bound their sums. Those after the soft
// threshold have no registers left for further loops.
template <class Pass, int numbers_of_pass>
constexpr bool kHasStrips =
    !kFewDoubles && numbers_of_pass == kGroupNumbers && Pass::kSums == kL1L2 && !Pass::kIsRelative;

// Runs that follow on one another, of which a team takes so many at a time: all of its own where a run is one chunk,
// else no more than strips are worth, for long groups lie together, too.
__device__ __forceinline__ uint32_t runs_in_turn(const Call& call, const Team& team) {
  const uint32_t own = (call.runs + team.count() - 1) / team.count();
  return call.run_length == 1 ? own : smaller(own, (kBlocks / 2 + call.run_length - 1) / call.run_length);
}

// Of so many that are a strip (Cursor::strip), by a warp.
template <template <int> class P, int known, class AnyChunk>
__device__ __forceinline__ void run_strip(const AnyChunk& chunk, int chunks, Blocks* blocks,
                                          const ChunkNumbers& numbers) {
  with_dtype(chunk.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    if constexpr (!kWide<kDtype>) {
      ChunkPass(chunk, Job<kDtype, P, known, false>(numbers)).run_strip(blocks, chunks);
    }
  });
}

// The sums of the groups of a strip, each of one block: two threads of a warp have those of each.
__device__ __forceinline__ PassSums totals(const Blocks& blocks, int count, int thread) {
  static_assert(kWarp == 2 * kBlocks && kPassSums == 2 && kFoldedLanes == 8);
  const int b = thread / 2, term = thread % 2;
  const auto pair = [&](int lane) {
    return b < count ? blocks.sums[b][term][lane] + blocks.sums[b][term][lane + 4] : 0.0;
  };
  const double own = (pair(0) + pair(2)) + (pair(1) + pair(3)), other = __shfl_xor_sync(kAll, own, 1);
  return term == 0 ? PassSums{own, other} : PassSums{other, own};
}

// The sums of a strip of groups, by a warp, and their norms. add(g, penalty) takes the penalty of each in turn.
template <template <int> class P, int known, class AnyChunk, class Add>
__device__ __forceinline__ void sum_strip(const Call& call, const AnyChunk& chunk, int groups, Blocks* blocks,
                                          ChunkNumbers& numbers, const Add& add) {
  numbers.terms = kL1L2;  // both, also where one is not there: its strength is 0
  run_strip<P, known>(chunk, groups, blocks, numbers);
  __syncwarp();
  const int thread = threadIdx.x % kWarp;
  const PassSums sums = totals(*blocks, groups, thread);
  __syncwarp();
  const ScaledSum of_terms[kSums] = {{sums.of[0], 0}, {sums.of[1], 0}};
  const ScaledSum& squares = of_terms[L2::kSum];
  if (thread % 2 == 0 && thread / 2 < groups) {
    call.norms[chunk.group + thread / 2] = norm_of(squares);
  }
  if (call.value != nullptr) {
    const double own = SummedTerms::penalty(numbers.of, of_terms) + norm_penalty(numbers.of[kNormStrength], squares);
    for (int g = 0; g < groups; ++g) {
      add(g, __shfl_sync(kAll, own, 2 * g));
    }
  }
}

}  // namespace fused_reg::cuda
