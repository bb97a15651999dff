// Finds races in kernels by vector clocks. -fsanitize=thread has the compiler announce every read and write; what is
// announced to is this file, in the place of ThreadSanitizer's own library, and itself compiled without the flag.
//
// Clocks merge where CUDA orders memory: at barriers, of a CTA or of the lanes of a warp (shuffles order none); from an
// atomic that releases to a later one of the same address that acquires; from launch to launch of a stream, and by
// events and the host. Two accesses of a byte that nothing orders, one of them a write, end the program.
#include "watch.h"

#include <array>
#include <map>
#include <string>
#include <unordered_map>

#include "fiber.h"
#include "shared_memory.h"
#include "sites.h"

namespace cuda_on_host {

bool is_kernel_code = false;

namespace {

using Times = std::vector<uint32_t>;                               // of the threads of a CTA
using Foreign = std::map<uint32_t, std::shared_ptr<const Times>>;  // of other CTAs, by number

void join(Times* times, const Times& others) {
  for (size_t t = 0; t < times->size(); ++t) {
    (*times)[t] = std::max((*times)[t], others[t]);
  }
}

void join(std::shared_ptr<const Foreign>* mine, const std::shared_ptr<const Foreign>& others) {
  if (others == nullptr || *mine == others) {
    return;
  }
  if (*mine == nullptr) {
    *mine = others;
    return;
  }
  auto both = std::make_shared<Foreign>(**mine);
  for (const auto& [cta, times] : *others) {
    std::shared_ptr<const Times>& own = (*both)[cta];
    if (own == nullptr) {
      own = times;
    } else if (own != times) {
      Times top = *own;
      join(&top, *times);
      own = std::make_shared<const Times>(std::move(top));
    }
  }
  *mine = std::move(both);
}

enum class Access : uint8_t { kNone, kRead, kReadOnly, kWrite, kAtomic };

// One access of a word of eight bytes.
struct Cell {
  uint32_t cta;
  uint32_t time;
  uint16_t thread;
  uint8_t bytes;
  Access access;
  int site;
};
constexpr int kCells = 8;
struct Word {
  Cell cells[kCells];
};
constexpr uintptr_t kPageWords = 128;

// What the last accesses of memory were.
class Shadow {
 public:
  Word& at(uintptr_t word) {
    const uintptr_t number = word / kPageWords;
    if (last_ == nullptr || number != last_number_) {
      last_ = &pages_[number];
      last_number_ = number;
    }
    return (*last_)[word % kPageWords];
  }

 private:
  using Page = std::array<Word, kPageWords>;
  std::unordered_map<uintptr_t, Page> pages_;
  Page* last_ = nullptr;
  uintptr_t last_number_ = 0;
};

Shadow global;

// The CTAs of all launches, by number.
struct Place {
  uint32_t stream, launch, index;
};
std::vector<Place> places;

}  // namespace

// What each address of an atomic has been given in a launch.
struct Released {
  std::map<const void*, std::shared_ptr<const Foreign>> at;
};

struct Clocks {
  struct Thread {
    Times times;                             // of the CTA, as far as it knows them
    std::shared_ptr<const Foreign> foreign;  // and of others
    int site = 0;
  };

  const Order& order;
  std::shared_ptr<Released> released;
  uint32_t number;
  std::vector<Thread> threads;
  Shadow shared;
  unsigned running = 0;
  const Fiber* fiber = nullptr;

  bool is_before(const Cell& cell) const {
    const Thread& me = threads[running];
    if (cell.cta == number) {
      return me.times[cell.thread] >= cell.time;
    }
    const Place& place = places[cell.cta];
    if (place.stream != order.stream || place.launch != order.number) {
      return place.stream < order.after.size() && order.after[place.stream] >= place.launch;
    }
    const auto found = me.foreign == nullptr ? Foreign::const_iterator{} : me.foreign->find(cell.cta);
    return me.foreign != nullptr && found != me.foreign->end() && (*found->second)[cell.thread] >= cell.time;
  }

  bool is_of_launch(const Cell& cell) const {
    return places[cell.cta].stream == order.stream && places[cell.cta].launch == order.number;
  }

  std::string name(const Cell& cell) const {
    constexpr const char* kNames[] = {"", "a read", "a read through the read-only cache", "a write", "an atomic"};
    const Place& place = places[cell.cta];
    return std::string(kNames[static_cast<int>(cell.access)]) + " by thread " + std::to_string(cell.thread) +
           " of CTA " + std::to_string(place.index) + " of launch " + std::to_string(place.launch) + " of stream " +
           std::to_string(place.stream) + " after " + sites[cell.site].name();
  }

  void access(uintptr_t word, uint8_t bytes, Access access, bool is_shared) {
    const Thread& me = threads[running];
    const Cell mine{number, me.times[running], static_cast<uint16_t>(running), bytes, access, me.site};
    const bool writes = access == Access::kWrite || access == Access::kAtomic;
    Cell* place = nullptr;
    for (Cell& cell : (is_shared ? shared : global).at(word).cells) {
      if (cell.access == Access::kNone) {
        place = place == nullptr ? &cell : place;
        continue;
      }
      const bool was_write = cell.access == Access::kWrite || cell.access == Access::kAtomic;
      const bool are_atomic = access == Access::kAtomic && cell.access == Access::kAtomic;
      const bool overlaps = (cell.bytes & bytes) != 0;
      const bool before = is_before(cell);
      const bool is_stale = access == Access::kReadOnly || cell.access == Access::kReadOnly;
      if (overlaps && (writes || was_write) && !are_atomic && (!before || (is_stale && is_of_launch(cell)))) {
        fail("nothing orders " + name(mine) + ", and " + name(cell) + (is_shared ? ", of shared memory" : ""));
      }
      if (before && (cell.bytes & ~bytes) == 0 && (writes || !was_write)) {
        cell.access = Access::kNone;  // who comes after this access comes after that one
        place = &cell;
      }
    }
    if (place == nullptr) {
      place = &evicted(word, is_shared);
    }
    *place = mine;
  }

  // A read, if there is one: of many reads one is enough to find a race.
  Cell& evicted(uintptr_t word, bool is_shared) {
    Cell* const cells = (is_shared ? shared : global).at(word).cells;
    static unsigned turn = 0;
    for (int i = 0; i < kCells; ++i) {
      Cell& cell = cells[++turn % kCells];
      if (cell.access == Access::kRead || cell.access == Access::kReadOnly) {
        return cell;
      }
    }
    return cells[++turn % kCells];
  }
};

namespace {

Clocks* current = nullptr;

void watch(const void* address, size_t size, Access access) {
  if (!is_kernel_code || current->fiber->has_on_stack(address)) {
    return;
  }
  const bool is_shared = SharedMemory::variables.has(address);
  auto at = reinterpret_cast<uintptr_t>(address);
  while (size > 0) {
    const size_t first = at % 8, count = std::min<size_t>(8 - first, size);
    current->access(at / 8, static_cast<uint8_t>(((1u << count) - 1) << first), access, is_shared);
    at += count;
    size -= count;
  }
}

}  // namespace

Watch::Watch(const Order& order, std::shared_ptr<Released>* released, unsigned cta, unsigned threads)
    : clocks_(new Clocks{order, nullptr, static_cast<uint32_t>(places.size()), {}, {}}) {
  if (*released == nullptr) {
    *released = std::make_shared<Released>();
  }
  clocks_->released = *released;
  places.push_back({static_cast<uint32_t>(order.stream), order.number, cta});
  clocks_->threads.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    clocks_->threads[t].times.resize(threads);
    clocks_->threads[t].times[t] = 1;
  }
}

Watch::~Watch() = default;

void Watch::run(unsigned thread, const Fiber& fiber) {
  current = clocks_.get();
  current->running = thread;
  current->fiber = &fiber;
}

void Watch::come_to(int site) { clocks_->threads[clocks_->running].site = site; }

void Watch::meet(const std::vector<unsigned>& threads) {
  Times top = clocks_->threads[threads[0]].times;
  std::shared_ptr<const Foreign> foreign;
  for (const unsigned t : threads) {
    join(&top, clocks_->threads[t].times);
    join(&foreign, clocks_->threads[t].foreign);
  }
  for (const unsigned t : threads) {
    Clocks::Thread& thread = clocks_->threads[t];
    thread.times = top;
    ++thread.times[t];
    thread.foreign = foreign;
  }
}

void Watch::atomic(const void* address, size_t bytes, bool acquires, bool releases) {
  is_kernel_code = true;
  watch(address, bytes, Access::kAtomic);
  is_kernel_code = false;
  Clocks::Thread& me = clocks_->threads[clocks_->running];
  std::shared_ptr<const Foreign>& released = clocks_->released->at[address];
  if (acquires && released != nullptr) {
    join(&me.foreign, released);
    const auto own = released->find(clocks_->number);
    if (own != released->end()) {
      join(&me.times, *own->second);
    }
  }
  if (releases) {
    auto known = me.foreign == nullptr ? std::make_shared<Foreign>() : std::make_shared<Foreign>(*me.foreign);
    (*known)[clocks_->number] = std::make_shared<const Times>(me.times);
    join(&released, known);
    ++me.times[clocks_->running];
  }
}

void watch_read_only(const void* address, size_t bytes) { watch(address, bytes, Access::kReadOnly); }

}  // namespace cuda_on_host

using cuda_on_host::Access;
using cuda_on_host::watch;

// What the compiler calls.
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, size_t size) { watch(address, size, Access::kRead); }
void __tsan_write_range(void* address, size_t size) { watch(address, size, Access::kWrite); }

#define CUDA_ON_HOST_ACCESSES(size)                                                        \
  void __tsan_read##size(void* address) { watch(address, size, Access::kRead); }           \
  void __tsan_write##size(void* address) { watch(address, size, Access::kWrite); }         \
  void __tsan_unaligned_read##size(void* address) { watch(address, size, Access::kRead); } \
  void __tsan_unaligned_write##size(void* address) { watch(address, size, Access::kWrite); }
CUDA_ON_HOST_ACCESSES(1)
CUDA_ON_HOST_ACCESSES(2)
CUDA_ON_HOST_ACCESSES(4)
CUDA_ON_HOST_ACCESSES(8)
CUDA_ON_HOST_ACCESSES(16)

// std::atomic, of the host.
#define CUDA_ON_HOST_ATOMICS(bits, T)                                                                               \
  T __tsan_atomic##bits##_load(const volatile T* a, int) { return __atomic_load_n(a, __ATOMIC_SEQ_CST); }           \
  void __tsan_atomic##bits##_store(volatile T* a, T x, int) { __atomic_store_n(a, x, __ATOMIC_SEQ_CST); }           \
  T __tsan_atomic##bits##_exchange(volatile T* a, T x, int) { return __atomic_exchange_n(a, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* a, T x, int) { return __atomic_fetch_add(a, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* a, T x, int) { return __atomic_fetch_sub(a, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_and(volatile T* a, T x, int) { return __atomic_fetch_and(a, x, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_or(volatile T* a, T x, int) { return __atomic_fetch_or(a, x, __ATOMIC_SEQ_CST); }   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* a, T* expected, T x, int, int) {                    \
    return __atomic_compare_exchange_n(a, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }                                                                                                                 \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* a, T* expected, T x, int, int) {                      \
    return __atomic_compare_exchange_n(a, expected, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                  \
  }
CUDA_ON_HOST_ATOMICS(8, uint8_t)
CUDA_ON_HOST_ATOMICS(16, uint16_t)
CUDA_ON_HOST_ATOMICS(32, uint32_t)
CUDA_ON_HOST_ATOMICS(64, uint64_t)
}
