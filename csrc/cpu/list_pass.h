// One pass over a list of CPU tensors: what the operators ask for, by passes over its tasks.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../numbers.h"
#include "../summation.h"
#include "../torch_compat.h"
#include "dispatch.h"
#include "grad_memory.h"
#include "parallel.h"
#include "task_list.h"

namespace fused_reg {

class ListPass : public TaskList {
 public:
  static constexpr bool kTakesStrides = true;

  ListPass(at::TensorList params, const Selection& selection, const NumbersArg& numbers)
      : TaskList(params, selection, numbers) {
    for (int64_t t = 0; t < plan_.tensors() && group_ != Grouping::kNone; ++t) {
      first_long_.push_back(long_groups_);
      long_groups_ += plan_.chunks_per_group(t) > 1 ? plan_.first_group(t + 1) - plan_.first_group(t) : 0;
    }
    const CpuCapability& capability = cpu_capability();
    kernels_ = plan_.elements() <= kSmallList ? capability.small_kernels : capability.kernels;
  }

  // The value shall be float64.
  void want_exact() { is_exact_ = true; }

  // Memory for the gradient of a parameter, not yet written, with its strides where it is dense.
  static at::Tensor empty_grad(const at::Tensor& param) {
    return param.is_non_overlapping_and_dense() ? empty_grad_like(param) : at::empty_like(param);
  }

  static at::Tensor sent(const at::Tensor& host, at::Device) { return host; }

  // The next pass with gradients shall write that of parameter t, or add to it.
  void write_grad(size_t t, const at::Tensor& grad) { set_grad(t, grad, /*add=*/false); }
  void add_grad(size_t t, const at::Tensor& grad) { set_grad(t, grad, /*add=*/true); }

  // The penalty, 0-dim, float64 if any parameter is, else float32; and every gradient that was asked for, times scale.
  at::Tensor run_penalty(const NumberArg& scale) {
    set_passes(number(scale), Pass::kPenaltyGradient, Pass::kPenaltyAccumulate);
    return sum_of(run_sums());
  }

  // The same with l2_norm, and the norm of every group, [groups] float64.
  std::tuple<at::Tensor, at::Tensor> run_group_penalty(const NumberArg& scale) {
    set_passes(number(scale), Pass::kGradient, Pass::kAccumulate);
    Penalties penalties = some_penalties();
    at::Tensor norms = at::empty({plan_.groups()}, at::kDouble);
    run_rounds({{Pass::kPenalty, !adds_.empty(), norms.mutable_data_ptr<double>(), penalties.get()}});
    return {sum_of(penalties), std::move(norms)};
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
    at::Tensor norms = at::empty({plan_.groups()}, at::kDouble);
    run_rounds({{Pass::kSoftSquares, false, norms.mutable_data_ptr<double>(), nullptr}});
    return norms;
  }

  // The proximal operator, in place, on dense(). With groups: the norms of run_soft_norms(), those of parameter t from
  // first_groups[t] on; or without them, what that would give.
  void run_prox(const OptionalTensor& norms, at::IntArrayRef first_groups) {
    for (const auto t : c10::irange(tasks_.size())) {
      tasks_[t] = prox_task(tasks_[t]);
      tasks_[t].streams[0] = dense(t).mutable_data_ptr();
    }
    if (group_ == Grouping::kNone || norms.has_value()) {
      run_with_norms(norms, first_groups);
    } else {
      run_rounds({{Pass::kSoftSquares, true, nullptr, nullptr}});
    }
  }

  // A step of an optimizer on dense() and the streams of the rows, and the penalty before it. Nothing at all where
  // found_inf is not 0: the value has no meaning then.
  at::Tensor run_step(Pass optimizer, const std::vector<StepRow>& rows, const NumberArg& grad_scale,
                      const NumberArg& found_inf) {
    if (number(found_inf) != 0) {
      return value(0);
    }
    const double scale = number(grad_scale);
    takes_across_ = false;
    // With norms the proximal operator follows on the step.
    const bool is_followed = group_ != Grouping::kNone && !rows.empty() && (rows[0].options & kProximal) != 0;
    for (const auto t : c10::irange(tasks_.size())) {
      ChunkTask& task = tasks_[t];
      const StepRow& row = rows[t];
      task.pass = optimizer;
      task.streams[0] = dense(t).mutable_data_ptr();
      for (int s = 1; s < kStreams; ++s) {
        if (row.streams[s] != nullptr) {
          task.streams[s] = row.streams[s]->mutable_data_ptr();
          place(t, s, *row.streams[s]);
        }
      }
      task.numbers.factor = 1;
      task.numbers.terms = is_followed ? kNone : terms_of(task.numbers.of);
      task.numbers.options = row.options;
      std::copy(row.rates, row.rates + kRates, task.numbers.step);
      task.numbers.step[kCount] = row.count == nullptr ? 0 : counted(*row.count);
      task.numbers.step[kGradScale] = scale;
    }
    if (group_ == Grouping::kNone) {
      return sum_of(run_sums());
    }
    Penalties penalties = some_penalties();
    std::vector<Round> rounds{{Pass::kPenalty, true, nullptr, penalties.get()}};
    if (is_followed) {
      rounds.push_back({Pass::kSoftSquares, true, nullptr, nullptr});
    }
    run_rounds(rounds);
    return sum_of(penalties);
  }

  // [tensors, kSums] float64: the sums of L1 and L2, and those of further terms that are there.
  at::Tensor run_term_sums() {
    for (ChunkTask& task : tasks_) {
      task.numbers.terms = kL1L2 | (terms_of(task.numbers.of) & kFurther);
    }
    const std::vector<ChunkSums> sums = chunk_sums();
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
    for (ChunkTask& task : tasks_) {
      task.pass = Pass::kZeros;
    }
    const std::vector<ChunkSums> counts = chunk_sums();
    at::Tensor out = at::empty({plan_.tensors()}, at::kDouble);
    for (const auto t : c10::irange(plan_.tensors())) {
      out.mutable_data_ptr<double>()[t] = tensor_sum(t, [&](int64_t c) { return counts[c].of[1].sum; });
    }
    return out;
  }

 private:
  // The penalty of every chunk, and behind them what the norm of each group of several chunks adds.
  using Penalties = std::unique_ptr<double[]>;

  // Of the passes over a list with norms: sums, from which the norms come, and then what is written with these.
  struct Round {
    Pass sums;          // kPenalty or kSoftSquares
    bool writes;        // the pass of the task, or the proximal operator
    double* norms;      // of every group; null: not asked for
    double* penalties;  // as Penalties; null: not asked for
  };

  static ChunkTask prox_task(ChunkTask task) {
    task.pass = Pass::kProx;
    task.numbers.terms = terms_of(task.numbers.of);
    return task;
  }

  // Where the threshold is 0, soft(w) is w.
  static ChunkTask sums_task(ChunkTask task, Pass sums) {
    task.pass = task.numbers.of[kStep] * task.numbers.of[kL1Strength] == 0 ? Pass::kPenalty : sums;
    task.numbers.terms = kL2 | (sums == Pass::kPenalty ? terms_of(task.numbers.of) : kNone);
    return task;
  }

  void write(ChunkTask task, Pass sums) const {
    if (sums == Pass::kSoftSquares) {
      task = prox_task(task);
    }
    if (task.pass != Pass::kPenalty) {
      kernels_->run(task, nullptr);
    }
  }

  // A pass that writes, where there is something to be written.
  void run_with_norms(const OptionalTensor& norms, at::IntArrayRef first_groups) {
    if (group_ == Grouping::kNone) {
      for_each_run([&](const ChunkTask& task) { write(task, Pass::kPenalty); });
      return;
    }
    const double* const all = norms->const_data_ptr<double>();
    for_each_task(plan_, own_streams(), [&](const Visit& visit, ChunkTask& task) {
      const int64_t t = visit.first.tensor;
      set_norms(task, t, all + first_groups[t] + visit.first.group - plan_.first_group(t));
      write(task, Pass::kPenalty);
    });
  }

  // The norms of the groups of a visit.
  void set_norms(ChunkTask& task, int64_t t, const double* norms) const {
    task.numbers.norm = *norms;
    task.norms = plan_.chunks_per_group(t) == 1 || task.apart[0] != 0 ? norms : nullptr;
  }

  // The sums of the chunks of a visit of tensor t, the first of which is of_first.
  void take_sums(const ChunkTask& task, int64_t t, ChunkSums* of_first) const {
    const int64_t next = task.apart[0] != 0 ? plan_.chunks_per_group(t) : 1;
    TaskSums found;
    kernels_->run(task, &found);
    for (int64_t i = 0; i * task.chunk_size < task.size; ++i) {
      of_first[i * next] = found.of(i);
    }
  }

  // Groups that are visited whole go through all the rounds at once; of others a pass takes the sums, which ends the
  // pass that writes in the round before.
  void run_rounds(const std::vector<Round>& rounds) {
    std::vector<int64_t> sizes, groups;
    for (const auto t : c10::irange(plan_.tensors())) {
      sizes.push_back(plan_.visits_groups(t) ? 0 : tasks_[t].size);
      groups.push_back(plan_.visits_groups(t) ? 0 : plan_.first_group(t + 1) - plan_.first_group(t));
    }
    ChunkPlan large(sizes, groups);
    large.set_strips_as(plan_);
    std::vector<ChunkSums> sums(large.chunks());
    std::vector<double> norms(large.groups());
    const auto writes = [&](size_t r) { return r > 0 && rounds[r - 1].writes; };
    const auto visit_large = [&](size_t r, int64_t t, int64_t c, int64_t group, ChunkTask& task) {
      if (writes(r)) {
        set_norms(task, t, &norms[group]);
        write(task, rounds[r - 1].sums);
      }
      if (r < rounds.size()) {
        take_sums(sums_task(task, rounds[r].sums), t, &sums[c]);
      }
    };
    const bool any_writes = std::any_of(rounds.begin(), rounds.end(), [](const Round& round) { return round.writes; });
    const auto first_use = [&](int64_t t) {
      return any_writes && plan_.visits_groups(t) ? streams_used(tasks_[t].pass) : kReadsOnly;
    };
    for_each_task(plan_, first_use, [&](const Visit& visit, ChunkTask& task) {
      const int64_t t = visit.first.tensor;
      if (plan_.visits_groups(t)) {
        visit_groups(rounds, visit, task);
      } else {
        visit_large(0, t, visit.number - plan_.first_chunk(t) + large.first_chunk(t),
                    visit.first.group - plan_.first_group(t) + large.first_group(t), task);
      }
    });
    for (size_t r = 1; r <= rounds.size() && large.chunks() > 0; ++r) {
      for (const auto t : c10::irange(plan_.tensors())) {
        const int64_t first = large.first_group(t), count = large.chunks_per_group(t);
        for (int64_t g = first; g < large.first_group(t + 1); ++g) {
          const int64_t chunk = (g - first) * count;
          norms[g] = finish(rounds[r - 1], t, plan_.first_group(t) + g - first, plan_.first_chunk(t) + chunk,
                            &sums[large.first_chunk(t) + chunk]);
        }
      }
      if (writes(r) || r < rounds.size()) {
        const bool is_prox = rounds[r - 1].sums == Pass::kSoftSquares;
        const auto use = [&](int64_t t) {
          return writes(r) ? streams_used(is_prox ? Pass::kProx : tasks_[t].pass) : kReadsOnly;
        };
        for_each_task(large, use, [&](const Visit& visit, ChunkTask& task) {
          visit_large(r, visit.first.tensor, visit.number, visit.first.group, task);
        });
      }
    }
  }

  void visit_groups(const std::vector<Round>& rounds, const Visit& visit, ChunkTask& task) const {
    const int64_t t = visit.first.tensor, per_group = plan_.chunks_per_group(t);
    double of_groups[kMaxVisit];
    for (const Round& round : rounds) {
      const ChunkTask sums_of = sums_task(task, round.sums);
      double* const norms = round.norms == nullptr ? of_groups : round.norms + visit.first.group;
      if (per_group == 1) {
        TaskSums sums;
        kernels_->run(sums_of, &sums);
        kernels_->finish(tasks_[t].numbers.of, visit.chunks, sums, norms,
                         round.penalties == nullptr ? nullptr : round.penalties + visit.number);
      } else {
        ChunkSums sums[kVisitedGroup / kChunkSize];
        take_sums(sums_of, t, sums);
        *norms = finish(round, t, visit.first.group, visit.number, sums);
      }
      if (round.writes) {
        set_norms(task, t, norms);
        task.ahead = visit.size;
        write(task, round.sums);
      }
    }
  }

  // The norm of group g of tensor t, of the sums of its chunks, several, the first of which is c.
  double finish(const Round& round, int64_t t, int64_t g, int64_t c, const ChunkSums* sums) const {
    const int64_t count = plan_.chunks_per_group(t);
    const ScaledSum squares = squares_of(sums, count);
    const double norm = norm_of(squares);
    if (round.norms != nullptr) {
      round.norms[g] = norm;
    }
    if (round.penalties != nullptr) {
      const double* const numbers = tasks_[t].numbers.of;
      for (const auto i : c10::irange(count)) {
        round.penalties[c + i] = SummedTerms::penalty(numbers, sums[i].of);
      }
      round.penalties[plan_.chunks() + first_long_[t] + g - plan_.first_group(t)] =
          norm_penalty(numbers[kNormStrength], squares);
    }
    return norm;
  }

  // A pass that sums: the penalty of every chunk.
  Penalties run_sums() {
    Penalties penalties = some_penalties();
    for_each_task(plan_, own_streams(), [&](const Visit& visit, const ChunkTask& task) {
      TaskSums sums;
      kernels_->run(task, &sums);
      penalties[visit.number] = SummedTerms::penalty(task.numbers.of, sums.of(0).of);
    });
    return penalties;
  }

  // A pass that sums: the sums of every chunk.
  std::vector<ChunkSums> chunk_sums() {
    std::vector<ChunkSums> sums(plan_.chunks());
    const auto use = [](int64_t) { return kReadsOnly; };
    for_each_task(plan_, use, [&](const Visit& visit, const ChunkTask& task) {
      take_sums(task, visit.first.tensor, &sums[visit.number]);
    });
    return sums;
  }

  // Not yet written.
  Penalties some_penalties() const { return Penalties(new double[plan_.chunks() + long_groups_]); }

  // run_length(chunks) chunks a run; one is its own sum.
  at::Tensor sum_of(const Penalties& penalties) const {
    const int64_t chunks = plan_.chunks(), length = run_length(chunks);
    if (length == 1) {
      return value(kernels_->sum_columns(penalties.get(), chunks + long_groups_));
    }
    const int64_t whole = chunks / length, runs = whole + (chunks % length != 0);
    std::vector<double> sums(runs + long_groups_);
    in_parallel(whole, kGrainSize / length + 1, [&](int64_t begin, int64_t end) {
      kernels_->sum_runs(penalties.get() + begin * length, length, end - begin, sums.data() + begin);
    });
    kernels_->sum_runs(penalties.get() + whole * length, chunks % length, runs - whole, sums.data() + whole);
    std::copy_n(penalties.get() + chunks, long_groups_, sums.data() + runs);
    return value(kernels_->sum_columns(sums.data(), runs + long_groups_));
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
    check_grad(t, grad, dense(t), /*any_strides=*/true);
    tasks_[t].streams[1] = grad.mutable_data_ptr();
    place(t, 1, grad);
    adds_.resize(tasks_.size());
    adds_[t] = add;
  }

  void set_passes(double factor, Pass write, Pass add) {
    for (const auto t : c10::irange(tasks_.size())) {
      ChunkTask& task = tasks_[t];
      task.numbers.terms = terms_of(task.numbers.of);
      task.pass = adds_.empty() || task.streams[1] == nullptr ? Pass::kPenalty : adds_[t] ? add : write;
      task.numbers.factor = factor;
    }
  }

  static double number(const NumberArg& arg) { return arg.tensor.has_value() ? arg.tensor->item<double>() : arg.value; }

  bool is_exact_ = false;
  std::vector<bool> adds_;           // per tensor, where gradients are asked for
  std::vector<int64_t> first_long_;  // [tensors], among the groups of several chunks
  int64_t long_groups_ = 0;
  const Kernels* kernels_;
};

}  // namespace fused_reg
