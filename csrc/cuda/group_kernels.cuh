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
      if (call.value != nullptr) {
        call.run_sums[call.runs + g] = norm_penalty(view.number(t, kNormStrength), squares);
      }
    }
  }
}

// The penalty of a chunk, and of its group if it is a whole one.
template <class AnyCursor, class AnyChunk>
__device__ __forceinline__ double penalty_of(const AnyCursor& cursor, const AnyChunk& chunk, const ChunkSums& sums) {
  return penalty_of_sums(cursor.number(kL1Strength), cursor.number(kL2Strength), sums) +
         (chunk.is_group ? norm_penalty(cursor.number(kNormStrength), {sums.l2, sums.exponent}) : 0);
}

// The sums of a pass, of every chunk and group; and where Call.value asks for it, the penalty of the list.
template <class Table, template <int> class P, int known>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) sums_kernel(const __grid_constant__ Table table) {
  __shared__ Blocks blocks[kWarps];            // a CTA fills one while another is summed; a warp alone has its own
  __shared__ CompensatedSum run_sums[kWarps];  // of the first thread of a team alone; spares the others registers
  CompensatedSum& run_sum = run_sums[threadIdx.x / kWarp];
  const Call& call = table.call;
  const Team team(call.team);
  int filled = 0;
  for (uint32_t r = team.index(); r < call.runs; r += team.count()) {
    uint32_t c = r * call.run_length;
    Cursor<Table, 1, kNumbers> cursor(table, c);
    if (team.is_first_thread()) {
      run_sum = {};
    }
    for (; c < run_end(call, r); ++c) {
      const auto chunk = cursor.at(c);
      const ChunkNumbers numbers = cursor.numbers(1, 0);
      const int terms = call.norms == nullptr || numbers.of[kL1Strength] != 0 ? kL1L2 : kL2;
      ChunkSums sums;
      for (bool again = false;; again = true) {
        Blocks* const place = blocks + (team.warps() == 1 ? threadIdx.x / kWarp : filled);
        const int exponent = sums.exponent;
        run_chunk<P, known, true>(chunk, place, team, numbers, terms, exponent);
        team.sync();
        sums = total(*place, chunk.blocks(), threadIdx.x % kWarp);
        sums.exponent = exponent;
        if (team.warps() == 1) {
          __syncwarp();
        }
        filled = 1 - filled;
        if (again || std::is_void_v<typename P<known>::Sums> || chunk.dtype != Dtype::kFloat64) {
          break;
        }
        sums.exponent = rescue_exponent(sums, /*has_l2=*/true);
        if (sums.exponent == 0) {
          break;
        }
      }
      if (team.is_first_thread()) {
        if (call.value != nullptr) {
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
    if (call.value != nullptr && team.is_first_thread()) {
      call.run_sums[r] = result(run_sum);
    }
  }
  if (call.value == nullptr && call.large_groups == 0) {
    return;
  }
  __syncthreads();
  if (is_last_cta(call.ticket)) {
    sum_large_groups(TableView<Table, 1, kNumbers>(table));
    if (call.value != nullptr) {
      __syncthreads();
      write_value(call);
    }
  }
}

// A pass without sums over the chunks of a list whose groups have norms, if Call.norms says so.
template <class Table, template <int> class P, int known>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) group_element_kernel(const __grid_constant__ Table table) {
  constexpr int kUsed = streams_of<P<known>>;
  const Call& call = table.call;
  const Team team(call.team);
  const double factor = read(call.factor, call.factor_source);
  for (uint32_t c = team.index(); c < call.chunks; c += team.count()) {
    Cursor<Table, kUsed, kNumbers> cursor(table, c);
    const auto chunk = cursor.at(c);
    if (chunk.streams[kUsed - 1] == nullptr) {
      continue;
    }
    const bool has_norm = call.norms != nullptr && cursor.number(kNormStrength) != 0;
    ChunkNumbers numbers = cursor.numbers(factor, call.norms == nullptr ? 0 : call.norms[chunk.group]);
    numbers.of[kNormStrength] = has_norm ? numbers.of[kNormStrength] : 0;
    const int terms = terms_of(numbers.of[kL1Strength], numbers.of[kL2Strength]) | (has_norm ? kNorm : kNone);
    run_chunk<P, known>(chunk, nullptr, team, numbers, terms);
  }
}

// The sums of every tensor, [tensors], from those of its chunks: a warp a tensor.
static __global__ void __launch_bounds__(kThreads) tensor_sums_kernel(const DeviceTable table, TermSums* out) {
  const int thread = threadIdx.x % kWarp;
  const TableView<DeviceTable, 1, kNumbers> view(table);
  const Call& call = table.call;
  for (uint32_t t = blockIdx.x * kWarps + threadIdx.x / kWarp; t < call.tensors; t += gridDim.x * kWarps) {
    const uint32_t end = t + 1 < call.tensors ? view.entry(t + 1).first_chunk : call.chunks;
    CompensatedSum l1{}, l2{};
    for (uint32_t c = view.entry(t).first_chunk + thread; c < end; c += kWarp) {
      l1.add(call.chunk_sums[c].l1);
      l2.add(call.chunk_sums[c].l2);
    }
    const TermSums sums{result(warp_sum(l1)), result(warp_sum(l2))};
    if (thread == 0) {
      out[t] = sums;
    }
  }
}

}  // namespace fused_reg::cuda
