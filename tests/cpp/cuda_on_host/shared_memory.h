// The shared memory of a CTA: __shared__ variables are thread_local ones, and all bytes of these are changed for those
// of the CTA that runs.
#pragma once

#include <link.h>

#include <cstring>
#include <vector>

#define __shared__ static thread_local

namespace cuda_on_host {

// What nobody has written yet: NaN as a float of any size, true as a bool, -1 as an index.
constexpr unsigned char kPoison = 0xff;

// The thread_local variables of this program or library, as this thread has them.
struct ThreadLocals {
  char* begin = nullptr;
  size_t size = 0;

  static ThreadLocals find() {
    static thread_local char any;
    *const_cast<volatile char*>(&any) = 0;  // so that they are there
    ThreadLocals found;
    dl_iterate_phdr(&ThreadLocals::take, &found);
    return found;
  }

  bool has(const void* p) const { return p >= begin && p < begin + size; }

 private:
  // Of the library in which this function is.
  static int take(dl_phdr_info* info, size_t, void* found) {
    bool is_here = false;
    size_t size = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      const auto at = reinterpret_cast<ElfW(Addr)>(&ThreadLocals::take) - info->dlpi_addr - part.p_vaddr;
      is_here |= part.p_type == PT_LOAD && at < part.p_memsz;
      size = part.p_type == PT_TLS ? part.p_memsz : size;
    }
    if (is_here) {
      *static_cast<ThreadLocals*>(found) = {static_cast<char*>(info->dlpi_tls_data), size};
    }
    return is_here;
  }
};

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { there_ = there_ == &bytes_ ? nullptr : there_; }

  void take_its_place() {
    if (there_ == &of_host_) {
      variables = ThreadLocals::find();
    }
    if (there_ != &bytes_) {
      change_for(&bytes_);
    }
  }

  // To be called before code other than kernels' goes on.
  static void give_back_to_host() {
    if (there_ != &of_host_) {
      change_for(&of_host_);
    }
  }

  static inline ThreadLocals variables;

 private:
  using Bytes = std::vector<char>;

  static void change_for(Bytes* next) {
    if (there_ != nullptr) {
      there_->assign(variables.begin, variables.begin + variables.size);
    }
    there_ = next;
    if (next->empty()) {
      std::memset(variables.begin, kPoison, variables.size);
    } else {
      std::memcpy(variables.begin, next->data(), variables.size);
    }
  }

  Bytes bytes_;  // while others have the place
  static inline Bytes of_host_;
  static inline Bytes* there_ = &of_host_;
};

}  // namespace cuda_on_host
