// One pass over a list of CUDA tensors: its table, and the launches.
#pragma once

#include <array>
#include <cstring>
#include <list>
#include <vector>

#include "../checks.h"
#include "../chunks.h"
#include "../layout.h"
#include "../numbers.h"
#include "check_launch.h"
#include "kernels.h"
#include "number_refs.h"
#include "stream_state.h"
#include "torch_compat.h"

namespace fused_reg::cuda {

// As the CPU's ListPass (cpu/list_pass.h), with the same bits; the parameters outlive it, too. No number on the device
// is read by the host.
class ListPass {
 public:
  static constexpr bool kTakesStrides = false;

  ListPass(at::TensorList params, const Selection& selection, const NumbersArg& numbers)
      : device_((check_list(params, numbers), params[0].device())),
        guard_(device_),
        launch_(next_launch()),
        group_(numbers.group),
        value_dtype_(value_dtype(params)),
        is_relative_(numbers.is_relative()) {
    check_relative(params, selection, numbers);
    for (const auto c : c10::irange(static_cast<int>(kNumbers))) {
      columns_[c] = ColumnRefs(numbers.columns[c], selection, device_);
    }
    dense_.reserve(params.size());
    std::vector<int64_t> sizes, groups;
    sizes.reserve(params.size());
    groups.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      check_memory(t, params[t]);
      dense_.push_back(is_run(params[t], group_) ? &params[t] : &copies_.emplace_back(as_run(params[t], group_)));
      sizes.push_back(dense(t).numel());
      groups.push_back(group_ == Grouping::kNone ? 1 : groups_of(params[t], group_));
    }
    plan_ = ChunkPlan(sizes, groups);
    TORCH_CHECK_VALUE(plan_.chunks() < int64_t{1} << 31, "params must have less than 2^31 chunks of elements in all");
    entries_.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      const int64_t before_last = std::max<int64_t>(plan_.chunks_per_group(t) - 1, 0);
      Entry e{};
      e.first_chunk = static_cast<uint32_t>(plan_.first_chunk(t));
      e.tail = static_cast<uint16_t>(plan_.group_size(t) - before_last * kChunkSize);
      e.dtype = dtype_of(dense(t));
      entries_.push_back(e);
      streams_.push_back({const_cast<void*>(dense(t).const_data_ptr())});
      set_relative(t, kToward, numbers.toward, selection);
      set_relative(t, kImportance, numbers.importance, selection);
    }
    call_.tensors = static_cast<uint32_t>(params.size());
    call_.chunks = static_cast<uint32_t>(plan_.chunks());
    call_.run_length = static_cast<uint32_t>(run_length(plan_.chunks()));
    call_.runs = (call_.chunks + call_.run_length - 1) / call_.run_length;
    // A warp alone keeps less memory busy than a CTA, and a CTA has nothing to do for some of its warps in short
    // chunks.
    call_.team = plan_.elements() < plan_.chunks() * (kChunkSize / 2) ? 1 : kWarps;
    call_.factor.value = 1;
    call_.factor_source = Source::kValue;
    call_.has_further = numbers.has_further() || is_relative_;  // such a table has all numbers
  }

  Grouping group() const { return group_; }

  // The value shall be float64.
  void want_exact() { value_dtype_ = at::kDouble; }

  // Parameter t as one run of memory: itself, or a copy.
  const at::Tensor& dense(size_t t) const { return *dense_[t]; }

  // Memory for the gradient of a parameter, not yet written, with its strides where it is dense.
  static at::Tensor empty_grad(const at::Tensor& param) {
    if (!param.is_non_overlapping_and_dense()) {
      return at::empty_like(param);
    }
    return at::detail::empty_strided_cuda(param.sizes(), param.strides(), param.scalar_type(), param.device());
  }

  // Numbers of the host, in the arguments of launches.
  static at::Tensor sent(const at::Tensor& host, at::Device device) {
    const c10::cuda::CUDAGuard guard(device);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    constexpr int64_t kWord = sizeof(uint4) / sizeof(double);
    const int64_t whole = (host.numel() + kWord - 1) / kWord * kWord;
    const at::Tensor memory = at::detail::empty_cuda({whole}, at::kDouble, device, std::nullopt);
    check_launch(upload(memory.mutable_data_ptr(), host.const_data_ptr(), host.nbytes(), stream), device);
    return memory.narrow(0, 0, host.numel());
  }

  // The next pass with gradients shall write that of parameter t, or add to it. The layout is that of dense(t).
  void write_grad(size_t t, const at::Tensor& grad) { set_grad(t, grad, /*add=*/false); }
  void add_grad(size_t t, const at::Tensor& grad) { set_grad(t, grad, /*add=*/true); }

  // The penalty, 0-dim, float64 if any parameter is, else float32; and every gradient that was asked for, times scale.
  // One launch; with further terms two, if there are gradients.
  at::Tensor run_penalty(const NumberArg& scale) {
    const ColumnRefs factor(scale, device_);
    if (call_.chunks == 0) {
      return zero();
    }
    at::Tensor value = fresh({}, value_dtype_);
    const at::Tensor run_sums = fresh({call_.runs}, at::kDouble);
    set_value(value, run_sums.mutable_data_ptr<double>());
    set_factor(factor);
    if (!call_.has_further) {
      run(adds_ || !factor.is(1) ? Pass::kPenaltyAccumulate : Pass::kPenaltyGradient);
      return value;
    }
    run(Pass::kPenalty);
    if (has_grads_) {
      run(Pass::kAccumulate);
    }
    return value;
  }

  // The same with l2_norm, and the norm of every group, [groups] float64. One launch, with gradients two.
  std::tuple<at::Tensor, at::Tensor> run_group_penalty(const NumberArg& scale) {
    auto [value, norms] = group_penalty();
    if (has_grads_) {
      run_gradient(scale, norms, own_first_groups(), /*keep_if_one=*/false);
    }
    return {std::move(value), std::move(norms)};
  }

  // The gradients that were asked for, for this upstream gradient; the norms of run_group_penalty() where there are
  // any, those of parameter t from first_group[t] on. One launch.
  // keep_if_one: the gradients are there already for 1.
  void run_gradient(const NumberArg& upstream, const OptionalTensor& norms, at::IntArrayRef first_groups,
                    bool keep_if_one) {
    const ColumnRefs factor(upstream, device_);
    if (call_.chunks == 0 || (keep_if_one && factor.is(1))) {
      return;
    }
    set_factor(factor);
    call_.keep_if_one = keep_if_one;
    if (group_ != Grouping::kNone) {
      set_groups(*norms, first_groups);
    }
    run(group_ != Grouping::kNone || call_.has_further ? Pass::kAccumulate : Pass::kGradient);
  }

  // The norm of every group after the soft threshold, [groups] float64. One launch.
  at::Tensor run_soft_norms() {
    at::Tensor norms = fresh({plan_.groups()}, at::kDouble);
    if (call_.chunks == 0) {
      return norms;
    }
    set_groups(norms, own_first_groups());
    const at::Tensor scratch = scratch_behind(0);
    call_.arrivals = arrivals_for(launch_, 1 + call_.large_groups);
    // Without L1 it takes nothing off: they are the norms that penalties are of.
    const ColumnRefs& l1 = columns_[kL1Strength];
    run(l1.is_one() && l1.is(0) && !call_.has_further ? Pass::kPenalty : Pass::kSoftSquares);
    return norms;
  }

  // The proximal operator, in place, on dense(). With groups: the norms of run_soft_norms(), those of parameter t from
  // first_groups[t] on, in one launch; or without them, what that would give.
  void run_prox(const OptionalTensor& norms, at::IntArrayRef first_groups) {
    for (const auto t : c10::irange(entries_.size())) {
      streams_[t][0] = dense(t).mutable_data_ptr();
    }
    if (call_.chunks == 0) {
      return;
    }
    if (group_ != Grouping::kNone) {
      if (!norms.has_value()) {
        return run_prox(run_soft_norms(), own_first_groups());
      }
      set_groups(*norms, first_groups);
    }
    run(Pass::kProx);
  }

  // A step of an optimizer on dense() and the streams of the rows, and the penalty before it. One launch; with further
  // terms or norms two, and two more for the proximal operator of norms. Nothing at all where found_inf is not 0: the
  // value has no meaning then. Steps are counted where their counts are.
  at::Tensor run_step(Pass optimizer, const std::vector<StepRow>& rows, const NumberArg& grad_scale,
                      const NumberArg& found_inf) {
    const auto is_counted_here = [&](const StepRow& row) { return row.count != nullptr && !is_on_device(*row.count); };
    const bool counts = std::any_of(rows.begin(), rows.end(), is_counted_here);
    TORCH_CHECK(!counts || launch_.graph == nullptr,
                "fused_reg.optim: the steps must be counted on the parameters' device (", device_,
                ") in a CUDA graph, as with capturable=True, got counts on the CPU");
    const ColumnRefs scale(grad_scale, device_);
    ColumnRefs skips(found_inf, device_);
    if (counts && skips.source() != Source::kValue) {
      skips = ColumnRefs({found_inf.tensor->item<double>(), {}}, device_);
    }
    if (skips.source() == Source::kValue && !skips.is(0)) {
      return zero();
    }
    const bool has_norms = group_ != Grouping::kNone, has_any = has_norms || call_.has_further;
    at::Tensor value, norms, run_sums;
    if (has_norms) {
      std::tie(value, norms) = group_penalty();
      set_groups(norms, own_first_groups());
    } else if (call_.has_further) {
      value = run_penalty({1, {}});
    } else {
      value = fresh({}, value_dtype_);
      run_sums = fresh({call_.runs}, at::kDouble);
      set_value(value, run_sums.mutable_data_ptr<double>());
    }
    if (has_any) {
      call_.value = nullptr;
      call_.arrivals = arrivals_for(launch_, 1);
    }
    set_factor(scale);
    for (const auto i : c10::irange(int{kNumbers})) {
      call_.sources[i] = columns_[i].source();
    }
    StepCall step{};
    step.is_alone = has_norms && (rows[0].options & kProximal) != 0;
    step.found_inf = skips[0];
    step.found_inf_source = skips.source();
    std::vector<StepNumbersRow> numbers;
    std::vector<void*> streams;
    std::vector<StepOfTensor> others;
    const int each = is_relative_ ? kStreams : rows_of(optimizer).streams;
    streams.reserve(rows.size() * each);
    others.reserve(rows.size());
    for (const auto t : c10::irange(rows.size())) {
      const StepRow& row = rows[t];
      streams.push_back(dense(t).mutable_data_ptr());
      for (int s = 1; s < each; ++s) {
        streams.push_back(row.streams[s] == nullptr ? streams_[t][s] : row.streams[s]->mutable_data_ptr());
      }
      StepNumbersRow own{};
      for (const auto i : c10::irange(int{kNumbers})) {
        own.of[i] = columns_[i][t];
      }
      std::copy(row.rates, row.rates + kRates, own.rates);
      own.count = is_counted_here(row) ? counted(*row.count) : 0;
      own.options = row.options;
      if (numbers.empty() || std::memcmp(&numbers.back(), &own, sizeof own) != 0) {
        numbers.push_back(own);
      }
      StepOfTensor& other = others.emplace_back();
      other.numbers = static_cast<uint32_t>(numbers.size() - 1);
      if (row.count != nullptr && is_on_device(*row.count)) {
        other.count = row.count->mutable_data_ptr();
        other.count_is_float64 = row.count->scalar_type() == at::kDouble;
      }
    }
    launch_with(numbers, joined(entries_, streams, others, groups_), optimizer, has_any, step);
    // What follows on the step is not asked for either, which needs a look at that.
    if (step.is_alone && !(found_inf.tensor.has_value() && found_inf.tensor->item<double>() != 0)) {
      run_prox({}, {});
    }
    return value;
  }

  // [tensors, kSums] float64: the sums of L1 and L2, and those of further terms that are there.
  at::Tensor run_term_sums() { return tensor_sums(Pass::kPenalty); }

  // [tensors] float64: how many elements are 0.
  at::Tensor run_zero_counts() { return tensor_sums(Pass::kZeros).select(1, 1); }

 private:
  at::Tensor fresh(at::IntArrayRef size, at::ScalarType dtype) const {
    return at::detail::empty_cuda(size, dtype, device_, std::nullopt);
  }

  // How many elements are 0 is asked of the weights themselves.
  bool is_relative(Pass pass) const { return is_relative_ && pass != Pass::kZeros; }

  // A stream of relative terms, laid out as the parameter is here.
  void set_relative(size_t t, int s, at::TensorList given, const Selection& selection) {
    if (given.empty()) {
      return;
    }
    const at::Tensor& own = given[selection.places[t]];
    const at::Tensor& like = dense(t);
    const bool is_alike = own.scalar_type() == like.scalar_type() && has_layout_of(own, like);
    const at::Tensor& stream = is_alike ? own : copies_.emplace_back(at::empty_like(like).copy_(own));
    streams_[t][s] = const_cast<void*>(stream.const_data_ptr());
  }

  at::Tensor zero() const { return at::zeros({}, at::TensorOptions(device_).dtype(value_dtype_)); }

  std::tuple<at::Tensor, at::Tensor> group_penalty() {
    at::Tensor norms = fresh({plan_.groups()}, at::kDouble);
    if (call_.chunks == 0) {
      return {zero(), std::move(norms)};
    }
    at::Tensor value = fresh({}, value_dtype_);
    set_groups(norms, own_first_groups());
    const int64_t sums = int64_t{call_.runs} + call_.large_groups;
    const at::Tensor scratch = scratch_behind(sums);
    set_value(value, scratch.mutable_data_ptr<double>());
    run(Pass::kPenalty);
    return {std::move(value), std::move(norms)};
  }

  void set_grad(size_t t, const at::Tensor& grad, bool add) {
    check_grad(t, grad, dense(t), /*any_strides=*/false);
    streams_[t][1] = grad.mutable_data_ptr();
    entries_[t].adds = add;
    adds_ |= add;
    has_grads_ = true;
  }

  void set_factor(const ColumnRefs& factor) {
    call_.factor = factor[0];
    call_.factor_source = factor.source();
  }

  void set_value(const at::Tensor& value, double* run_sums) {
    call_.run_sums = run_sums;
    call_.value = value.mutable_data_ptr();
    call_.value_is_float64 = value_dtype_ == at::kDouble;
    call_.arrivals = arrivals_for(launch_, 1 + call_.large_groups);
  }

  // The groups, those of parameter t from first_groups[t] on in norms.
  void set_groups(const at::Tensor& norms, at::IntArrayRef first_groups) {
    call_.norms = const_cast<double*>(norms.const_data_ptr<double>());
    groups_.clear();
    int64_t large = 0;
    for (const auto t : c10::irange(plan_.tensors())) {
      groups_.push_back({plan_.group_size(t), static_cast<uint32_t>(first_groups[t]), static_cast<uint32_t>(large)});
      large += plan_.chunks_per_group(t) > 1 ? plan_.first_group(t + 1) - plan_.first_group(t) : 0;
    }
    call_.large_groups = static_cast<uint32_t>(large);
  }

  std::vector<int64_t> own_first_groups() const {
    std::vector<int64_t> first;
    for (const auto t : c10::irange(plan_.tensors())) {
      first.push_back(plan_.first_group(t));
    }
    return first;
  }

  // So many numbers, and behind them the squares of the chunks of large groups.
  at::Tensor scratch_behind(int64_t doubles) {
    static_assert(sizeof(ScaledSum) == 2 * sizeof(double));
    const at::Tensor scratch = fresh({doubles + (call_.large_groups == 0 ? 0 : 2 * plan_.chunks())}, at::kDouble);
    call_.squares = reinterpret_cast<ScaledSum*>(scratch.mutable_data_ptr<double>() + doubles);
    return scratch;
  }

  at::Tensor tensor_sums(Pass pass) {
    static_assert(sizeof(TermSums) == kSums * sizeof(double));
    at::Tensor out = fresh({plan_.tensors(), kSums}, at::kDouble);
    const at::Tensor chunk_sums = fresh({plan_.chunks(), kSums}, at::kDouble);
    call_.chunk_sums = reinterpret_cast<TermSums*>(chunk_sums.mutable_data_ptr<double>());
    const Memory table = device_table(table_for(pass), launch_);
    auto* const sums = reinterpret_cast<TermSums*>(out.mutable_data_ptr<double>());
    check_launch(launch_tensor_sums(pass, call_, table.get(), sums, launch_.stream, is_relative(pass)), device_);
    return out;
  }

  // Whether a kernel can count there.
  bool is_on_device(const at::Tensor& count) const {
    const at::ScalarType dtype = count.scalar_type();
    return count.device() == device_ && (dtype == at::kFloat || dtype == at::kDouble) && count.numel() == 1;
  }

  // Of the table of a step the numbers, which change from step to step, travel in the arguments.
  void launch_with(const std::vector<StepNumbersRow>& numbers, const std::vector<unsigned char>& tensors,
                   Pass optimizer, bool has_any, StepCall step) {
    const size_t limit = has_any ? kSmallStep : kLargeStep;
    step.rows = static_cast<uint32_t>(numbers.size());
    std::vector<unsigned char> bytes = joined(numbers);
    Memory numbers_there, tensors_there;
    if (bytes.size() > limit) {
      numbers_there = device_table(bytes, launch_);
      step.numbers = static_cast<const unsigned char*>(numbers_there.get());
      bytes.clear();
    }
    if (step.numbers != nullptr || bytes.size() + tensors.size() > limit) {
      tensors_there = device_table(tensors, launch_);
      step.tensors = static_cast<const unsigned char*>(tensors_there.get());
    } else {
      bytes.insert(bytes.end(), tensors.begin(), tensors.end());
    }
    check_launch(is_relative_
                     ? launch_relative_step(optimizer, call_, step, bytes.data(), bytes.size(), launch_.stream)
                     : launch_step(optimizer, has_any, call_, step, bytes.data(), bytes.size(), launch_.stream),
                 device_);
  }

  // Their bytes, one after the other.
  template <class... T>
  static std::vector<unsigned char> joined(const std::vector<T>&... items) {
    std::vector<unsigned char> bytes;
    bytes.reserve((0 + ... + (items.size() * sizeof(T))));
    const auto append = [&](const void* from, size_t size) {
      const auto* const begin = static_cast<const unsigned char*>(from);
      bytes.insert(bytes.end(), begin, begin + size);
    };
    (append(items.data(), items.size() * sizeof(T)), ...);
    return bytes;
  }

  // And what Call says of it.
  std::vector<unsigned char> table_for(Pass pass) {
    Rows own = rows_of(pass, call_.has_further);
    own.streams = is_relative(pass) ? kStreams : own.streams;
    call_.numbers_per_tensor = false;
    for (const auto i : c10::irange(own.numbers)) {
      call_.sources[i] = columns_[i].source();
      call_.numbers_per_tensor |= !columns_[i].is_one();
    }
    std::vector<void*> streams;
    for (const auto& of_tensor : streams_) {
      streams.insert(streams.end(), of_tensor.begin(), of_tensor.begin() + own.streams);
    }
    std::vector<NumberRef> numbers;
    for (const auto t : c10::irange(call_.numbers_per_tensor ? entries_.size() : 1)) {
      for (const auto i : c10::irange(own.numbers)) {
        numbers.push_back(columns_[i][t]);
      }
    }
    return joined(entries_, streams, numbers, groups_);
  }

  void run(Pass pass) {
    const std::vector<unsigned char> bytes = table_for(pass);
    if (is_relative(pass)) {
      const Memory table = device_table(bytes, launch_);
      check_launch(launch_relative(pass, call_, table.get(), launch_.stream), device_);
    } else if (bytes.size() <= kLargeTable) {
      check_launch(launch(pass, call_, bytes.data(), bytes.size(), launch_.stream), device_);
    } else {
      const Memory table = device_table(bytes, launch_);
      check_launch(launch(pass, call_, table.get(), bytes.size(), launch_.stream), device_);
    }
  }

  at::Device device_;
  c10::cuda::CUDAGuard guard_;
  Launch launch_;
  Grouping group_;
  std::array<ColumnRefs, kNumbers> columns_;
  at::ScalarType value_dtype_;
  std::vector<const at::Tensor*> dense_;
  std::list<at::Tensor> copies_;
  ChunkPlan plan_;
  std::vector<Entry> entries_;
  std::vector<std::array<void*, kStreams>> streams_;
  std::vector<GroupInfo> groups_;  // of a launch that knows groups
  Call call_{};
  bool adds_ = false, has_grads_ = false;
  bool is_relative_;
};

}  // namespace fused_reg::cuda
