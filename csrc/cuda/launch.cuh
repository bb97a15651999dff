// A launch of a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <utility>

#include "chunk_pass.cuh"

namespace fused_reg::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_on(uint32_t ctas, cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// As many CTAs as the device holds at a time, and no more than there is work for.
inline cudaError_t resident_ctas(uint32_t work, uint32_t* ctas) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *ctas = std::min<uint32_t>(work, multiprocessors * kCtasPerSm);
  return error;
}

}  // namespace fused_reg::cuda
