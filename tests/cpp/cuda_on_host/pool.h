// Device memory as torch's caching allocator hands it out: a freed block at once to the next who asks for its size on
// its stream, also where launches that use it are still to come; from a pool of its own what is captured.
#pragma once

#include <map>
#include <tuple>

#include "device.h"

namespace cuda_on_host {

class Allocator {
 public:
  // What is allocated has no value yet: not when the stream comes to it, nor in a replay.
  void* allocate(size_t stream, size_t bytes) {
    const size_t pool = captured != nullptr ? captured->pool : current_pool;
    void* data = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const Key key{pool, stream, bytes};
      std::vector<void*>& free = free_[key];
      if (free.empty()) {
        data = std::malloc(bytes);
      } else {
        data = free.back();
        free.pop_back();
      }
      used_[data] = key;
    }
    device.run(stream, [=] { std::memset(data, kPoison, bytes); });
    return data;
  }

  void free(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto used = used_.find(data);
    const bool is_kept = is_deferred || std::get<0>(used->second) != 0;
    if (is_kept) {
      free_[used->second].push_back(data);
    } else {
      std::memset(data, kPoison, std::get<2>(used->second));
      std::free(data);
    }
    used_.erase(used);
  }

  // How many blocks are in use, of all pools or of one.
  size_t used() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_.size();
  }
  size_t used(size_t pool) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::count_if(used_.begin(), used_.end(), [&](const auto& u) { return std::get<0>(u.second) == pool; });
  }

  // Gives back what is free of a pool.
  void trim(size_t pool) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, free] : free_) {
      if (std::get<0>(key) == pool) {
        std::for_each(free.begin(), free.end(), std::free);
        free.clear();
      }
    }
  }

 private:
  using Key = std::tuple<size_t, size_t, size_t>;  // pool, stream, bytes

  std::mutex mutex_;
  std::map<Key, std::vector<void*>> free_;
  std::map<void*, Key> used_;
};

inline Allocator& allocator() {
  static auto* const a = new Allocator;  // tensors may outlive what is static
  return *a;
}

}  // namespace cuda_on_host
