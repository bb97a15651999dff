#include "grad_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <list>
#include <mutex>

#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_reg {

namespace {

constexpr size_t kSmall = size_t{1} << 16;  // below, malloc keeps its memory itself
constexpr size_t kLarge = size_t{1} << 25;  // from here on, the offer to the system costs less than it is worth

// Tells the system about the whole pages of some size inside a block. A refusal (an old kernel, a sandbox)
// changes nothing but the speed.
[[maybe_unused]] void advise(void* block, size_t bytes, size_t page, int advice) {
  const auto begin = reinterpret_cast<uintptr_t>(block);
  const uintptr_t first = (begin + page - 1) & ~(page - 1);
  const uintptr_t last = (begin + bytes) & ~(page - 1);
  if (first < last) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, advice);
  }
}

void advise_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(MADV_HUGEPAGE)
  advise(block, bytes, size_t{1} << 21, MADV_HUGEPAGE);  // a fault for 2 MB instead of 4 KB
#endif
}

void advise_unused([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(MADV_FREE)
  advise(block, bytes, size_t{1} << 12, MADV_FREE);  // the system may take it, and need not
#endif
}

class GradAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    if (block == nullptr) {
      block = new Block{c10::GetCPUAllocator()->allocate(bytes), bytes};
      advise_huge_pages(block->memory.get(), bytes);
    }
    return {block->memory.get(), block, &give_back, at::Device(at::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static GradAllocator& get() {
    static auto* const allocator = new GradAllocator;  // never destroyed: tensors may outlive static objects
    return *allocator;
  }

 private:
  struct Block {
    c10::DataPtr memory;
    size_t bytes;
  };

  // A block that is kept, or null; counts the bytes as used.
  Block* take(size_t bytes) {
    std::list<Block*> evicted;
    Block* found = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_ += bytes;
      const auto it = std::find_if(kept_.begin(), kept_.end(), [&](Block* b) { return b->bytes == bytes; });
      if (it != kept_.end()) {
        found = *it;
        kept_.erase(it);
        kept_bytes_ -= bytes;
      }
      peak_ = std::max(peak_, used_);
      while (used_ + kept_bytes_ > peak_) {
        kept_bytes_ -= kept_.front()->bytes;
        evicted.splice(evicted.end(), kept_, kept_.begin());
      }
    }
    for (Block* block : evicted) {
      delete block;
    }
    return found;
  }

  static void give_back(void* context) {
    auto* const block = static_cast<Block*>(context);
    if (is_forked_child()) {  // the parent may have held the mutex
      delete block;
      return;
    }
    if (block->bytes >= kLarge) {
      advise_unused(block->memory.get(), block->bytes);
    }
    GradAllocator& self = get();
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.used_ -= block->bytes;
    self.kept_bytes_ += block->bytes;
    self.kept_.push_back(block);
  }

  std::mutex mutex_;
  std::list<Block*> kept_;  // oldest first
  size_t kept_bytes_ = 0;
  size_t used_ = 0;
  size_t peak_ = 0;  // of used_; used_ + kept_bytes_ stays below
};

}  // namespace

at::Tensor empty_grad_like(const at::Tensor& dense) {
  const bool keep = dense.nbytes() >= kSmall && !is_forked_child();
  c10::Allocator* const allocator = keep ? static_cast<c10::Allocator*>(&GradAllocator::get()) : c10::GetCPUAllocator();
  return at::detail::empty_strided_generic(dense.sizes(), dense.strides(), allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dense.scalar_type());
}

}  // namespace fused_reg
