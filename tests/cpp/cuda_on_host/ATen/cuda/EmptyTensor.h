#pragma once

#include <ATen/EmptyTensor.h>
#include <cuda_runtime_api.h>

namespace at::detail {

inline std::vector<TensorBase> graph_memory;  // of what is captured

// Memory of a GPU is not zero.
inline TensorBase filled(TensorBase t) {
  if (t.nbytes() > 0) {
    std::memset(t.mutable_data_ptr(), 0xa5, t.nbytes());
  }
  if (cuda_on_host::capture_status != cudaStreamCaptureStatusNone) {
    graph_memory.push_back(t);
  }
  return t;
}

inline TensorBase empty_cuda(IntArrayRef size, ScalarType dtype, std::optional<Device>, std::optional<MemoryFormat>) {
  return filled(empty_cpu(size, dtype));
}

inline TensorBase empty_strided_cuda(IntArrayRef size, IntArrayRef stride, ScalarType dtype, std::optional<Device>) {
  return filled(empty_strided_cpu(size, stride, dtype));
}

}  // namespace at::detail
