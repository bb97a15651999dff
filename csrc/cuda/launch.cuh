// A launch of a kernel.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "team.cuh"

namespace fused_reg::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_on(uint32_t ctas, cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// The CTAs of a kernel that a multiprocessor of this device holds at a time.
inline cudaError_t ctas_per_multiprocessor(int device, const void* kernel, int* ctas) {
  static std::mutex mutex;
  static auto* const known = new std::map<std::pair<int, const void*>, int>;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = (*known)[{device, kernel}];
  cudaError_t error = cudaSuccess;
  if (found == 0) {  // which may load the kernel, and what captures in global mode forbids
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, kThreads, 0);
    (void)cudaThreadExchangeStreamCaptureMode(&mode);
  }
  *ctas = found;
  return error;
}

// As many CTAs as the device holds at a time, or fewer: so many that they take equal shares of the work, as far as
// that goes, for where the last round has little, all wait for it.
template <class... Parameters>
cudaError_t resident_ctas(void (*kernel)(Parameters...), uint32_t work, uint32_t* ctas) {
  int device = 0, multiprocessors = 0, each = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = ctas_per_multiprocessor(device, reinterpret_cast<const void*>(kernel), &each);
  }
  const uint32_t resident = std::max(multiprocessors * each, 1), rounds = (work + resident - 1) / resident;
  *ctas = rounds == 0 ? 0 : (work + rounds - 1) / rounds;
  return error;
}

}  // namespace fused_reg::cuda
