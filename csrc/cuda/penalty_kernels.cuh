// The kernels without norms. Device code, and no torch: the tests also run it on the host (tests/cpp/cuda_on_host).
//
// A CTA takes a chunk at a time, and sums the penalties of a run; the last CTA sums the runs.
#pragma once

#include "jobs.cuh"

namespace fused_reg::cuda {

static_assert(kThreads == kColumns, "a thread sums a column");

// CTAs that have finished, one count for every launch that may run at a time. atomicInc takes each back to 0.
__device__ unsigned tickets[kMaxTickets];

// True in every thread of the CTA that is the last to arrive here; it sees what the first thread of all of them, and
// whoever this one has waited for, has written.
__device__ __forceinline__ bool is_last_cta(unsigned ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(&tickets[ticket], gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// The sum of the runs, and of the large groups that follow on them.
__device__ __forceinline__ void write_value(const Call& call) {
  __shared__ CompensatedSum columns[kColumns];
  const int column = threadIdx.x;
  CompensatedSum sum{};
#pragma unroll 4
  for (uint32_t i = column; i < call.runs + call.large_groups; i += kColumns) {
    sum.add(__ldcg(call.run_sums + i));
  }
  columns[column] = sum;
  for (int half = kColumns / 2; half > 0; half /= 2) {
    __syncthreads();
    if (column < half) {
      columns[column].add(columns[column + half]);
    }
  }
  if (column == 0) {
    const double value = result(columns[0]);
    if (call.value_is_float64) {
      *static_cast<double*>(call.value) = value;
    } else {
      // The conversion would give NaN the form of the device.
      *static_cast<float*>(call.value) = value == value ? static_cast<float>(value) : __uint_as_float(0x7fc00000);
    }
  }
}

// The first chunk after run r.
__device__ __forceinline__ uint32_t run_end(const Call& call, uint32_t r) {
  const uint32_t begin = r * call.run_length;
  return call.chunks - begin < call.run_length ? call.chunks : begin + call.run_length;
}

// The penalty of the list, and the gradients of the entries that have one; where it may be added to, times the factor.
template <class Table, template <int> class P>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) penalty_kernel(const __grid_constant__ Table table) {
  __shared__ Blocks blocks[2];        // one is summed while the other is filled
  __shared__ CompensatedSum run_sum;  // the first thread's alone; spares the others registers
  constexpr bool kHasFactor = !std::is_void_v<typename P<0>::Fresh>;
  const Call& call = table.call;
  const int thread = threadIdx.x;
  int filled = 0;
  for (uint32_t r = blockIdx.x; r < call.runs; r += gridDim.x) {
    const uint32_t begin = r * call.run_length, end = run_end(call, r);
    Cursor<Table, 2, kTermNumbers> cursor(table, begin);
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
  if (is_last_cta(call.ticket)) {
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
    Cursor<Table, 2, kTermNumbers> cursor(table, c);
    const auto chunk = cursor.at(c);
    const ChunkNumbers numbers = cursor.numbers(factor, 0);
    run_chunk<P, kL1L2>(chunk, nullptr, WholeCta{}, numbers);
  }
}

// A piece of a table, from the arguments into device memory: unlike a copy from the host, it can be captured in a
// graph.
struct Piece {
  unsigned char bytes[kLargeTable];
};

static __global__ void __launch_bounds__(kThreads)
    upload_kernel(unsigned char* to, unsigned size, const __grid_constant__ Piece piece) {
  for (unsigned i = blockIdx.x * kThreads + threadIdx.x; i < size; i += gridDim.x * kThreads) {
    to[i] = piece.bytes[i];
  }
}

}  // namespace fused_reg::cuda
