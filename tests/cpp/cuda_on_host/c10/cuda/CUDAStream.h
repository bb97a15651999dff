// torch's CUDA on the host: one device, one stream.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

struct CUDAStream {
  DeviceIndex device_index() const { return 0; }
  Device device() const { return Device(kCPU); }
  StreamId id() const { return 0; }
  operator cudaStream_t() const { return nullptr; }
};

inline CUDAStream getCurrentCUDAStream() { return {}; }

}  // namespace c10::cuda
