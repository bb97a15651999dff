// A CTA: its threads, and how they meet. They switch at barriers, shuffles and atomics only, in an order drawn
// at random, so that what is not ordered shows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "shared_memory.h"
#include "sites.h"
#include "watch.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

inline dim3 threadIdx, blockIdx, gridDim;

namespace cuda_on_host {

inline std::mt19937 draw;

struct Grid {
  unsigned ctas, threads;
  std::function<void()> body;  // of a thread
};

class Cta {
 public:
  static constexpr unsigned kWarp = 32;

  Cta(const Grid& grid, unsigned index, const Order& order, std::shared_ptr<Released>* released)
      : grid_(grid), index_(index), warps_(grid.threads / kWarp), watch_(order, released, index, grid.threads) {
    for (unsigned t = 0; t < grid.threads; ++t) {
      threads_.emplace_back(grid.body);
    }
    ready_.resize(grid.threads);
    std::iota(ready_.begin(), ready_.end(), 0u);
  }

  // Until it is done, or leaves the place to another one.
  void run() {
    current = this;
    shared_memory_.take_its_place();
    gridDim = dim3(grid_.ctas);
    blockIdx = dim3(index_);
    blockIdx.y = blockIdx.z = 0;
    leaves_ = false;
    while (!ready_.empty() && !leaves_) {
      std::swap(ready_[pick()], ready_.back());
      running_ = ready_.back();
      ready_.pop_back();
      threadIdx = dim3(running_);
      threadIdx.y = threadIdx.z = 0;
      watch_.run(running_, threads_[running_].fiber);
      threads_[running_].fiber.resume();
      if (threads_[running_].fiber.is_done()) {
        finish();
      }
    }
    if (ready_.empty() && !is_done()) {
      fail_of_waiting();
    }
  }

  bool is_done() const { return finished_ == threads_.size(); }

  // All of the CTA.
  void sync_cta(int site) {
    come_to(site);
    if (site == left_out) {
      return;
    }
    if (barrier_.threads.empty()) {
      barrier_.site = site;
    } else if (barrier_.site != site) {
      fail_at(site, "others of the CTA wait at " + sites[barrier_.site].name());
    }
    barrier_.threads.push_back(running_);
    if (barrier_.threads.size() == threads_.size()) {
      release(&barrier_.threads);
    } else if (finished_ > 0) {
      fail_at(site, "other threads of the CTA have returned");
    } else if (draw() % kOddsAtBarriers == 0) {
      leaves_ = true;
    }
    yield();
  }

  void sync_warp(unsigned mask, int site) {
    come_to(site);
    if (site != left_out) {
      meet(mask, site, true);
    }
  }

  // What `source` of the mask gives to this call.
  template <class T>
  T exchange(unsigned mask, T x, unsigned source, int site) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    come_to(site);
    mask &= site == left_out ? ~0u >> 1 : ~0u;
    if (source >= kWarp || (mask >> source & 1) == 0) {
      fail_at(site, "lane " + std::to_string(source) + " that it reads is not in its mask");
    }
    Thread& thread = threads_[running_];
    std::memcpy(&thread.gives, &x, sizeof x);
    thread.takes_from = running_ / kWarp * kWarp + source;
    meet(mask, site, false);
    std::memcpy(&x, &thread.takes, sizeof x);
    return x;
  }

  // update(old) is the new value; `acquire`, `release`: the places where it does so.
  template <class T, class Update>
  T atomic(T* address, int site, int acquire, int release, const Update& update) {
    come_to(site);
    pause();
    watch_.atomic(address, sizeof(T), acquire != left_out, release != left_out);
    const T old = *address;
    *address = update(old);
    pause();
    return old;
  }

  unsigned lane() const { return running_ % kWarp; }

  static inline Cta* current = nullptr;

 private:
  static constexpr unsigned kOddsAtBarriers = 16;

  struct Thread {
    explicit Thread(const std::function<void()>& body) : fiber(body) {}
    Fiber fiber;
    uint64_t gives, takes;
    unsigned takes_from = 0;
  };
  // Those who wait for one another.
  struct Meeting {
    int site = 0;
    unsigned mask = 0;  // of lanes, in a warp
    std::vector<unsigned> threads;
  };
  struct Warp {
    std::vector<Meeting> meetings;
    unsigned finished = 0;  // lanes
    unsigned rank = draw();
  };

  // A random thread; in half of the CTAs, one of the warp that is drawn to run ahead of the others as far as it can.
  size_t pick() {
    const size_t any = draw() % ready_.size();
    if (!runs_ahead_) {
      return any;
    }
    const auto before = [this](unsigned a, unsigned b) { return warps_[a / kWarp].rank < warps_[b / kWarp].rank; };
    return std::max_element(ready_.begin(), ready_.end(), before) - ready_.begin();
  }

  void come_to(int site) { watch_.come_to(site); }

  void meet(unsigned mask, int site, bool orders_memory) {
    Warp& warp = warps_[running_ / kWarp];
    if ((mask >> lane() & 1) == 0) {
      fail_at(site, "its lane is not in its mask");
    }
    if ((mask & warp.finished) != 0) {
      fail_at(site, "lanes of its mask have returned");
    }
    const auto overlaps = [&](const Meeting& m) { return (m.mask & mask) != 0; };
    auto m = std::find_if(warp.meetings.begin(), warp.meetings.end(), overlaps);
    if (m == warp.meetings.end()) {
      m = warp.meetings.insert(m, Meeting{site, mask, {}});
    } else if (m->site != site || m->mask != mask) {
      fail_at(site, "others of its mask wait at " + sites[m->site].name());
    }
    m->threads.push_back(running_);
    if (m->threads.size() == static_cast<size_t>(__builtin_popcount(mask))) {
      std::vector<unsigned> threads = std::move(m->threads);
      warp.meetings.erase(m);
      for (const unsigned t : threads) {
        threads_[t].takes = threads_[threads_[t].takes_from].gives;
      }
      release(&threads, orders_memory);
    }
    yield();
  }

  void release(std::vector<unsigned>* threads, bool orders_memory = true) {
    if (orders_memory) {
      watch_.meet(*threads);
    }
    ready_.insert(ready_.end(), threads->begin(), threads->end());
    threads->clear();
  }

  // Others may come first, of this CTA or of another one.
  void pause() {
    leaves_ = draw() % 2 == 0;
    if (leaves_ || draw() % 2 == 0) {
      ready_.push_back(running_);
      yield();
    }
  }

  void yield() { threads_[running_].fiber.yield(); }

  void finish() {
    ++finished_;
    Warp& warp = warps_[running_ / kWarp];
    warp.finished |= 1u << lane();
    for (const Meeting& m : warp.meetings) {
      if ((m.mask >> lane() & 1) != 0) {
        fail_at(m.site, "a lane of the mask returns");
      }
    }
    if (!barrier_.threads.empty()) {
      fail_at(barrier_.site, "a barrier was not reached by every thread");
    }
  }

  [[noreturn]] void fail_at(int site, const std::string& what) const {
    fail(sites[site].name() + ", thread " + std::to_string(running_) + " of CTA " + std::to_string(index_) + ": " +
         what);
  }

  [[noreturn]] void fail_of_waiting() const {
    std::string all = "threads of CTA " + std::to_string(index_) + " wait for ever:";
    const auto add = [&](const Meeting& m) {
      all += " " + std::to_string(m.threads.size()) + " at " + sites[m.site].name() + ";";
    };
    for (const Warp& warp : warps_) {
      std::for_each(warp.meetings.begin(), warp.meetings.end(), add);
    }
    if (!barrier_.threads.empty()) {
      add(barrier_);
    }
    fail(all);
  }

  const Grid& grid_;
  unsigned index_;
  std::deque<Thread> threads_;
  std::vector<Warp> warps_;
  Meeting barrier_;
  std::vector<unsigned> ready_;
  SharedMemory shared_memory_;
  Watch watch_;
  bool runs_ahead_ = draw() % 2 == 0, leaves_ = false;
  unsigned running_ = 0;
  size_t finished_ = 0;
};

}  // namespace cuda_on_host
