// The penalty of a list, from those of its runs of chunks: the CTA that is the last to be done sums them.
#pragma once

#include "team.cuh"

namespace fused_reg::cuda {

static_assert(kThreads == kColumns, "a thread sums a column");

#ifdef __CUDACC__  // the tests on the host have a model of it
// atomicInc() that releases what the thread has seen of memory, and acquires what others have released so.
__device__ __forceinline__ unsigned acquire_release_inc(unsigned* counter, unsigned limit) {
  unsigned old;
  asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(limit) : "memory");
  return old;
}
#endif

// Whether this thread is the last of so many to arrive. It sees what the others, and whoever these have waited for,
// have written; so do those that wait for it then. The counter is 0 again.
__device__ __forceinline__ bool is_last_to_arrive(unsigned* counter, unsigned count) {
  return acquire_release_inc(counter, count - 1) == count - 1;
}

// True in every thread of the CTA whose first thread is the last to arrive here.
__device__ __forceinline__ bool is_last_cta(const Call& call) {
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    is_last = is_last_to_arrive(call.arrivals, gridDim.x);
  }
  __syncthreads();
  return is_last;
}

// The sum of the runs, and of the large groups that follow on them.
__device__ __forceinline__ void write_value(const Call& call) {
  __shared__ CompensatedSum columns[kColumns];
  const int column = threadIdx.x;
  CompensatedSum sum{};
#pragma unroll 16
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
