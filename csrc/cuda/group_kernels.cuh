// The kernels that know groups and their norms, and those of whatever else a list can be asked for.
//
// A team of warps takes a chunk: a whole CTA, or one warp where chunks are short, as rows are.
#pragma once

#include "penalty_kernels.cuh"

namespace fused_reg::cuda {

// The halving tree over one sum in every thread of a warp; the first thread has the result.
__device__ __forceinline__ CompensatedSum warp_sum(CompensatedSum sum) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    sum.add(CompensatedSum{__shfl_xor_sync(kAll, sum.sum, half), __shfl_xor_sync(kAll, sum.error, half)});
  }
  return sum;
}

// The sum of squares of a group of several chunks, in every thread of a warp: as sum_of() in summation.h.
__device__ __forceinline__ Squares group_squares(const Squares* chunks, uint32_t count) {
  static_assert(kTensorColumns == kWarp);
  const uint32_t thread = threadIdx.x % kWarp;
  int exponent = __ldcg(&chunks[0].exponent), lowest = exponent;
  CompensatedSum sum{};
#pragma unroll 8
  for (uint32_t c = thread; c < count; c += kWarp) {
    const int own = __ldcg(&chunks[c].exponent);
    exponent = own > exponent ? own : exponent;
    lowest = own < lowest ? own : lowest;
    sum.add(__ldcg(&chunks[c].sum));
  }
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const int higher = __shfl_xor_sync(kAll, exponent, half), lower = __shfl_xor_sync(kAll, lowest, half);
    exponent = higher > exponent ? higher : exponent;
    lowest = lower < lowest ? lower : lowest;
  }
  if (lowest != exponent) {
    sum = {};
    for (uint32_t c = thread; c < count; c += kWarp) {
      sum.add(std::ldexp(__ldcg(&chunks[c].sum), 2 * (__ldcg(&chunks[c].exponent) - exponent)));
    }
  }
  return {__shfl_sync(kAll, result(warp_sum(sum)), 0), exponent};
}

// The norms of the groups of several chunks, and their penalties behind the sums of the runs: a warp a group.
template <class View>
__device__ __forceinline__ void sum_large_groups(const View& view) {
  const Call& call = view.call();
  for (uint32_t g = threadIdx.x / kWarp; g < call.large_groups; g += kWarps) {
    const uint32_t t = owner(call.tensors, g, [&](uint32_t i) { return view.group_info(i).first_large; });
    const GroupInfo& info = view.group_info(t);
    const uint32_t within = g - info.first_large, count = chunks_in(info);
    const Squares squares = group_squares(call.squares + view.entry(t).first_chunk + within * count, count);
    if (threadIdx.x % kWarp == 0) {
      call.norms[info.first + within] = norm_of(squares);
      if (call.sums == Sums::kPenalty) {
        call.run_sums[call.runs + g] = norm_penalty(view.strength(t, kColumnL2Norm), squares);
      }
    }
  }
}

// Where the teams of a CTA sum.
template <template <Dtype> class Job>
class Summer {
 public:
  __device__ Summer(Blocks* blocks, const Team& team) : blocks_(blocks), team_(team), filled_(0) {}

  // In every thread. A CTA fills one place while the other is summed; a warp has one of its own.
  __device__ __forceinline__ ChunkSums sums(const Chunk& chunk, Sums what, double step, int exponent) {
    Blocks* const place = blocks_ + (team_.warps() == 1 ? threadIdx.x / kWarp : filled_);
    run_chunk<Job>(chunk, place, team_, what, step, exponent);
    team_.sync();
    ChunkSums sums = total(*place, chunk.blocks(), threadIdx.x % kWarp);
    sums.exponent = exponent;
    if (team_.warps() == 1) {
      __syncwarp();
    }
    filled_ = 1 - filled_;
    return sums;
  }

 private:
  Blocks* blocks_;
  const Team team_;
  int filled_;
};

// The penalty of a chunk, and of its group if it is a whole one.
template <class Table>
__device__ __forceinline__ double penalty_of(const Cursor<Table, kAllStrengths>& cursor, const GroupChunk& chunk,
                                             const ChunkSums& sums) {
  return penalty_of_sums(cursor.strength(kColumnL1), cursor.strength(kColumnL2), sums) +
         (chunk.is_group ? norm_penalty(cursor.strength(kColumnL2Norm), {sums.l2, sums.exponent}) : 0);
}

// What Call.sums asks for, of every chunk and group; and of the list, the penalty.
template <class Table, template <Dtype> class Job>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) sums_kernel(const __grid_constant__ Table table) {
  __shared__ Blocks blocks[kWarps];
  __shared__ CompensatedSum run_sums[kWarps];  // of the first thread of a team alone; spares the others registers
  CompensatedSum& run_sum = run_sums[threadIdx.x / kWarp];
  const Call& call = table.call;
  const Team team(call.team);
  Summer<Job> summer(blocks, team);
  for (uint32_t r = team.index(); r < call.runs; r += team.count()) {
    uint32_t c = r * call.run_length;
    Cursor<Table, kAllStrengths> cursor(table, c);
    if (team.is_first_thread()) {
      run_sum = {};
    }
    for (; c < run_end(call, r); ++c) {
      const GroupChunk chunk = cursor.at(c);
      ChunkSums sums;
      for (bool again = false;; again = true) {
        sums = summer.sums(chunk, call.sums, cursor.strength(kColumnStep), sums.exponent);
        if (again || call.sums == Sums::kZeros || chunk.dtype != Dtype::kFloat64) {
          break;
        }
        sums.exponent = rescue_exponent(sums, /*has_l2=*/true);
        if (sums.exponent == 0) {
          break;
        }
      }
      if (team.is_first_thread()) {
        if (call.sums == Sums::kPenalty) {
          run_sum.add(penalty_of(cursor, chunk, sums));
        }
        if (call.norms == nullptr) {
          call.chunk_sums[c] = unscaled(sums);
        } else if (chunk.is_group) {
          call.norms[chunk.group] = norm_of(Squares{sums.l2, sums.exponent});
        } else {
          call.squares[c] = {sums.l2, sums.exponent};
        }
      }
    }
    if (call.sums == Sums::kPenalty && team.is_first_thread()) {
      call.run_sums[r] = result(run_sum);
    }
  }
  if (call.sums != Sums::kPenalty && call.large_groups == 0) {
    return;
  }
  __syncthreads();
  if (is_last_cta(call.ticket)) {
    sum_large_groups(TableView<Table, kAllStrengths>(table));
    if (call.sums == Sums::kPenalty) {
      __syncthreads();
      write_value(call);
    }
  }
}

// The norm of the chunk's group; 0 where there are no groups.
__device__ __forceinline__ double norm_of(const Call& call, const GroupChunk& chunk) {
  return call.norms == nullptr ? 0 : call.norms[chunk.group];
}

// factor * gradient with that of the norms, into the entries or added to them.
template <class Table>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) norm_gradient_kernel(const __grid_constant__ Table table) {
  const Call& call = table.call;
  const Team team(call.team);
  const double factor = read(call.factor, call.factor_source);
  for (uint32_t c = team.index(); c < call.chunks; c += team.count()) {
    Cursor<Table, kAllStrengths> cursor(table, c);
    const GroupChunk chunk = cursor.at(c);
    if (chunk.out != nullptr) {
      run_chunk<NormGradientJob>(chunk, nullptr, team, factor,
                                 call.norms == nullptr ? 0 : cursor.strength(kColumnL2Norm), norm_of(call, chunk));
    }
  }
}

// The proximal operator, in place; by norms of soft(w), if there are any.
template <class Table>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) prox_kernel(const __grid_constant__ Table table) {
  const Call& call = table.call;
  const Team team(call.team);
  for (uint32_t c = team.index(); c < call.chunks; c += team.count()) {
    Cursor<Table, kAllStrengths> cursor(table, c);
    const GroupChunk chunk = cursor.at(c);
    run_chunk<ProxJob>(chunk, nullptr, team, cursor.strength(kColumnStep),
                       call.norms == nullptr ? 0 : cursor.strength(kColumnL2Norm), norm_of(call, chunk));
  }
}

// The sums of every tensor, [tensors], from those of its chunks: a warp a tensor. TermSums for each, or of zeros the
// second one alone, as an int64.
static __global__ void __launch_bounds__(kThreads) tensor_sums_kernel(const DeviceTable table, void* out) {
  const int thread = threadIdx.x % kWarp;
  const TableView<DeviceTable, kAllStrengths> view(table);
  const Call& call = table.call;
  for (uint32_t t = blockIdx.x * kWarps + threadIdx.x / kWarp; t < call.tensors; t += gridDim.x * kWarps) {
    const uint32_t end = t + 1 < call.tensors ? view.entry(t + 1).first_chunk : call.chunks;
    CompensatedSum l1{}, l2{};
    for (uint32_t c = view.entry(t).first_chunk + thread; c < end; c += kWarp) {
      l1.add(call.chunk_sums[c].l1);
      l2.add(call.chunk_sums[c].l2);
    }
    const TermSums sums{result(warp_sum(l1)), result(warp_sum(l2))};
    if (thread == 0 && call.sums == Sums::kZeros) {
      static_cast<int64_t*>(out)[t] = static_cast<int64_t>(sums.l2);
    } else if (thread == 0) {
      static_cast<TermSums*>(out)[t] = sums;
    }
  }
}

}  // namespace fused_reg::cuda
