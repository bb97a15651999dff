// The memory of torch's allocator on the host. That of a GPU is not zero; and when it is free, somebody else's.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <cuda_runtime_api.h>

#include <atomic>

namespace cuda_on_host {

inline std::atomic<int> live_tensors = 0;  // how many blocks somebody has

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    struct Block {
      c10::DataPtr data;
      size_t bytes;
    };
    auto* const block = new Block{c10::GetCPUAllocator()->allocate(bytes), bytes};
    std::memset(block->data.get(), 0xa5, bytes);
    ++live_tensors;
    const auto free = [](void* p) {
      const std::unique_ptr<Block> owned(static_cast<Block*>(p));
      std::memset(owned->data.get(), 0x5a, owned->bytes);
      --live_tensors;
    };
    return {block->data.get(), block, free, c10::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

inline Allocator allocator;

}  // namespace cuda_on_host

namespace at::detail {

inline std::vector<TensorBase> graph_memory;  // of what is captured

inline TensorBase kept(TensorBase t) {
  if (cuda_on_host::capture_status != cudaStreamCaptureStatusNone) {
    graph_memory.push_back(t);
  }
  return t;
}

inline TensorBase empty_cuda(IntArrayRef size, ScalarType dtype, std::optional<Device>, std::optional<MemoryFormat>) {
  constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
  return kept(empty_generic(size, &cuda_on_host::allocator, kCpu, dtype, std::nullopt));
}

inline TensorBase empty_strided_cuda(IntArrayRef size, IntArrayRef stride, ScalarType dtype, std::optional<Device>) {
  constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
  return kept(empty_strided_generic(size, stride, &cuda_on_host::allocator, kCpu, dtype));
}

}  // namespace at::detail
