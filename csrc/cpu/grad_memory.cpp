#include "grad_memory.h"

#include <algorithm>
#include <map>
#include <mutex>

#include "../torch_compat.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_reg {

namespace {

constexpr size_t kSmall = size_t{1} << 16;  // below, malloc keeps its memory itself

// Asks for a page fault for 2 MB instead of 4 KB, where the system leaves the choice to programs ("madvise"). Only
// whole huge pages inside the block are asked for, so nothing is used that the block does not fill. A refusal (an old
// kernel, a sandbox) changes nothing but the speed.
void advise_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(block);
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  if (first < last) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
}

class GradAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Block* block;
    const auto kept = kept_.find(bytes);
    if (kept != kept_.end()) {
      block = kept->second;
      kept_.erase(kept);
      kept_bytes_ -= bytes;
    } else {
      block = new Block{c10::GetCPUAllocator()->allocate(bytes), bytes};
      advise_huge_pages(block->memory.get(), bytes);
    }
    used_ += bytes;
    peak_ = std::max(peak_, used_);
    limit_ = std::max(limit_, peak_);
    trim();
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

  static void give_back(void* context) {
    auto* const block = static_cast<Block*>(context);
    if (is_forked_child) {  // the parent may have held the mutex
      delete block;
      return;
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
  const bool keep = dense.nbytes() >= kSmall && !is_forked_child;
  c10::Allocator* const allocator = keep ? static_cast<c10::Allocator*>(&GradAllocator::get()) : c10::GetCPUAllocator();
  return at::detail::empty_strided_generic(dense.sizes(), dense.strides(), allocator,
                                           c10::DispatchKeySet(c10::DispatchKey::CPU), dense.scalar_type());
}

}  // namespace fused_reg
