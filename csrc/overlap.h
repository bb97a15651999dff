// Whether tensors that are written share memory with each other, or with tensors that are read.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fused_reg {

// A tensor with elements, and what a message calls it.
struct Region {
  const at::Tensor* tensor;
  size_t index;     // in the list
  const char* of;   // "" for the parameter, ".grad" for its gradient
  uintptr_t begin;  // bytes
  uintptr_t end;

  Region(const at::Tensor& t, size_t index, const char* of) : tensor(&t), index(index), of(of) {
    begin = end = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    int64_t last = 0;
    for (const auto d : c10::irange(t.dim())) {
      last += (t.size(d) - 1) * t.stride(d);
    }
    end += (last + 1) * t.element_size();
  }

  std::string name() const { return "params[" + std::to_string(index) + "]" + of; }

  bool is_dense() const { return tensor->is_non_overlapping_and_dense(); }

  // The address of every element, in rising order.
  std::vector<uintptr_t> addresses() const {
    std::vector<uintptr_t> all{begin};
    for (const auto d : c10::irange(tensor->dim())) {
      const size_t before = all.size();
      for (int64_t i = 1; i < tensor->size(d); ++i) {
        for (size_t k = 0; k < before; ++k) {
          all.push_back(all[k] + i * tensor->stride(d) * tensor->element_size());
        }
      }
    }
    std::sort(all.begin(), all.end());
    return all;
  }
};

// Two elements of the tensor have one place in memory.
inline bool overlaps_itself(const Region& r) {
  if (r.is_dense()) {
    return false;
  }
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (const auto d : c10::irange(r.tensor->dim())) {
    if (r.tensor->size(d) > 1) {
      dims.emplace_back(r.tensor->stride(d), r.tensor->size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // of the dimensions so far
  for (const auto& [stride, size] : dims) {
    if (stride == 0) {
      return true;
    }
    if (stride <= reach) {  // interleaved: look at every element
      const std::vector<uintptr_t> all = r.addresses();
      return std::adjacent_find(all.begin(), all.end()) != all.end();
    }
    reach += (size - 1) * stride;
  }
  return false;
}

// For regions whose ranges of memory overlap: whether an element of one does.
inline bool share_elements(const Region& a, const Region& b) {
  if (a.is_dense() && b.is_dense()) {
    return true;
  }
  const std::vector<uintptr_t> of_a = a.addresses(), of_b = b.addresses();
  for (size_t i = 0, j = 0; i < of_a.size() && j < of_b.size();) {
    if (of_a[i] < of_b[j] + b.tensor->element_size() && of_b[j] < of_a[i] + a.tensor->element_size()) {
      return true;
    }
    ++(of_a[i] < of_b[j] ? i : j);
  }
  return false;
}

inline void check_no_self_overlap(const Region& r) {
  TORCH_CHECK_VALUE(!overlaps_itself(r), r.name(),
                    " must have memory for each of its elements, got a tensor with several in one place (strides ",
                    r.tensor->strides(), ")");
}

inline void check_disjoint(std::vector<Region> regions) {
  std::sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return a.begin < b.begin; });
  std::vector<const Region*> open;  // those that end after the region at hand begins
  // Of all conflicts the first in the list, parameters before gradients: addresses shall not decide what is said.
  std::array<const Region*, 2> conflict{};
  const auto place = [](const Region* r) { return std::make_pair(*r->of != '\0', r->index); };
  for (const Region& r : regions) {
    open.erase(std::remove_if(open.begin(), open.end(), [&](const Region* o) { return o->end <= r.begin; }),
               open.end());
    for (const Region* const o : open) {
      if (share_elements(*o, r)) {
        const bool in_order = place(o) < place(&r);
        const std::array<const Region*, 2> found{in_order ? o : &r, in_order ? &r : o};
        if (conflict[1] == nullptr || place(found[1]) < place(conflict[1])) {
          conflict = found;
        }
      }
    }
    open.push_back(&r);
  }
  if (conflict[1] != nullptr) {
    const auto [first, second] = conflict;
    TORCH_CHECK_VALUE(!first->tensor->is_same(*second->tensor), second->name(), " must not be the same tensor as ",
                      first->name());
    TORCH_CHECK_VALUE(false, second->name(), " must not share memory with ", first->name());
  }
}

}  // namespace fused_reg
