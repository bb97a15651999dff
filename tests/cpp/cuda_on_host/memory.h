// CUDA's memory, streams and graphs on the host, as far as csrc/cuda uses them.
//
// What CUDA forbids while a stream is being captured is refused here, too: memory is allocated, and a stream waited
// for, only by a thread that has said so (cudaThreadExchangeStreamCaptureMode).
#pragma once

#include "device.h"

#define CUDART_VERSION 13000
#define cudaStreamPerThread reinterpret_cast<cudaStream_t>(2)

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1 };
enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal,
  cudaStreamCaptureModeThreadLocal,
  cudaStreamCaptureModeRelaxed
};
constexpr unsigned cudaStreamNonBlocking = 1, cudaUserObjectNoDestructorSync = 1;
constexpr auto cudaErrorInvalidValue = static_cast<cudaError_t>(1);
constexpr auto cudaErrorMemoryAllocation = static_cast<cudaError_t>(2);
constexpr auto cudaErrorStreamCaptureUnsupported = static_cast<cudaError_t>(900);

using cudaHostFn_t = void (*)(void*);

struct cuda_on_host_object {
  void* data;
  cudaHostFn_t destroy;
  unsigned owners;
};
using cudaUserObject_t = cuda_on_host_object*;

using cudaGraph_t = cuda_on_host_graph*;

namespace cuda_on_host {

// What tests choose and see.
inline thread_local cudaStream_t stream = nullptr;   // the current one
inline std::vector<std::unique_ptr<char[]>> memory;  // all that was allocated

inline bool is_full = false;  // torch's allocator has taken all memory

inline thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;

inline cudaError_t unless_capturing() {
  const bool may = captured == nullptr || mode == cudaStreamCaptureModeRelaxed;
  return may ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

inline void release(cudaUserObject_t object) {
  if (--object->owners == 0) {
    object->destroy(object->data);
    delete object;
  }
}

inline void end(cuda_on_host_graph* graph) {
  for (const cudaUserObject_t object : graph->objects) {
    release(object);
  }
  graph->objects.clear();
}

}  // namespace cuda_on_host

inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, cuda_on_host::mode);
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  if (const cudaError_t error = cuda_on_host::unless_capturing(); error != cudaSuccess) {
    return error;
  }
  if (cuda_on_host::is_full) {
    return cudaErrorMemoryAllocation;
  }
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  cuda_on_host::memory.push_back(std::make_unique_for_overwrite<char[]>(bytes));
  *data = std::memset(cuda_on_host::memory.back().get(), cuda_on_host::kPoison, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  if (stream == cuda_on_host::stream) {  // it would wait for what is done there, or be captured
    return cudaErrorInvalidValue;
  }
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  static uintptr_t streams = 0x1000;
  *stream = reinterpret_cast<cudaStream_t>(streams += 0x1000);
  return cuda_on_host::unless_capturing();
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cuda_on_host::unless_capturing(); }

inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status,
                                            unsigned long long* = nullptr, cudaGraph_t* graph = nullptr) {
  *status = cuda_on_host::captured == nullptr ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  if (graph != nullptr && cuda_on_host::captured != nullptr) {
    *graph = cuda_on_host::captured;
  }
  return cudaSuccess;
}

inline cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, cudaHostFn_t destroy, unsigned owners,
                                        unsigned) {
  *object = new cuda_on_host_object{data, destroy, owners};
  return cudaSuccess;
}
inline cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
  cuda_on_host::release(object);
  return cudaSuccess;
}
inline cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned) {
  ++object->owners;
  graph->objects.push_back(object);
  return cudaSuccess;
}
