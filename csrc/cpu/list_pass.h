// One pass over a list of CPU tensors: a task a tensor, cut into the chunks of the plan, in one parallel region.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "../chunks.h"
#include "../strengths.h"
#include "../summation.h"
#include "dispatch.h"
#include "grad_memory.h"
#include "parallel.h"

namespace fused_reg {

class ListPass {
 public:
  // Until write_grad() says otherwise, the pass only sums.
  ListPass(at::TensorList params, Strengths strengths) : strengths_(std::move(strengths)) {
    dense_.reserve(params.size());
    tasks_.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      check_memory(t, params[t]);
      // One run of memory, its elements in any order: the parameter itself if it is dense, else a copy.
      dense_.push_back(params[t].is_non_overlapping_and_dense() ? params[t] : params[t].clone());
      ChunkTask task{};
      task.dtype = dtype_of(dense_[t]);
      task.terms = terms_of(strengths_.l1[t], strengths_.l2[t]);
      task.param = dense_[t].const_data_ptr();
      task.size = dense_[t].numel();
      tasks_.push_back(task);
      tasks_[t].l1_scale = scaled_l1(t).scale;
      tasks_[t].l2_scale = scaled_l2(t).scale;
    }
  }

  // Memory for the gradient of parameter t, not yet written, with the strides of the parameter.
  at::Tensor fresh_grad(size_t t) const { return empty_grad_like(dense_[t]); }

  // The pass shall write the gradient of parameter t for this upstream gradient. The layout is fresh_grad's.
  void write_grad(size_t t, const at::Tensor& grad, double upstream, Pass pass) {
    check_grad(t, grad, dense_[t]);
    ChunkTask& task = tasks_[t];
    task.pass = pass;
    task.grad = grad.mutable_data_ptr();
    const auto factor = [&](double strength) -> double {
      return is_float64(t) ? gradient_factor<double>(upstream, strength) : gradient_factor<float>(upstream, strength);
    };
    task.c1 = factor(strengths_.l1[t]);
    task.c2 = factor(strengths_.l2[t]);
  }

  // Does the work.
  void run() {
    std::vector<int64_t> sizes;
    sizes.reserve(tasks_.size());
    for (const ChunkTask& task : tasks_) {
      sizes.push_back(task.size);
    }
    plan_ = ChunkPlan(sizes);
    const ChunkKernel kernel = cpu_capability().kernel;
    chunk_sums_.resize(plan_.chunks());
    for_each_chunk(plan_, [&](int64_t c) {
      const Chunk chunk = plan_.chunk(c);
      ChunkTask task = tasks_[chunk.tensor];
      const int64_t offset = chunk.begin * static_cast<int64_t>(dense_[chunk.tensor].element_size());
      task.param = static_cast<const char*>(task.param) + offset;
      task.grad = static_cast<char*>(task.grad) + (task.pass == Pass::kSums ? 0 : offset);
      task.size = chunk.size;
      chunk_sums_[c] = kernel(task);
    });
  }

  // After run(): the sums of |w| and of w^2 of parameter t (of strengths that need no scale).
  ChunkSums term_sums(size_t t) const {
    const ChunkSums* const sums = chunk_sums_.data() + plan_.first_chunk(t);
    const int64_t count = plan_.first_chunk(t + 1) - plan_.first_chunk(t);
    return {column_sum<kTensorColumns>(count, [&](int64_t c) { return sums[c].l1; }),
            column_sum<kTensorColumns>(count, [&](int64_t c) { return sums[c].l2; })};
  }

  // After run(): the penalty, 0-dim, float64 if any parameter is, else float32.
  at::Tensor penalty() const {
    const double total = total_penalty();
    const bool any_float64 =
        std::any_of(tasks_.begin(), tasks_.end(), [](const ChunkTask& task) { return task.dtype == Dtype::kFloat64; });
    // at::scalar_tensor would take two trips through the dispatcher, a tenth of a small call.
    at::Tensor value = at::detail::empty_cpu({}, any_float64 ? at::kDouble : at::kFloat);
    if (any_float64) {
      *value.mutable_data_ptr<double>() = total;
    } else {
      *value.mutable_data_ptr<float>() = static_cast<float>(total);
    }
    return value;
  }

 private:
  double total_penalty() const {
    const int64_t group = group_size(plan_.chunks());
    size_t t = 0;
    ScaledStrength l1{}, l2{};
    const auto chunk_penalty = [&](int64_t c) {
      if (c == 0 || c >= plan_.first_chunk(t + 1)) {  // the next tensor that is not empty
        while (c >= plan_.first_chunk(t + 1)) {
          ++t;
        }
        l1 = scaled_l1(t);
        l2 = scaled_l2(t);
      }
      return penalty_of_sums(tasks_[t].terms, l1.factor, chunk_sums_[c].l1, l2.factor, chunk_sums_[c].l2);
    };
    return column_sum<kColumns>((plan_.chunks() + group - 1) / group, [&](int64_t g) {
      CompensatedSum sum{};
      for (int64_t c = g * group; c < std::min((g + 1) * group, plan_.chunks()); ++c) {
        sum.add(chunk_penalty(c));
      }
      return result(sum);
    });
  }

  bool is_float64(size_t t) const { return tasks_[t].dtype == Dtype::kFloat64; }

  ScaledStrength scaled_l1(size_t t) const { return scaled_strength(strengths_.l1[t], kL1, is_float64(t)); }
  ScaledStrength scaled_l2(size_t t) const { return scaled_strength(strengths_.l2[t], kL2, is_float64(t)); }

  Strengths strengths_;
  std::vector<at::Tensor> dense_;
  std::vector<ChunkTask> tasks_;
  ChunkPlan plan_;
  std::vector<ChunkSums> chunk_sums_;
};

}  // namespace fused_reg
