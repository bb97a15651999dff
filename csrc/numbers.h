// The numbers of a list (penalty.h), a column of each, as the operators take them.
//
//   floats    those of all columns, in turn
//   tensors   those of all columns, in turn; each of one number or of one per parameter, on the CPU or the
//             parameters' device
//   counts    of each column how many of the floats are its: none (the term is absent), one, one per parameter; or
//             kIsTensor: the next of the tensors is
//   group     what l2_norm takes the norms of
//
// Behind the columns there may be two numbers more in counts: how many tensors, behind those of the columns, are
// reference weights, and how many importances of elements; none, or one for each parameter of the list.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "checks.h"
#include "passes/passes.h"
#include "torch_compat.h"

namespace fused_reg {

constexpr int64_t kIsTensor = -1;
constexpr const char* kNoNormsWithImportance =
    "importance must come without l2_norm, which has one strength for all elements of a group";

#define FUSED_REG_NUMBERS_SCHEMA "float[] floats, Tensor[] tensors, int[] counts, int group"
#define FUSED_REG_NUMBERS Floats floats, at::TensorList tensors, at::IntArrayRef counts, int64_t group
#define FUSED_REG_NUMBERS_GIVEN \
  NumbersArg { floats, tensors, counts, group }

// A column: floats, or a tensor.
struct ColumnArg {
  const char* name;
  Floats floats;
  const at::Tensor* tensor = nullptr;
  bool is_any = false;  // not only finite numbers >= 0
  NumberRule rule{};
};

struct NumbersArg {
  std::array<ColumnArg, kNumbers> columns;
  Grouping group;
  at::TensorList toward, importance;

  NumbersArg(Floats floats, at::TensorList tensors, at::IntArrayRef counts, int64_t group)
      : group(static_cast<Grouping>(group)) {
    TORCH_CHECK_VALUE(counts.size() == kNumbers || counts.size() == kNumbers + 2,
                      "counts must have a number per column (", int{kNumbers}, "), got ", counts.size());
    check_group(group);
    TORCH_CHECK_VALUE(group != 0 || counts[kNormStrength] == 0, "l2_norm must come with a group");
    size_t first = 0, next = 0;
    for (const auto c : c10::irange(static_cast<int>(kNumbers))) {
      columns[c].name = kNumberNames[c];
      columns[c].rule = rule_of(c);
      if (counts[c] == kIsTensor) {
        TORCH_CHECK_VALUE(next < tensors.size(), "tensors must be as many as counts says, got ", tensors.size());
        columns[c].tensor = &tensors[next++];
      } else {
        const size_t count = counts[c];
        TORCH_CHECK_VALUE(counts[c] >= 0 && first + count <= floats.size(),
                          "floats must be as many as counts says, got ", floats.size());
        columns[c].floats = floats.slice(first, count);
        first += count;
      }
    }
    if (counts.size() > kNumbers) {
      const int64_t rest = static_cast<int64_t>(tensors.size() - next), from = counts[kNumbers];
      TORCH_CHECK_VALUE(from >= 0 && from <= rest && counts[kNumbers + 1] == rest - from,
                        "tensors must be as many as counts says, got ", tensors.size());
      toward = tensors.slice(next, from);
      importance = tensors.slice(next + from);
      TORCH_CHECK_VALUE(group == 0 || importance.empty(), kNoNormsWithImportance);
    }
  }

  bool is_relative() const { return !toward.empty() || !importance.empty(); }

  // Whether there are numbers of terms other than L1 and L2.
  bool has_further() const {
    return std::any_of(columns.begin() + kGroupNumbers, columns.end(),
                       [](const ColumnArg& column) { return column.tensor != nullptr || !column.floats.empty(); });
  }
};

// Which parameters of a list an operator is given: all, or those that need a gradient. Numbers are those of the list.
struct Selection {
  size_t list;                 // parameters in the list
  std::vector<size_t> places;  // of those given, in the list
};

inline Selection all_of(size_t params) {
  Selection all{params, std::vector<size_t>(params)};
  std::iota(all.places.begin(), all.places.end(), size_t{0});
  return all;
}

inline Selection selection_of(const c10::List<bool>& needs_grad, size_t params) {
  Selection some{needs_grad.size(), {}};
  for (const auto place : c10::irange(needs_grad.size())) {
    if (needs_grad[place]) {
      some.places.push_back(place);
    }
  }
  check_needs_grad(some.places.size(), params);
  return some;
}

// A reference that a user gives is checked in Python, in other words.
inline void check_relative(at::TensorList params, const Selection& selection, const NumbersArg& numbers) {
  const auto check = [&](const char* name, at::TensorList given) {
    TORCH_CHECK_VALUE(given.empty() || given.size() == selection.list, name, " must be one tensor per parameter (",
                      selection.list, "), got ", given.size());
    for (const auto t : c10::irange(given.empty() ? 0 : params.size())) {
      const at::Tensor& own = given[selection.places[t]];
      TORCH_CHECK_VALUE(own.device() == params[t].device() && own.sizes() == params[t].sizes() &&
                            is_supported(own.scalar_type()) && has_memory(own),
                        name, "[", t, "] must have the device, dtype and shape of params[", t, "]");
    }
  };
  check("toward", numbers.toward);
  check("importance", numbers.importance);
}

// What a call writes, the parameters, or gradients of those at these places, shall not be what it reads.
inline void check_unshared(at::TensorList written, const NumbersArg& numbers,
                           const std::vector<size_t>* of_places = nullptr) {
  if (!numbers.is_relative()) {
    return;
  }
  std::vector<Region> regions;
  for (const auto i : c10::irange(written.size())) {
    if (written[i].numel() > 0) {
      regions.emplace_back(written[i], of_places == nullptr ? i : (*of_places)[i], of_places == nullptr ? "" : ".grad");
    }
  }
  const size_t read = regions.size();
  for (const at::TensorList given : {at::TensorList(numbers.toward), at::TensorList(numbers.importance)}) {
    for (const auto t : c10::irange(given.size())) {
      if (given[t].numel() > 0) {
        regions.emplace_back(given[t], t, "");
      }
    }
  }
  if (const auto shared = first_shared(regions, read)) {
    const Region& own = regions[shared->second];
    const bool is_toward = own.index < numbers.toward.size() && own.tensor == &numbers.toward[own.index];
    const std::string name = std::string(is_toward ? "toward" : "importance") + "[" + std::to_string(own.index) + "]";
    TORCH_CHECK_VALUE(false, shared->second < read ? own.name() : name, " must not share memory with ",
                      regions[shared->first].name(), "; use `.clone()`");
  }
}

// What an optimizer's step has for a parameter, beside the numbers.
struct StepRow {
  double rates[kRates];
  unsigned options;
  const at::Tensor* count;                // of the steps; null: none is needed
  const at::Tensor* streams[kStreams]{};  // null: not there; stream 0 is the parameter
};

// One more step; without the dispatcher, which would take longer than the step of a small parameter.
inline double counted(const at::Tensor& steps) {
  if (steps.scalar_type() == at::kFloat && steps.is_cpu() && steps.numel() == 1) {
    return *steps.mutable_data_ptr<float>() += 1;
  }
  steps.add_(1);
  return steps.item<double>();
}

// A number: a float, or a tensor of one element that wins.
struct NumberArg {
  double value;
  OptionalTensor tensor;
};

// A tensor may have brought a call to a backend whose parameters are elsewhere.
inline void check_list(at::TensorList params, const NumbersArg& numbers) {
  check_params(params);
  for (const auto i : c10::irange(static_cast<int>(kNumbers))) {
    if (const at::Tensor* const tensor = numbers.columns[i].tensor) {
      check_number_device(i == kStep ? "step" : "strengths", *tensor, params[0].device());
    }
  }
}

inline void check_number(const char* name, const NumberArg& number, at::Device params) {
  if (number.tensor.has_value()) {
    check_number_device(name, *number.tensor, params);
    TORCH_CHECK_VALUE(number.tensor->numel() == 1, name, " must be one number, got ", number.tensor->numel());
  }
}

// The column of a selection, read on the host: what costs nothing there is checked, as Python checks floats.
class HostColumn {
 public:
  HostColumn() = default;  // zeros

  HostColumn(const ColumnArg& arg, const Selection& selection) {
    if (arg.tensor != nullptr) {
      const at::Tensor host = arg.tensor->to(at::kCPU, at::kDouble).contiguous();
      fill({host.const_data_ptr<double>(), static_cast<size_t>(host.numel())}, arg, selection);
    } else {
      fill(arg.floats, arg, selection);
    }
  }

  bool is_one() const { return values_.empty(); }

  double operator[](size_t t) const { return is_one() ? one_ : values_[t]; }

 private:
  void fill(at::ArrayRef<double> values, const ColumnArg& arg, const Selection& selection) {
    check_strength(arg.name, values.size(), selection.list);
    if (!arg.is_any) {
      check_values(arg.name, values, arg.rule);
    }
    if (values.size() <= 1) {
      one_ = values.empty() ? 0 : values[0];
      return;
    }
    values_.reserve(selection.places.size());
    for (const size_t place : selection.places) {
      values_.push_back(values[place]);
    }
  }

  double one_ = 0;
  std::vector<double> values_;
};

}  // namespace fused_reg
