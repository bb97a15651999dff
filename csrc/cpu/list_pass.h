// One pass over a list of CPU tensors: a task a tensor, cut into the chunks of the plan, in one parallel region.
#pragma once

#include <algorithm>
#include <list>
#include <vector>

#include "../checks.h"
#include "../chunks.h"
#include "../layout.h"
#include "../numbers.h"
#include "../summation.h"
#include "../torch_compat.h"
#include "dispatch.h"
#include "grad_memory.h"
#include "parallel.h"

namespace fused_reg {

class ListPass {
 public:
  // The parameters outlive it: to hold them takes as long as the pass over short ones.
  ListPass(at::TensorList params, const Selection& selection, const NumbersArg& numbers)
      : params_(params), group_(numbers.group), has_further_(numbers.has_further()) {
    check_list(params, numbers);
    std::array<HostColumn, kNumbers> columns;
    const int used = has_further_ ? int{kNumbers} : kGroupNumbers;
    for (const auto c : c10::irange(used)) {
      columns[c] = HostColumn(numbers.columns[c], selection);
    }
    dense_.reserve(params.size());
    tasks_.reserve(params.size());
    std::vector<int64_t> sizes, groups;
    sizes.reserve(params.size());
    groups.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      check_memory(t, params[t]);
      dense_.push_back(is_run(params[t], group_) ? &params[t] : &copies_.emplace_back(as_run(params[t], group_)));
      ChunkTask& task = tasks_.emplace_back();
      task.dtype = dtype_of(dense(t));
      task.streams[0] = const_cast<void*>(dense(t).const_data_ptr());
      for (const auto c : c10::irange(used)) {
        task.numbers.of[c] = columns[c][t];
      }
      task.numbers.terms = AllTerms::present(task.numbers.of);
      task.size = dense(t).numel();
      sizes.push_back(task.size);
      groups.push_back(group_ == Grouping::kNone ? 1 : groups_of(params[t], group_));
    }
    plan_ = ChunkPlan(sizes, groups);
    const CpuCapability& capability = cpu_capability();
    kernel_ = plan_.elements() <= kSmallList ? capability.small_kernel : capability.kernel;
  }

  Grouping group() const { return group_; }

  // The value shall be float64.
  void want_exact() { is_exact_ = true; }

  // Parameter t as one run of memory: itself, or a copy.
  const at::Tensor& dense(size_t t) const { return *dense_[t]; }

  // Memory for the gradient of a parameter, not yet written, with its strides where it is dense.
  static at::Tensor empty_grad(const at::Tensor& param) {
    return param.is_non_overlapping_and_dense() ? empty_grad_like(param) : at::empty_like(param);
  }

  // The next pass with gradients shall write that of parameter t, or add to it. The layout is that of dense(t).
  void write_grad(size_t t, const at::Tensor& grad) { set_grad(t, grad, /*add=*/false); }
  void add_grad(size_t t, const at::Tensor& grad) { set_grad(t, grad, /*add=*/true); }

  // The penalty, 0-dim, float64 if any parameter is, else float32; and every gradient that was asked for, times scale.
  at::Tensor run_penalty(const NumberArg& scale) {
    set_passes(number(scale), Pass::kPenaltyGradient, Pass::kPenaltyAccumulate);
    return value(penalty_of(run_sums()));
  }

  // The penalty with l2_norm, and the norm of every group, [groups] float64.
  std::tuple<at::Tensor, at::Tensor> run_group_penalty() {
    for (ChunkTask& task : tasks_) {
      task.pass = Pass::kPenalty;
      task.numbers.terms |= kL2;
    }
    const std::vector<ChunkSums> sums = run_sums();
    std::vector<double> penalties(plan_.groups());
    at::Tensor norms = norms_of(sums, [&](int64_t t, int64_t g, const ScaledSum& squares) {
      penalties[g] = norm_penalty(tasks_[t].numbers.of[kNormStrength], squares);
    });
    const auto chunk_penalty = [&](int64_t c, size_t t) {
      const bool is_group = plan_.chunks_per_group(t) == 1;
      return SummedTerms::penalty(tasks_[t].numbers.of, sums[c].of) +
             (is_group ? penalties[plan_.first_group(t) + c - plan_.first_chunk(t)] : 0);
    };
    std::vector<int64_t> large;  // groups of several chunks
    for (const auto t : c10::irange(plan_.tensors())) {
      for (int64_t g = plan_.first_group(t); plan_.chunks_per_group(t) > 1 && g < plan_.first_group(t + 1); ++g) {
        large.push_back(g);
      }
    }
    const int64_t runs = this->runs();
    size_t t = 0;
    const double total = column_sum<kColumns>(runs + static_cast<int64_t>(large.size()), [&](int64_t i) {
      return i < runs ? run_sum(i, &t, chunk_penalty) : penalties[large[i - runs]];
    });
    return {value(total), std::move(norms)};
  }

  // The gradients that were asked for, for this upstream gradient; the norms of run_group_penalty() where there are
  // any, those of parameter t from first_group[t] on.
  // keep_if_one: the gradients are there already for 1.
  void run_gradient(const NumberArg& upstream, const OptionalTensor& norms, at::IntArrayRef first_groups,
                    bool keep_if_one) {
    const double factor = number(upstream);
    if (keep_if_one && factor == 1) {
      return;
    }
    set_passes(factor, Pass::kGradient, Pass::kAccumulate);
    run_with_norms(norms, first_groups);
  }

  // The norm of every group after the soft threshold, [groups] float64.
  at::Tensor run_soft_norms() {
    set_pass(Pass::kSoftSquares);
    return norms_of(run_sums(), [](int64_t, int64_t, auto&) {});
  }

  // The proximal operator, in place, on dense(); the norms of run_soft_norms() where there are any, those of parameter
  // t from first_groups[t] on.
  void run_prox(const OptionalTensor& norms, at::IntArrayRef first_groups) {
    set_pass(Pass::kProx);
    for (const auto t : c10::irange(tasks_.size())) {
      tasks_[t].numbers.terms = AllTerms::present(tasks_[t].numbers.of);
      tasks_[t].streams[0] = dense(t).mutable_data_ptr();
    }
    run_with_norms(norms, first_groups);
  }

  // A step of an optimizer on dense() and the streams of the rows, and the penalty before it. With norms, those of
  // run_group_penalty(), which gave that; a proximal step does not use them, and is without its proximal operator.
  // Nothing at all where found_inf is not 0: the value has no meaning then.
  at::Tensor run_step(Pass optimizer, const std::vector<StepRow>& rows, const NumberArg& grad_scale,
                      const NumberArg& found_inf, const OptionalTensor& norms, at::IntArrayRef first_groups) {
    if (number(found_inf) != 0) {
      return value(0);
    }
    const double scale = number(grad_scale);
    for (const auto t : c10::irange(tasks_.size())) {
      ChunkTask& task = tasks_[t];
      const StepRow& row = rows[t];
      task.pass = optimizer;
      task.streams[0] = dense(t).mutable_data_ptr();
      for (int s = 1; s < kStreams; ++s) {
        task.streams[s] = row.streams[s] == nullptr ? nullptr : row.streams[s]->mutable_data_ptr();
      }
      task.numbers.factor = 1;
      const bool is_alone = norms.has_value() && (row.options & kProximal) != 0;
      task.numbers.terms = is_alone ? kNone : AllTerms::present(task.numbers.of);
      task.numbers.options = row.options;
      std::copy(row.rates, row.rates + kRates, task.numbers.step);
      task.numbers.step[kCount] = row.count == nullptr ? 0 : counted(*row.count);
      task.numbers.step[kGradScale] = scale;
    }
    if (!norms.has_value()) {
      return value(penalty_of(run_sums()));
    }
    run_with_norms(norms, first_groups);
    return {};
  }

  // [tensors, kSums] float64: the sum of each term; of further ones 0, where the list has none of their numbers.
  at::Tensor run_term_sums() {
    for (ChunkTask& task : tasks_) {
      task.numbers.terms = kL1L2 | (has_further_ ? kFurther : kNone);
    }
    const std::vector<ChunkSums> sums = run_sums();
    at::Tensor out = at::empty({plan_.tensors(), kSums}, at::kDouble);
    double* next = out.mutable_data_ptr<double>();
    for (const auto t : c10::irange(plan_.tensors())) {
      for (const auto i : c10::irange(kSums)) {
        *next++ = tensor_sum(t, [&](int64_t c) { return unscaled(sums[c]).of[i]; });
      }
    }
    return out;
  }

  // [tensors] float64: how many elements are 0.
  at::Tensor run_zero_counts() {
    set_pass(Pass::kZeros);
    const std::vector<ChunkSums> counts = run_sums();
    at::Tensor out = at::empty({plan_.tensors()}, at::kDouble);
    for (const auto t : c10::irange(plan_.tensors())) {
      out.mutable_data_ptr<double>()[t] = tensor_sum(t, [&](int64_t c) { return counts[c].of[1].sum; });
    }
    return out;
  }

 private:
  // body(c, chunk, task) for every chunk c, its task cut to it.
  template <class Body>
  void run(const Body& body) {
    for_each_chunk(plan_, [&](int64_t c, const Chunk& chunk) {
      ChunkTask task = tasks_[chunk.tensor];
      const int64_t offset = chunk.begin * static_cast<int64_t>(dense(chunk.tensor).element_size());
      task.streams[0] = static_cast<char*>(task.streams[0]) + offset;
      for (int s = 1; s < kStreams; ++s) {
        if (task.streams[s] != nullptr) {
          task.streams[s] = static_cast<char*>(task.streams[s]) + offset;
        }
      }
      task.size = chunk.size;
      body(c, chunk, task);
    });
  }

  // A pass that writes, where there is something to be written.
  void run_with_norms(const OptionalTensor& norms, at::IntArrayRef first_groups) {
    const double* const all = group_ == Grouping::kNone ? nullptr : norms->const_data_ptr<double>();
    run([&](int64_t, const Chunk& chunk, ChunkTask& task) {
      if (task.pass == Pass::kPenalty) {
        return;
      }
      if (all != nullptr) {
        task.numbers.norm = all[first_groups[chunk.tensor] + chunk.group - plan_.first_group(chunk.tensor)];
      }
      kernel_(task);
    });
  }

  // A pass that sums: the sums of every chunk.
  std::vector<ChunkSums> run_sums() {
    std::vector<ChunkSums> sums(plan_.chunks());
    run([&](int64_t c, const Chunk&, const ChunkTask& task) { sums[c] = kernel_(task); });
    return sums;
  }

  double penalty_of(const std::vector<ChunkSums>& sums) const {
    const auto chunk_penalty = [&](int64_t c, size_t t) {
      return SummedTerms::penalty(tasks_[t].numbers.of, sums[c].of);
    };
    size_t t = 0;
    return column_sum<kColumns>(runs(), [&](int64_t r) { return run_sum(r, &t, chunk_penalty); });
  }

  // The norm of every group, [groups] float64; each(t, g, squares) is told the sum of squares of group g of tensor t.
  template <class Each>
  at::Tensor norms_of(const std::vector<ChunkSums>& sums, const Each& each) const {
    at::Tensor norms = at::empty({plan_.groups()}, at::kDouble);
    double* const all = norms.mutable_data_ptr<double>();
    for (const auto t : c10::irange(plan_.tensors())) {
      const int64_t count = plan_.chunks_per_group(t);
      const ChunkSums* of_group = sums.data() + plan_.first_chunk(t);
      for (int64_t g = plan_.first_group(t); g < plan_.first_group(t + 1); ++g, of_group += count) {
        const ScaledSum squares = squares_of(of_group, count);
        all[g] = norm_of(squares);
        each(t, g, squares);
      }
    }
    return norms;
  }

  // run_length(chunks) chunks a run.
  int64_t runs() const {
    const int64_t length = run_length(plan_.chunks());
    return (plan_.chunks() + length - 1) / length;
  }

  // The sum of run r; t is the tensor of the last chunk of the runs before it.
  template <class ChunkPenalty>
  double run_sum(int64_t r, size_t* t, const ChunkPenalty& chunk_penalty) const {
    const int64_t length = run_length(plan_.chunks());
    CompensatedSum sum{};
    for (int64_t c = r * length; c < std::min((r + 1) * length, plan_.chunks()); ++c) {
      while (c >= plan_.first_chunk(*t + 1)) {
        ++*t;
      }
      sum.add(chunk_penalty(c, *t));
    }
    return result(sum);
  }

  template <class Value>
  double tensor_sum(int64_t t, const Value& value) const {
    const int64_t first = plan_.first_chunk(t);
    return column_sum<kTensorColumns>(plan_.first_chunk(t + 1) - first, [&](int64_t c) { return value(first + c); });
  }

  at::Tensor value(double total) const {
    const at::ScalarType dtype = is_exact_ ? at::kDouble : value_dtype(params_);
    // at::scalar_tensor would take two trips through the dispatcher, a tenth of a small call.
    at::Tensor value = at::detail::empty_cpu({}, dtype);
    if (dtype == at::kDouble) {
      *value.mutable_data_ptr<double>() = total;
    } else {
      *value.mutable_data_ptr<float>() = static_cast<float>(total);
    }
    return value;
  }

  void set_grad(size_t t, const at::Tensor& grad, bool add) {
    check_grad(t, grad, dense(t));
    tasks_[t].streams[1] = grad.mutable_data_ptr();
    adds_.resize(tasks_.size());
    adds_[t] = add;
  }

  void set_pass(Pass pass) {
    for (ChunkTask& task : tasks_) {
      task.pass = pass;
    }
  }

  void set_passes(double factor, Pass write, Pass add) {
    for (const auto t : c10::irange(tasks_.size())) {
      ChunkTask& task = tasks_[t];
      task.numbers.terms = AllTerms::present(task.numbers.of);
      task.pass = adds_.empty() || task.streams[1] == nullptr ? Pass::kPenalty : adds_[t] ? add : write;
      task.numbers.factor = factor;
    }
  }

  static double number(const NumberArg& arg) { return arg.tensor.has_value() ? arg.tensor->item<double>() : arg.value; }

  at::TensorList params_;
  Grouping group_;
  bool has_further_;
  bool is_exact_ = false;
  std::vector<const at::Tensor*> dense_;
  std::list<at::Tensor> copies_;
  std::vector<ChunkTask> tasks_;
  std::vector<bool> adds_;  // per tensor, where gradients are asked for
  ChunkPlan plan_;
  ChunkKernel kernel_;
};

}  // namespace fused_reg
