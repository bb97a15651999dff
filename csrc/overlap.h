// Whether tensors that are written share memory with each other, or with tensors that are read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "extent.h"
#include "torch_compat.h"

namespace fused_reg {

// A tensor with elements, and what a message calls it.
struct Region : Extent {
  const at::Tensor* tensor;
  size_t index;    // in the list
  const char* of;  // "" for the parameter, ".grad" for its gradient

  Region(const at::Tensor& t, size_t index, const char* of)
      : Extent(reinterpret_cast<uintptr_t>(t.const_data_ptr()), t.element_size(), t.sizes(), t.strides()),
        tensor(&t),
        index(index),
        of(of) {}

  std::string name() const { return "params[" + std::to_string(index) + "]" + of; }
};

inline void check_no_self_overlap(const Region& r) {
  TORCH_CHECK_VALUE(!r.overlaps_itself(), r.name(),
                    " must have memory for each of its elements, got a tensor with several in one place (strides ",
                    r.tensor->strides(), ")");
}

// Of all conflicts the first in the list, parameters before gradients: addresses shall not decide what is said.
inline void check_disjoint(std::vector<Region> regions) {
  if (!first_shared(regions).has_value()) {
    return;
  }
  std::stable_sort(regions.begin(), regions.end(), [](const Region& a, const Region& b) { return *a.of < *b.of; });
  const auto shared = first_shared(regions);
  const Region &first = regions[shared->first], &second = regions[shared->second];
  TORCH_CHECK_VALUE(!first.tensor->is_same(*second.tensor), second.name(), " must not be the same tensor as ",
                    first.name());
  TORCH_CHECK_VALUE(false, second.name(), " must not share memory with ", first.name());
}

}  // namespace fused_reg
