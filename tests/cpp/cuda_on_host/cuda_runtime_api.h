// CUDA on the host, as far as csrc/cuda uses it: for tests alone. The same source runs, every thread as a fiber, on a
// device that is hostile: the order of threads, CTAs and streams is drawn at random, memory that nobody has written is
// NaN, and threads that do not meet as they should end the program.
//
// Memory is the host's: AddressSanitizer sees every access of a kernel.
#pragma once

#include <cmath>

#include "device.h"

#define __host__
#ifdef CUDA_ON_HOST_WATCHED
#define __device__ __attribute__((always_inline))  // the compiler announces no aggregate that a call writes
#else
#define __device__
#endif
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __CUDA_ARCH_LIST__ 750, 900

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// What a call is told of its place in the source.
#define CUDA_ON_HOST_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUDA_ON_HOST_SITE(kind) cuda_on_host::site_of(cuda_on_host::Kind::kind, file, line)

inline void __syncthreads(CUDA_ON_HOST_PLACE) {
  const cuda_on_host::HostCode here;
  cuda_on_host::Cta::current->sync_cta(CUDA_ON_HOST_SITE(kBarrier));
}
inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_ON_HOST_PLACE) {
  const cuda_on_host::HostCode here;
  cuda_on_host::Cta::current->sync_warp(mask, CUDA_ON_HOST_SITE(kWarpBarrier));
}

template <class T>
T __shfl_sync(unsigned mask, T x, int source, CUDA_ON_HOST_PLACE) {
  const cuda_on_host::HostCode here;
  return cuda_on_host::Cta::current->exchange(mask, x, source, CUDA_ON_HOST_SITE(kShuffle));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, CUDA_ON_HOST_PLACE) {
  const cuda_on_host::HostCode here;
  cuda_on_host::Cta& cta = *cuda_on_host::Cta::current;
  return cta.exchange(mask, x, cta.lane() ^ bits, CUDA_ON_HOST_SITE(kShuffle));
}

// That of value.cuh.
inline unsigned acquire_release_inc(unsigned* address, unsigned limit, CUDA_ON_HOST_PLACE) {
  const cuda_on_host::HostCode here;
  const int site = CUDA_ON_HOST_SITE(kAtomic);
  const bool is_reset = site != cuda_on_host::left_out;
  return cuda_on_host::Cta::current->atomic(address, site, CUDA_ON_HOST_SITE(kAcquire), CUDA_ON_HOST_SITE(kRelease),
                                            [&](unsigned old) { return old >= limit && is_reset ? 0 : old + 1; });
}

inline void __prof_trigger(int) {}

template <class T>
T __ldg(const T* address) {
  cuda_on_host::watch_read_only(address, sizeof(T));
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The runtime.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidDeviceFunction = 98, cudaErrorNoKernelImageForDevice = 209 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
using cudaStream_t = void*;

namespace cuda_on_host {
// What the next launches answer.
inline cudaError_t launch_error = [] {
  const char* const code = std::getenv("CUDA_ON_HOST_ERROR");
  return static_cast<cudaError_t>(code == nullptr ? 0 : std::atoi(code));
}();
// Launches do nothing: what is left is the host's part, to be timed.
inline const bool is_idle = std::getenv("CUDA_ON_HOST_IDLE") != nullptr;

// Of the device's streams, in the order in which they are first used.
inline size_t number_of(cudaStream_t stream) {
  static std::mutex mutex;
  static std::vector<cudaStream_t> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find(known.begin(), known.end(), stream);
  return found == known.end() ? (known.push_back(stream), known.size() - 1) : found - known.begin();
}
}  // namespace cuda_on_host

#include "memory.h"

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_host::multiprocessors : 9;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, Kernel, int, size_t) {
  *ctas = 4;
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  using namespace cuda_on_host;
  if (launch_error != cudaSuccess || is_idle) {
    return launch_error;
  }
  if (config->gridDim.x == 0 || config->blockDim.x % Cta::kWarp != 0 || (sizeof(Parameters) + ...) > 32764) {
    fail("a launch that CUDA refuses");
  }
  const auto thread = [kernel, arguments...]() __attribute__((no_sanitize("thread"))) {
    is_kernel_code = true;
    kernel(arguments...);
    is_kernel_code = false;
  };
  device.launch(number_of(config->stream), {config->gridDim.x, config->blockDim.x, thread});
  return cudaSuccess;
}
