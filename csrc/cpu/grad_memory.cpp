#include "grad_memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <map>
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
    use(bytes);
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

  // A kept block of this size, or null.
  Block* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto it = kept_.find(bytes);
    if (it == kept_.end()) {
      return nullptr;
    }
    Block* const block = it->second;
    kept_.erase(it);
    kept_bytes_ -= bytes;
    return block;
  }

  void use(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    limit_ = std::max(limit_, peak_);
    trim();
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
    get().keep(block);
  }

  void keep(Block* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= block->bytes;
    kept_.emplace(block->bytes, block);
    kept_bytes_ += block->bytes;
    if (used_ == 0) {  // a step has ended; what no step has needed lately goes, little by little
      limit_ = std::max(peak_, limit_ - limit_ / 64);
      peak_ = 0;
      trim();
    }
  }

  void trim() {
    while (used_ + kept_bytes_ > limit_) {
      const auto smallest = kept_.begin();
      kept_bytes_ -= smallest->first;
      delete smallest->second;
      kept_.erase(smallest);
    }
  }

  std::mutex mutex_;
  std::multimap<size_t, Block*> kept_;  // by size
  size_t kept_bytes_ = 0;
  size_t used_ = 0;
  size_t peak_ = 0;   // of used_, in this step
  size_t limit_ = 0;  // of used_ + kept_bytes_: the peak of recent steps
};

}  // namespace

at::Tensor empty_grad_like(const at::Tensor& dense) {
  const bool keep = dense.nbytes() >= kSmall && !is_forked_child();
  c10::Allocator* const allocator = keep ? static_cast<c10::Allocator*>(&GradAllocator::get()) : c10::GetCPUAllocator();
  return at::detail::empty_strided_generic(dense.sizes(), dense.strides(), allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dense.scalar_type());
}

}  // namespace fused_reg
