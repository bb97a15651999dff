// How the operators see a tensor's memory: as one run of elements, in any order.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "torch_compat.h"

namespace fused_reg {

// What l2_norm takes the norms of: nothing; whole tensors; the slices of each along a dimension, 0 (rows) or 1; runs of
// elements. The last three also by several in a row: kRow + 8 * (n - 1) are n rows.
enum class Grouping : int64_t { kNone, kTensor, kRow, kColumn, kBlock };
constexpr int64_t kGroupings = 8;

inline Grouping kind_of(Grouping group) { return static_cast<Grouping>(static_cast<int64_t>(group) % kGroupings); }

// How many slices, or elements, a group has.
inline int64_t group_length(Grouping group) { return static_cast<int64_t>(group) / kGroupings + 1; }

// The dimension whose indices, or runs of these, are groups; -1 where there is none.
inline int64_t sliced_dim(const at::Tensor& t, Grouping group) {
  const int64_t d = static_cast<int64_t>(kind_of(group)) - static_cast<int64_t>(Grouping::kRow);
  return d < std::min<int64_t>(t.dim(), 2) ? std::max<int64_t>(d, -1) : -1;
}

// The groups of a tensor; an empty one has none.
inline int64_t groups_of(const at::Tensor& t, Grouping group) {
  const int64_t d = sliced_dim(t, group);
  if (t.numel() == 0 || group == Grouping::kNone) {
    return 0;
  }
  if (d < 0 && kind_of(group) != Grouping::kBlock) {
    return 1;
  }
  const int64_t size = d < 0 ? t.numel() : t.size(d), length = group_length(group);
  TORCH_CHECK_VALUE(size % length == 0, "groups of ", length, " must fill what they divide, got ", size);
  return size / length;
}

// Each group of a dense tensor is a run of memory, and the groups follow on one another.
inline bool has_groups_in_runs(const at::Tensor& dense, Grouping group) {
  if (kind_of(group) == Grouping::kBlock) {
    return dense.is_contiguous();
  }
  const int64_t d = sliced_dim(dense, group);
  return d < 0 || dense.size(d) <= 1 || dense.numel() == 0 || dense.stride(d) == dense.numel() / dense.size(d);
}

// Whether it is one run of memory, group after group.
inline bool is_run(const at::Tensor& t, Grouping group) {
  return t.is_non_overlapping_and_dense() && has_groups_in_runs(t, group);
}

// One like it that is. Elements keep the order of memory where that allows it.
inline at::Tensor empty_run(const at::Tensor& t, Grouping group) {
  const int64_t d = sliced_dim(t, group);
  if (kind_of(group) == Grouping::kBlock) {
    return at::empty_like(t, at::MemoryFormat::Contiguous);
  }
  return d < 0 || is_run(t, group) ? at::empty_like(t)
                                   : at::empty_like(t.movedim(d, 0), at::MemoryFormat::Contiguous).movedim(0, d);
}

// The tensor itself if it is one; else a copy that is.
inline at::Tensor as_run(const at::Tensor& t, Grouping group) {
  return is_run(t, group) ? t : empty_run(t, group).copy_(t);
}

// The dimensions of empty_run(t), the slowest first.
inline std::vector<int64_t> run_order(const at::Tensor& t, Grouping group) {
  const int64_t d = sliced_dim(t, group);
  std::vector<int64_t> order(t.dim());
  std::iota(order.begin(), order.end(), 0);
  if (kind_of(group) == Grouping::kBlock) {
    return order;
  }
  if (d < 0 || is_run(t, group)) {
    const std::vector<int64_t> strides = at::infer_dense_strides(t.sizes(), t.strides());
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  } else {
    std::rotate(order.begin(), order.begin() + d, order.begin() + d + 1);
  }
  return order;
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

// A gradient with the strides of its parameter, or where these are not dense, those of empty_like().
inline at::Tensor laid_out_as(const at::Tensor& param, at::Tensor grad) {
  if (has_layout_of(grad, param)) {
    return grad;
  }
  const at::Tensor like = at::empty_like(param);
  return has_layout_of(grad, like) ? grad : like.copy_(grad);
}

}  // namespace fused_reg
