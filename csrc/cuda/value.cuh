// The penalty of a list, from those of its runs of chunks: the CTA that is the last to be done sums them.
#pragma once

#include "chunk_pass.cuh"

namespace fused_reg::cuda {

static_assert(kThreads == kColumns, "a thread sums a column");

// CTAs that have finished, one count for every launch that may run at a time. atomicInc takes each back to 0.
static __device__ unsigned tickets[kMaxTickets];

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

}  // namespace fused_reg::cuda
