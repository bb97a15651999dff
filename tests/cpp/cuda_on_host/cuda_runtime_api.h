// CUDA on the host, as far as csrc/cuda uses it: for tests alone. The same source runs, every thread as a fiber.
//
// A CTA's threads switch at barriers and shuffles only, in an order drawn at random, so that a missing barrier shows; a
// barrier that not every thread reaches ends the program. CTAs run one after the other, in an order drawn at random.
// Memory is the host's: AddressSanitizer sees every access of a kernel.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __shared__ static  // one CTA runs at a time
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __CUDA_ARCH_LIST__ 750, 900

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx, blockIdx, gridDim;

namespace cuda_on_host {

// Fibers take several times as long then.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// What tests choose and see.
inline int multiprocessors = 2;
inline std::mt19937 draw;
inline int launches = 0;
inline std::mutex device;  // does one launch at a time
inline std::function<void()> after_cta = [] {};

class Cta {
 public:
  static constexpr int kWarp = 32;

  Cta(unsigned threads, std::function<void()> body)
      : body_(std::move(body)), threads_(threads), warps_(threads / kWarp) {
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = threads_[t];
      if (t == stacks.size()) {
        stacks.push_back(std::make_unique<char[]>(kStack));
      }
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = stacks[t].get();
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = &scheduler_;
      makecontext(&thread.context, &Cta::enter, 0);
    }
  }

  void run() {
    current = this;
    ready_.resize(threads_.size());
    std::iota(ready_.begin(), ready_.end(), 0u);
    while (!ready_.empty()) {
      std::swap(ready_[pick()], ready_.back());
      running_ = ready_.back();
      ready_.pop_back();
      threadIdx = dim3(running_);
      threadIdx.y = threadIdx.z = 0;
      resume(threads_[running_]);
    }
    if (finished_ != threads_.size()) {
      std::fprintf(stderr, "a barrier was not reached by every thread\n");
      std::abort();
    }
  }

  void sync_cta() { wait(all_, threads_.size()); }

  void sync_warp() { wait(warps_[running_ / kWarp].barrier, kWarp); }

  // What `source` of the same warp gives to this call.
  double exchange(double x, int source) {
    Warp& warp = warps_[running_ / kWarp];
    const int turn = threads_[running_].exchanges++ % 2;  // the other slots may still be read
    warp.slots[turn][running_ % kWarp] = x;
    sync_warp();
    return warp.slots[turn][source];
  }

  unsigned lane() const { return running_ % kWarp; }

  static inline Cta* current = nullptr;

 private:
  static constexpr size_t kStack = 256 << 10;
  static inline std::vector<std::unique_ptr<char[]>> stacks;  // kept from CTA to CTA

  struct Thread {
    ucontext_t context;
    jmp_buf jump;
    bool has_begun = false;
    int exchanges = 0;
  };
  struct Barrier {
    std::vector<unsigned> waiting;
  };
  struct Warp {
    Barrier barrier;
    double slots[2][kWarp];
    unsigned rank = draw();
  };

  static void enter() {
    current->body_();
    ++current->finished_;
#ifndef __SANITIZE_ADDRESS__
    _longjmp(current->scheduler_jump_, 1);
#endif
  }

  // A random thread; in half of the CTAs, one of the warp that is drawn to run ahead of the others as far as it can.
  size_t pick() {
    const size_t any = draw() % ready_.size();
    if (!runs_ahead_) {
      return any;
    }
    const auto before = [this](unsigned a, unsigned b) { return warps_[a / kWarp].rank < warps_[b / kWarp].rank; };
    return std::max_element(ready_.begin(), ready_.end(), before) - ready_.begin();
  }

  void wait(Barrier& barrier, size_t count) {
    barrier.waiting.push_back(running_);
    if (barrier.waiting.size() == count) {
      ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
      barrier.waiting.clear();
    }
    yield(threads_[running_]);
  }

  // swapcontext() asks the kernel for the mask of signals twice, and takes ten times as long as what replaces it here,
  // where no sanitizer watches the stacks. (A longjmp from stack to stack is what _FORTIFY_SOURCE would stop.)
#ifdef __SANITIZE_ADDRESS__
  void resume(Thread& thread) { swapcontext(&scheduler_, &thread.context); }
  void yield(Thread& thread) { swapcontext(&thread.context, &scheduler_); }
#else
  void resume(Thread& thread) {
    if (_setjmp(scheduler_jump_) == 0) {
      if (thread.has_begun) {
        _longjmp(thread.jump, 1);
      }
      thread.has_begun = true;
      setcontext(&thread.context);
    }
  }
  void yield(Thread& thread) {
    if (_setjmp(thread.jump) == 0) {
      _longjmp(scheduler_jump_, 1);
    }
  }
  jmp_buf scheduler_jump_;
#endif

  std::function<void()> body_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier all_;
  std::vector<unsigned> ready_;
  ucontext_t scheduler_;
  bool runs_ahead_ = draw() % 2 == 0;
  unsigned running_ = 0;
  size_t finished_ = 0;
};

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::Cta::current->sync_cta(); }
inline void __syncwarp() { cuda_on_host::Cta::current->sync_warp(); }
inline void __threadfence() {}

inline double __shfl_sync(unsigned, double x, int source) { return cuda_on_host::Cta::current->exchange(x, source); }
inline double __shfl_xor_sync(unsigned, double x, int mask) {
  return cuda_on_host::Cta::current->exchange(x, static_cast<int>(cuda_on_host::Cta::current->lane()) ^ mask);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

template <class T>
T __ldg(const T* address) {
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
inline cudaStreamCaptureStatus capture_status = cudaStreamCaptureStatusNone;
// The launches that were captured, to be replayed, and how one runs.
inline std::vector<std::function<void()>> graph;

template <class Launch>
void run_or_capture(Launch launch) {
  if (capture_status == cudaStreamCaptureStatusNone) {
    launch();
  } else {
    graph.push_back(launch);
  }
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
    std::fprintf(stderr, "a launch that CUDA refuses\n");
    std::abort();
  }
  run_or_capture([grid = config->gridDim, threads = config->blockDim.x, kernel, arguments...] {
    const std::lock_guard<std::mutex> lock(device);
    ++launches;
    gridDim = grid;
    std::vector<unsigned> order(gridDim.x);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), draw);
    for (const unsigned cta : order) {
      blockIdx = dim3(cta);
      blockIdx.y = blockIdx.z = 0;
      Cta(threads, [&] { kernel(arguments...); }).run();
      after_cta();
    }
  });
  return cudaSuccess;
}
