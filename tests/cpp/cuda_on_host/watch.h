// Who of a kernel's threads waits for whom. Where watch.cpp is linked (CUDA_ON_HOST_WATCHED), it finds races by it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace cuda_on_host {

class Fiber;

// The place of a launch: its stream, its number there, and the last launch of every stream that it comes after.
struct Order {
  size_t stream = 0;
  uint32_t number = 0;
  std::vector<uint32_t> after;

  // Comes after all that the other one does, too.
  void join(const std::vector<uint32_t>& others) {
    after.resize(std::max(after.size(), others.size()));
    for (size_t s = 0; s < others.size(); ++s) {
      after[s] = std::max(after[s], others[s]);
    }
  }
};

#ifdef CUDA_ON_HOST_WATCHED

constexpr bool kWatched = true;

// Whether kernel code runs: what it reads and writes is watched.
extern bool is_kernel_code;

struct Clocks;
struct Released;

// The clocks of the threads of a CTA.
class Watch {
 public:
  // `released`: what the atomics of the launch have published.
  Watch(const Order& order, std::shared_ptr<Released>* released, unsigned cta, unsigned threads);
  Watch(const Watch&) = delete;
  ~Watch();
  void run(unsigned thread, const Fiber& fiber);  // this thread runs now
  void come_to(int site);                         // the running thread
  void meet(const std::vector<unsigned>& threads);
  void atomic(const void* address, size_t bytes, bool acquires, bool releases);

 private:
  std::unique_ptr<Clocks> clocks_;
};

// Through the cache that does not see writes of the launch.
void watch_read_only(const void* address, size_t bytes);

#else

constexpr bool kWatched = false;
inline bool is_kernel_code;

struct Released {};

class Watch {
 public:
  Watch(const Order&, std::shared_ptr<Released>*, unsigned, unsigned) {}
  void run(unsigned, const Fiber&) {}
  void come_to(int) {}
  void meet(const std::vector<unsigned>&) {}
  void atomic(const void*, size_t, bool, bool) {}
};

inline void watch_read_only(const void*, size_t) {}

#endif

// Code of these headers, within a kernel.
class HostCode {
 public:
  __attribute__((no_sanitize("thread"))) HostCode() { is_kernel_code = false; }
  __attribute__((no_sanitize("thread"))) ~HostCode() { is_kernel_code = true; }
};

}  // namespace cuda_on_host
