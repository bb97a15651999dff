// The strengths of a list, as the operators take them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <numeric>
#include <vector>

#include "checks.h"

namespace fused_reg {

// Floats, or a tensor that wins (ops.cpp).
struct StrengthArg {
  const char* name;
  Floats floats;
  const OptionalTensor& tensor;

  bool is_given() const { return !floats.empty() || tensor.has_value(); }
};

struct StrengthArgs {
  StrengthArg l1, l2, l2_norm;
  bool rows;  // the groups of l2_norm are rows, not tensors
};

// A number: a float, or a tensor of one element that wins.
struct NumberArg {
  double value;
  OptionalTensor tensor;
};

// A tensor may have brought a call to a backend whose parameters are elsewhere.
inline void check_list(at::TensorList params, const StrengthArgs& strengths) {
  check_params(params);
  for (const StrengthArg* const strength : {&strengths.l1, &strengths.l2, &strengths.l2_norm}) {
    check_number_device("strengths", strength->tensor, params[0].device());
  }
}

inline void check_number(const char* name, const NumberArg& number, at::Device params) {
  check_number_device(name, number.tensor, params);
  TORCH_CHECK_VALUE(!number.tensor.has_value() || number.tensor->numel() == 1, name, " must be one number, got ",
                    number.tensor->numel());
}

inline const OptionalTensor kNoTensor;

// Which parameters of a list an operator is given: all, or those that need a gradient. Strengths are those of the list.
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

// The strengths of a selection, read on the host: what costs nothing there is checked, as Python checks floats.
class Strength {
 public:
  Strength(const StrengthArg& arg, const Selection& selection) {
    if (arg.tensor.has_value()) {
      const at::Tensor host = arg.tensor->to(at::kCPU, at::kDouble).contiguous();
      fill({host.const_data_ptr<double>(), static_cast<size_t>(host.numel())}, arg.name, selection);
    } else {
      fill(arg.floats, arg.name, selection);
    }
  }

  bool is_one() const { return values_.size() == 1; }

  double operator[](size_t t) const { return values_[is_one() ? 0 : t]; }

 private:
  void fill(at::ArrayRef<double> values, const char* name, const Selection& selection) {
    check_strength(name, values.size(), selection.list);
    check_values(name, values);
    if (values.size() <= 1) {
      values_.assign(1, values.empty() ? 0 : values[0]);
      return;
    }
    values_.reserve(selection.places.size());
    for (const size_t place : selection.places) {
      values_.push_back(values[place]);
    }
  }

  std::vector<double> values_;
};

struct Strengths {
  Strength l1, l2, l2_norm;

  Strengths(const StrengthArgs& args, const Selection& selection)
      : l1(args.l1, selection), l2(args.l2, selection), l2_norm(args.l2_norm, selection) {}
};

}  // namespace fused_reg
