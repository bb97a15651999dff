// Tensors in device memory (pool.h).
#pragma once

#include <ATen/EmptyTensor.h>
#include <cuda_runtime_api.h>

#include "pool.h"

namespace at::detail {

class CudaOnHostAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t stream = cuda_on_host::number_of(cuda_on_host::stream);
    void* const data = bytes == 0 ? nullptr : cuda_on_host::allocator().allocate(stream, bytes);
    return {data, data, &free, Device(kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  static CudaOnHostAllocator* get() {
    static auto* const a = new CudaOnHostAllocator;
    return a;
  }

 private:
  static void free(void* data) {
    if (data != nullptr) {
      cuda_on_host::allocator().free(data);
    }
  }
};

inline TensorBase empty_cuda(IntArrayRef size, ScalarType dtype, std::optional<Device>,
                             std::optional<MemoryFormat> format) {
  return empty_generic(size, CudaOnHostAllocator::get(), DispatchKeySet(DispatchKey::CPU), dtype, format);
}

inline TensorBase empty_strided_cuda(IntArrayRef size, IntArrayRef stride, ScalarType dtype, std::optional<Device>) {
  return empty_strided_generic(size, stride, CudaOnHostAllocator::get(), DispatchKeySet(DispatchKey::CPU), dtype);
}

}  // namespace at::detail
