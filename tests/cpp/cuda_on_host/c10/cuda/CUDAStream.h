// torch's CUDA on the host: one device.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <cuda_runtime_api.h>

namespace c10::cuda {

struct CUDAStream {
  DeviceIndex device_index() const { return 0; }
  Device device() const { return Device(kCPU); }
  StreamId id() const { return reinterpret_cast<StreamId>(stream); }
  operator cudaStream_t() const { return stream; }

  cudaStream_t stream;
};

inline CUDAStream getCurrentCUDAStream() { return {cuda_on_host::stream}; }

}  // namespace c10::cuda
