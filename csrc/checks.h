// Every check of the operators' arguments, worded once. Python puts the name of the function in front:
// "fused_penalty: params[3] must be floating point, got torch.int64".
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "dtypes.h"
#include "layout.h"
#include "overlap.h"
#include "passes/pass.h"
#include "torch_compat.h"

namespace fused_reg {

using Floats = at::ArrayRef<double>;
using OptionalTensor = std::optional<at::Tensor>;

inline std::string name_of(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

// None for a dtype that is not supported.
inline std::optional<Dtype> dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kFloat16;
    default:
      return std::nullopt;
  }
}

inline bool is_supported(at::ScalarType dtype) { return dtype_of(dtype).has_value(); }

// Of a tensor that is supported.
inline Dtype dtype_of(const at::Tensor& t) { return dtype_of(t.scalar_type()).value(); }

// Of the frozen base weights of a quantized model.
inline const char* hint_of(const at::Tensor& p, at::TensorList params) {
  const bool is_frozen = !p.requires_grad() && !p.is_complex();
  const auto trains = [](const at::Tensor& other) { return other.requires_grad(); };
  return is_frozen && std::any_of(params.begin(), params.end(), trains)
             ? "; of a quantized model pass the parameters that require grad"
             : "";
}

inline void check_dtypes(at::TensorList params) {
  TORCH_CHECK_VALUE(!params.empty(), "params must not be empty");
  for (const auto i : c10::irange(params.size())) {
    const at::Tensor& p = params[i];
    TORCH_CHECK_TYPE(at::isFloatingType(p.scalar_type()), "params[", i, "] must be floating point, got ",
                     name_of(p.scalar_type()), hint_of(p, params));
    TORCH_CHECK_TYPE(is_supported(p.scalar_type()), "params[", i,
                     "] must be float32, float64, bfloat16 or float16, got ", name_of(p.scalar_type()),
                     hint_of(p, params));
  }
}

inline void check_params(at::TensorList params) {
  check_dtypes(params);
  for (const auto i : c10::irange(params.size())) {  // after the dtypes: Python takes several devices apart
    const at::Tensor& p = params[i];
    TORCH_CHECK_VALUE(p.device() == params[0].device(), "params[", i, "] must be on ", params[0].device(),
                      ", as params[0], got ", p.device());
  }
}

inline void check_number_device(const char* name, const at::Tensor& number, at::Device params) {
  TORCH_CHECK_VALUE(number.is_cpu() || number.device() == params, name,
                    " must be on the CPU or on the parameters' device (", params, "), got ", number.device());
}

inline void check_strength_memory(const at::Tensor& strength) {
  TORCH_CHECK_TYPE(strength.has_storage() && strength.storage().data() != nullptr,
                   "strengths must have memory of their own, got a tensor subclass without");
}

// For the backends that read memory.
inline bool has_memory(const at::Tensor& t) {
  return t.numel() == 0 || (t.has_storage() && t.storage().data() != nullptr);
}

inline void check_memory(size_t i, const at::Tensor& p) {
  TORCH_CHECK_TYPE(has_memory(p), "params[", i, "] must have memory of its own, got a tensor subclass without");
}

// Python has normalized the strengths: none (the term is absent), one for all, or one per parameter.
inline void check_strength(const char* name, size_t count, size_t params) {
  TORCH_CHECK_VALUE(count <= 1 || count == params, name, " must be one strength or one per parameter (", params,
                    "), got ", count);
}

inline void check_values(const char* name, Floats values, const NumberRule& rule) {
  for (const auto i : c10::irange(values.size())) {
    const double x = values[i];
    TORCH_CHECK_VALUE((rule.is_above ? x > rule.least : x >= rule.least) && x <= rule.most, name,
                      values.size() > 1 ? "[" + std::to_string(i) + "]" : "", " must be ", rule.text, ", got ", x);
  }
}

// Called by fused_reg alone, which keeps these: the checks guard the memory.
inline void check_needs_grad(size_t count, size_t params) {
  TORCH_CHECK_VALUE(count == params, "needs_grad must belong to the parameters (", params, "), got ", count);
}

inline void check_group(int64_t group) {
  constexpr auto kLast = static_cast<int64_t>(Grouping::kBlock);
  const int64_t kind = group % kGroupings;
  TORCH_CHECK_VALUE(group >= 0 && kind <= kLast && (group == kind || kind > 1), "group must be 0 to ", kLast,
                    ", or of several rows, columns or elements, got ", group);
}

inline void check_grouped(Grouping group) { TORCH_CHECK_VALUE(group != Grouping::kNone, "l2_norm must be given"); }

inline void check_norms(const OptionalTensor& norms, at::IntArrayRef first_groups, at::TensorList params,
                        Grouping group) {
  TORCH_CHECK_VALUE(first_groups.size() == params.size(), "first_groups must have one number per parameter (",
                    params.size(), "), got ", first_groups.size());
  bool fit = norms.has_value() && norms->scalar_type() == at::kDouble && norms->is_contiguous() &&
             norms->device() == params[0].device();
  for (const auto t : c10::irange(fit ? params.size() : 0)) {
    fit &= first_groups[t] >= 0 && first_groups[t] <= norms->numel() - groups_of(params[t], group);
  }
  TORCH_CHECK_VALUE(fit, "norms must be those that penalty gave");
}

inline void check_grads(size_t count, size_t params) {
  TORCH_CHECK_VALUE(count == params, "grads must have one tensor for each parameter that says so (", params, "), got ",
                    count);
}

inline void check_grad(size_t i, const at::Tensor& grad, const at::Tensor& like, bool any_strides) {
  TORCH_CHECK_VALUE(grad.device() == like.device() && grad.scalar_type() == like.scalar_type() &&
                        grad.sizes() == like.sizes() && (any_strides || has_layout_of(grad, like)),
                    "grads[", i, "] must have the device, dtype, shape and strides that penalty gave it");
}

// Of the value of a list.
inline at::ScalarType value_dtype(at::TensorList params) {
  for (const at::Tensor& p : params) {
    if (p.scalar_type() == at::kDouble) {
      return at::kDouble;
    }
  }
  return at::kFloat;
}

// What is written outside of autograd: torch's own functions record themselves or raise. A view of a leaf is the leaf.
inline bool is_in_graph(const at::Tensor& t) {
  return t.requires_grad() && !t.is_leaf() && !(t.is_view() && t._base().is_leaf());
}

inline void check_not_in_graph(at::TensorList params) {
  for (const auto t : c10::irange(at::GradMode::is_enabled() ? params.size() : 0)) {
    TORCH_CHECK_VALUE(!is_in_graph(params[t]), "params[", t,
                      "] must be a leaf, as a parameter is, got the result of an operation, whose graph would not know "
                      "of the change; call it under torch.no_grad()");
  }
}

// Parameters that prox_ may write to.
inline void check_writable(at::TensorList params) {
  std::vector<Region> regions;
  for (const auto t : c10::irange(params.size())) {
    check_memory(t, params[t]);
    if (params[t].numel() > 0) {
      regions.emplace_back(params[t], t, "");
      check_no_self_overlap(regions.back());
    }
  }
  check_disjoint(std::move(regions));
}

// What accumulate_grad_ does with a parameter.
enum GradMode : int64_t { kSkipGrad, kWriteGrad, kAddGrad };

// Gradients that accumulate_grad_ may write: one for each parameter whose mode asks for it. Returns the places of
// these.
inline std::vector<size_t> check_accumulation(at::TensorList params, at::TensorList grads, at::IntArrayRef modes) {
  TORCH_CHECK_VALUE(modes.size() == params.size(), "modes must belong to the parameters (", params.size(), "), got ",
                    modes.size());
  std::vector<size_t> places;
  std::vector<Region> regions;
  regions.reserve(2 * params.size());
  for (const auto t : c10::irange(params.size())) {
    check_memory(t, params[t]);
    if (params[t].numel() > 0) {
      regions.emplace_back(params[t], t, "");
    }
    TORCH_CHECK_VALUE(modes[t] >= kSkipGrad && modes[t] <= kAddGrad, "modes[", t, "] must be 0, 1 or 2, got ",
                      modes[t]);
    if (modes[t] == kSkipGrad) {
      continue;
    }
    places.push_back(t);
    check_grads(grads.size(), std::max(places.size(), grads.size()));
    const at::Tensor& grad = grads[places.size() - 1];
    TORCH_CHECK_TYPE(is_supported(grad.scalar_type()), "params[", t,
                     "].grad must be float32, float64, bfloat16 or float16, got ", name_of(grad.scalar_type()));
    TORCH_CHECK_VALUE(grad.device() == params[t].device() && grad.sizes() == params[t].sizes(), "params[", t,
                      "].grad must have the device and shape of its parameter");
    if (grad.numel() > 0) {
      regions.emplace_back(grad, t, ".grad");
      check_no_self_overlap(regions.back());
    }
  }
  check_grads(grads.size(), places.size());
  check_disjoint(std::move(regions));
  return places;
}

// The tensors of an optimizer's step, which writes to all of them.
inline void check_step(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList counts,
                       size_t firsts, size_t states_each, size_t rates, bool writes_grads) {
  const size_t n = params.size();
  check_grads(grads.size(), n);
  TORCH_CHECK_VALUE(states.size() == n * states_each && (counts.empty() || counts.size() == n) &&
                        (firsts == 0 || firsts == n) && (rates == kRates || rates == n * kRates),
                    "states, counts and rates must belong to the parameters (", n, ")");
  const auto check_one = [&](const at::Tensor& x, size_t t, const char* what, bool is_written) {
    TORCH_CHECK_TYPE(is_supported(x.scalar_type()), "params[", t, "]", what,
                     " must be float32, float64, bfloat16 or float16, got ", name_of(x.scalar_type()));
    TORCH_CHECK_VALUE(x.device() == params[t].device() && x.sizes() == params[t].sizes(), "params[", t, "]", what,
                      " must have the device and shape of its parameter");
    if (is_written && !x.is_non_overlapping_and_dense()) {
      check_no_self_overlap(Region(x, t, what));
    }
  };
  for (const auto t : c10::irange(n)) {
    check_one(params[t], t, "", true);
    check_one(grads[t], t, ".grad", writes_grads);
    for (const auto s : c10::irange(states_each)) {
      check_one(states[s * n + t], t, "'s state", true);
    }
  }
}

}  // namespace fused_reg
