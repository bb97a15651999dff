// The kernels without norms. Device code, and no torch: the tests also run it on the host (tests/cpp/cuda_on_host).
//
// A CTA takes a chunk at a time, and sums the penalties of a run; the last CTA sums the runs.
#pragma once

#include "jobs.cuh"
#include "value.cuh"

namespace fused_reg::cuda {

// The penalty of the list, and the gradients of the entries that have one; where it may be added to, times the factor.
template <class Table, template <int> class P>
__global__ void __launch_bounds__(kThreads, streams_in(P<kL1L2>::kReads) > 1 ? kCtasPerSm : kSummingCtasPerSm)
    penalty_kernel(const __grid_constant__ Table table) {
  __shared__ Blocks blocks[2];        // one is summed while the other is filled
  __shared__ CompensatedSum run_sum;  // the first thread's alone; spares the others registers
  constexpr bool kHasFactor = !std::is_void_v<typename P<0>::Fresh>;
  const Call& call = table.call;
  const int thread = threadIdx.x;
  int filled = 0;
  for (uint32_t r = blockIdx.x; r < call.runs; r += gridDim.x) {
    const uint32_t begin = r * call.run_length, end = run_end(call, r);
    Cursor<TableView<Table, 2, kTermNumbers>> cursor(table, begin);
    if (thread == 0) {
      run_sum = {};
    }
    for (uint32_t c = begin; c < end; ++c) {
      const auto chunk = cursor.at(c);
      const ChunkNumbers numbers = cursor.numbers(kHasFactor ? read(call.factor, call.factor_source) : 1, 0);
      run_chunk<P, kL1L2>(chunk, &blocks[filled], WholeCta{}, numbers);
      __syncthreads();
      const bool is_float64 = chunk.dtype == Dtype::kFloat64;
      if (thread < kWarp || is_float64) {  // every warp finds out alike whether the sums have left the range of float64
        PassSums sums = total(blocks[filled], chunk.blocks(), thread % kWarp);
        const int exponent = is_float64 ? rescue_exponent(sums.of[0], sums.of[1], numbers.terms & kL2) : 0;
        if (exponent != 0) {
          filled = 1 - filled;
          ChunkPass(chunk, Job<Dtype::kFloat64, PenaltyPass, kL1L2, true>(numbers, exponent))
              .run(&blocks[filled], WholeCta{});
          __syncthreads();
          sums = total(blocks[filled], chunk.blocks(), thread % kWarp);
        }
        if (thread == 0) {
          const ScaledSum of_terms[kSums] = {{sums.of[0], exponent}, {sums.of[1], exponent}};
          run_sum.add(SummedTerms::penalty(numbers.of, of_terms));
        }
      }
      filled = 1 - filled;
    }
    if (thread == 0) {
      call.run_sums[r] = result(run_sum);
    }
  }
  if (is_last_cta(call)) {
    write_value(call);
  }
}

// A pass without sums over the chunks of a list without groups.
template <class Table, template <int> class P>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) element_kernel(const __grid_constant__ Table table) {
  const Call& call = table.call;
  const double factor = read(call.factor, call.factor_source);
  if (call.keep_if_one && factor == 1) {
    return;
  }
  for (uint32_t c = blockIdx.x; c < call.chunks; c += gridDim.x) {
    Cursor<TableView<Table, 2, kTermNumbers>> cursor(table, c);
    const auto chunk = cursor.at(c);
    const ChunkNumbers numbers = cursor.numbers(factor, 0);
    run_chunk<P, kL1L2>(chunk, nullptr, WholeCta{}, numbers);
  }
}

}  // namespace fused_reg::cuda
