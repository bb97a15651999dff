// How the operators see a tensor's memory: as one run of elements, in any order.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>

namespace fused_reg {

// Each row (slice along dimension 0) of a dense tensor is a run of memory, and the rows follow on one another.
inline bool has_rows_in_a_run(const at::Tensor& dense) {
  return dense.dim() == 0 || dense.size(0) <= 1 || dense.numel() == 0 ||
         dense.stride(0) == dense.numel() / dense.size(0);
}

// The tensor itself if it is one run of memory, and with `rows` row after row; else a copy that is.
inline at::Tensor as_run(const at::Tensor& t, bool rows) {
  if (!t.is_non_overlapping_and_dense()) {
    return rows ? t.clone(at::MemoryFormat::Contiguous) : t.clone();
  }
  return rows && !has_rows_in_a_run(t) ? t.clone(at::MemoryFormat::Contiguous) : t;
}

// Tensors of one shape whose elements follow on one another in the same order.
inline bool has_layout_of(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) {
      return a.numel() == 0;
    }
  }
  return true;
}

// A gradient with the strides of its parameter, where these are dense.
inline at::Tensor laid_out_as(const at::Tensor& param, at::Tensor grad) {
  if (has_layout_of(grad, param) || !param.is_non_overlapping_and_dense()) {
    return grad;
  }
  return at::empty_like(param).copy_(grad);
}

// Groups of l2_norm; an empty tensor has none.
inline int64_t groups_of(const at::Tensor& t, bool rows) {
  return t.numel() == 0 ? 0 : rows && t.dim() > 0 ? t.size(0) : 1;
}

}  // namespace fused_reg
