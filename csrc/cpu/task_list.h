// A list of CPU tensors as tasks, one each, which a parallel region cuts into the visits of the plan. Short groups and
// what is no run of memory are visited in strips: where groups lie side by side, as they lie, else packed (pack.h).
#pragma once

#include <array>
#include <list>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../layout.h"
#include "../numbers.h"
#include "../torch_compat.h"
#include "chunk_kernel.h"
#include "pack.h"
#include "parallel.h"

namespace fused_reg {

class TaskList {
 public:
  // The parameters outlive it: to hold them takes as long as the pass over short ones.
  TaskList(at::TensorList params, const Selection& selection, const NumbersArg& numbers)
      : params_(params),
        group_(numbers.group),
        has_further_(numbers.has_further()),
        takes_across_(!numbers.is_relative()) {
    check_list(params, numbers);
    check_relative(params, selection, numbers);
    std::array<HostColumn, kNumbers> columns;
    const int used = has_further_ ? int{kNumbers} : kGroupNumbers;
    for (const auto c : c10::irange(used)) {
      columns[c] = HostColumn(numbers.columns[c], selection);
    }
    tasks_.reserve(params.size());
    std::vector<int64_t> sizes, groups;
    sizes.reserve(params.size());
    groups.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      check_memory(t, params[t]);
      ChunkTask& task = tasks_.emplace_back();
      task.dtype = dtype_of(dense(t));
      task.streams[0] = const_cast<void*>(dense(t).const_data_ptr());
      for (const auto c : c10::irange(used)) {
        task.numbers.of[c] = columns[c][t];
      }
      task.numbers.terms = terms_of(task.numbers.of);
      task.size = dense(t).numel();
      sizes.push_back(task.size);
      groups.push_back(group_ == Grouping::kNone ? 1 : groups_of(params[t], group_));
    }
    plan_ = group_ == Grouping::kNone ? ChunkPlan(sizes) : ChunkPlan(sizes, groups);
    for (const auto t : c10::irange(params.size())) {
      set_relative(t, kToward, numbers.toward, selection);
      set_relative(t, kImportance, numbers.importance, selection);
      place(t, 0, params[t]);
      if (is_short(t)) {
        set_strips(t);
      }
    }
  }

  Grouping group() const { return group_; }

  const at::Tensor& dense(size_t t) const { return params_[t]; }

 protected:
  // Says where the elements of a stream of tensor t lie, unless they are a run, in the order of that of the parameter.
  void place(size_t t, int s, const at::Tensor& stream) {
    const at::Tensor& param = params_[t];
    if ((is_run(param, group_) && has_layout_of(stream, param)) || stream.numel() == 0) {
      return;
    }
    const int64_t d = sliced_dim(param, group_), length = group_length(group_), groups = groups_of(param, group_);
    TORCH_CHECK_VALUE(d >= 0 || groups == 1 || kind_of(group_) != Grouping::kBlock, "params[", t,
                      "] and what belongs to it must be contiguous, to have blocks");
    Strides strides;
    for (const int64_t i : run_order(param, group_)) {
      const Strides::Dim dim{i == d ? length : stream.size(i), stream.stride(i)};
      if (dim.size == 1) {
        continue;
      }
      if (!strides.dims.empty() && strides.dims.back().stride == dim.size * dim.stride) {
        strides.dims.back() = {strides.dims.back().size * dim.size, dim.stride};
      } else {
        strides.dims.push_back(dim);
      }
    }
    if (strides.dims.empty()) {
      strides.dims.push_back({1, 1});
    }
    strides.group = d < 0 || groups == 1 ? plan_.group_size(t) : stream.stride(d) * length;
    if (!strides.is_run()) {
      strides_.resize(tasks_.size());
      strides_[t][s] = std::move(strides);
      set_strips(t);
    }
  }

  static constexpr StreamUse kReadsOnly{bit(0), 0};

  // Those of the tasks' passes.
  auto own_streams() const {
    return [this](int64_t t) { return streams_used(tasks_[t].pass); };
  }

  // body(visit, task) once for every visit. use(t): the streams of tensor t that it reads and writes; what it does not
  // write, and did not read, must not be unpacked.
  template <class Use, class Body>
  void for_each_task(const ChunkPlan& plan, const Use& use, const Body& body) const {
    for_each_visit(plan, [&](const Visit& visit) {
      if (plan.has_strips(visit.first.tensor)) {
        visit_strip(plan, visit, use(visit.first.tensor), body);
      } else {
        ChunkTask task = task_of(visit);
        body(visit, task);
      }
    });
  }

  // body(task) once for everything that a pass without sums or norms writes; it is free to take the elements as they
  // lie, run by run.
  template <class Body>
  void for_each_run(const Body& body) const {
    for_each_visit(plan_, [&](const Visit& visit) {
      const int64_t t = visit.first.tensor;
      const StreamUse used = streams_used(tasks_[t].pass);
      if (!plan_.has_strips(t)) {
        body(task_of(visit));
      } else if (has_runs(t, used)) {
        visit_runs(visit, used, body);
      } else {
        visit_strip(plan_, visit, used, [&](const Visit&, const ChunkTask& task) { body(task); });
      }
    });
  }

  at::TensorList params_;
  Grouping group_;
  bool has_further_;
  bool takes_across_;  // no step of an optimizer does, and no relative terms
  std::vector<ChunkTask> tasks_;
  ChunkPlan plan_;

 private:
  // A stream of relative terms, of the dtype of the parameter, which may be a wider copy.
  void set_relative(size_t t, int s, at::TensorList given, const Selection& selection) {
    if (!given.empty()) {
      const at::Tensor& own = given[selection.places[t]];
      const at::ScalarType dtype = params_[t].scalar_type();
      const at::Tensor& stream = own.scalar_type() == dtype ? own : converted_.emplace_back(own.to(dtype));
      tasks_[t].streams[s] = const_cast<void*>(stream.const_data_ptr());
      place(t, s, stream);
    }
  }

  ChunkTask task_of(const Visit& visit) const {
    const int64_t t = visit.first.tensor;
    ChunkTask task = tasks_[t];
    const int64_t offset = visit.first.begin * static_cast<int64_t>(dense(t).element_size());
    for (void*& stream : task.streams) {
      stream = stream == nullptr ? nullptr : static_cast<char*>(stream) + offset;
    }
    task.size = visit.size;
    task.chunk_size = visit.first.size;
    return task;
  }

  // Memory of this thread, kept for its next strip.
  static void* scratch(int s, int64_t size) {
    struct alignas(kLineBytes) Line {
      char bytes[kLineBytes];
    };
    static thread_local struct {
      std::unique_ptr<Line[]> lines;
      int64_t count = 0;
    } kept[kStreams];
    auto& own = kept[s];
    const int64_t count = (size + kLineBytes - 1) / kLineBytes;
    if (own.count < count) {
      own.lines.reset(new Line[count]);
      own.count = count;
    }
    return own.lines.get();
  }

  bool is_short(int64_t t) const {
    return plan_.group_size(t) < line(t) && plan_.first_group(t + 1) - plan_.first_group(t) > 1;
  }

  int64_t line(int64_t t) const { return kLineBytes / static_cast<int64_t>(dense(t).element_size()); }

  // Whether the chunks of a strip of tensor t are visited side by side: where they are so, and short ones, which are
  // packed so.
  bool is_across(int64_t t) const {
    return takes_across_ && (is_short(t) || (!strides_.empty() && strides_[t][0].is_across()));
  }

  // Side by side some lines of a row are visited together: where rows lie far apart, a line costs more than its bytes.
  void set_strips(int64_t t) {
    const bool across = is_across(t);
    plan_.set_strips(t, across ? 4 * line(t) : line(t), across ? kMaxVisit : plan_.elements());
  }

  bool uses(int64_t t, const StreamUse& used, int s) const {
    return (used.reads | relative_streams(kRelative) | used.writes) & bit(s) && tasks_[t].streams[s] != nullptr;
  }

  bool has_runs(int64_t t, const StreamUse& used) const {
    for (int s = 0; s < kStreams; ++s) {
      const Strides& strides = strides_[t][s];
      if (uses(t, used, s) && !strides.dims.empty() && !strides.has_runs()) {
        return false;
      }
    }
    return true;
  }

  template <class Body>
  void visit_runs(const Visit& visit, const StreamUse& used, const Body& body) const {
    const int64_t t = visit.first.tensor, end = visit.first.begin + visit.size;
    const auto bytes = static_cast<int64_t>(dense(t).element_size());
    const auto& dims = strides_[t][0].dims;
    const int64_t apart = dims.size() > 1 ? dims[dims.size() - 2].stride : 0;  // what is fetched, in the next run
    for (int64_t i = visit.first.begin, count; i < end; i += count) {
      ChunkTask task = tasks_[t];
      count = end - i;
      for (int s = 0; s < kStreams; ++s) {
        if (!uses(t, used, s)) {
          task.streams[s] = nullptr;
          continue;
        }
        const Strides& strides = strides_[t][s];
        const auto [offset, left] = strides.dims.empty() ? std::pair(i, count) : strides.piece(i);
        task.streams[s] = static_cast<char*>(task.streams[s]) + offset * bytes;
        count = std::min(count, left);
      }
      task.size = task.chunk_size = count;
      task.ahead = apart;
      body(task);
    }
  }

  // A strip, whose streams are packed, unless they are side by side, or runs that are wanted.
  template <class Body>
  void visit_strip(const ChunkPlan& plan, const Visit& strip, const StreamUse& used, const Body& body) const {
    const int64_t t = strip.first.tensor, size = strip.first.size;
    const int64_t group = strip.first.begin / plan.group_size(t), begin = strip.first.begin % plan.group_size(t);
    const unsigned reads = used.reads | relative_streams(kRelative);
    const auto bytes = static_cast<int64_t>(dense(t).element_size());
    const bool across = is_across(t) && strip.chunks > 1;
    const int64_t row = across ? 1 : size;
    const Strides runs = Strides::of_runs(plan.group_size(t));
    ChunkTask task = task_of(strip);
    const Strides* from[kStreams];
    void* memory[kStreams];
    unsigned packed = 0;
    for (int s = 0; s < kStreams; ++s) {
      if (!uses(t, used, s)) {
        task.streams[s] = nullptr;
        continue;
      }
      from[s] = strides_.empty() || strides_[t][s].dims.empty() ? &runs : &strides_[t][s];
      memory[s] = static_cast<char*>(tasks_[t].streams[s]) + group * from[s]->group * bytes;
      const int64_t apart = from[s]->dims[0].stride;
      const bool is_wide = strip.chunks >= line(t) || strip.chunks == apart;
      const bool is_direct = across ? from[s]->is_across() && is_wide : from[s]->is_run();
      if (is_direct) {
        task.streams[s] = static_cast<char*>(memory[s]) + begin * apart * bytes;
        task.apart[s] = across ? apart : 0;
      } else {
        packed |= bit(s);
        task.streams[s] = scratch(s, strip.size * bytes);
        task.apart[s] = across ? strip.chunks : 0;
      }
    }
    const auto each = [&](unsigned streams, const auto& copies) {
      for (int s = 0; s < kStreams; ++s) {
        if (packed & streams & bit(s)) {
          copies(*from[s], bytes, memory[s], task.streams[s], row, across ? strip.chunks : 1, strip.chunks, begin,
                 size);
        }
      }
    };
    each(reads, pack<false>);
    if (across) {
      task.is_packed = packed & bit(0);
      body(strip, task);
    }
    for (int64_t i = 0; i < (across ? 0 : strip.chunks);) {
      const Visit part = plan.part(strip, i);
      ChunkTask own = task;
      own.size = part.size;
      for (int s = 0; s < kStreams; ++s) {
        if (own.streams[s] != nullptr) {
          own.streams[s] = static_cast<char*>(own.streams[s]) + i * (packed & bit(s) ? size : from[s]->group) * bytes;
        }
      }
      body(part, own);
      i += part.chunks;
    }
    each(used.writes, pack<true>);
  }

  std::list<at::Tensor> converted_;
  std::vector<std::array<Strides, kStreams>> strides_;  // [tensors], of those with strips; a run has no dimensions here
};

}  // namespace fused_reg
