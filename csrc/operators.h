// What the operators of ops.cpp do, for every backend that has a ListPass:
//
//   ListPass(params, selection, strengths)   checks; the list, not yet read
//   empty_grad(param)                        memory for its gradient
//   write_grad(t, grad), add_grad(t, grad)   which gradients the next pass shall give, and where
//   run_...                                  one pass over the list
//
// (cpu/list_pass.h says more.)
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>

#include <vector>

#include "checks.h"
#include "layout.h"
#include "strengths.h"

namespace fused_reg {

// The strengths of a list in an operator's arguments.
#define FUSED_REG_STRENGTHS                                                                               \
  Floats l1, Floats l2, Floats l2_norm, const OptionalTensor &l1_tensor, const OptionalTensor &l2_tensor, \
      const OptionalTensor &l2_norm_tensor, bool rows
#define FUSED_REG_STRENGTH_ARGS \
  StrengthArgs { {"l1", l1, l1_tensor}, {"l2", l2, l2_tensor}, {"l2_norm", l2_norm, l2_norm_tensor}, rows }

template <class ListPass>
struct Operators {
  using Tensors = std::vector<at::Tensor>;
  using Value = at::Tensor;

  static Value penalty(at::TensorList params, FUSED_REG_STRENGTHS) {
    ListPass pass(params, all_of(params.size()), FUSED_REG_STRENGTH_ARGS);
    return pass.has_norms() ? std::get<0>(pass.run_group_penalty()) : pass.run_penalty({1, kNoTensor});
  }

  static std::tuple<Value, at::Tensor> penalty_and_norms(at::TensorList params, FUSED_REG_STRENGTHS) {
    ListPass pass(params, all_of(params.size()), FUSED_REG_STRENGTH_ARGS);
    TORCH_CHECK_VALUE(pass.has_norms(), "l2_norm must be given");
    return pass.run_group_penalty();
  }

  static std::tuple<Value, Tensors> penalty_and_grad(at::TensorList params, const c10::List<bool>& needs_grad,
                                                     FUSED_REG_STRENGTHS) {
    ListPass pass(params, all_of(params.size()), FUSED_REG_STRENGTH_ARGS);
    check_needs_grad(needs_grad.size(), params.size());
    std::vector<size_t> places;
    Tensors grads;
    grads.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      if (needs_grad[t]) {
        places.push_back(t);
        grads.push_back(ListPass::empty_grad(pass.dense(t)));
        pass.write_grad(t, grads.back());
      }
    }
    at::Tensor value = run_penalty_and_grad(pass, params, rows, {1, kNoTensor});
    for (const auto i : c10::irange(places.size())) {
      grads[i] = laid_out_as(params[places[i]], std::move(grads[i]));
    }
    return {std::move(value), std::move(grads)};
  }

  static Tensors penalty_grad(const at::Tensor& upstream, at::TensorList params, const c10::List<bool>& needs_grad,
                              const OptionalTensor& norms, at::IntArrayRef first_groups, FUSED_REG_STRENGTHS) {
    ListPass pass(params, selection_of(needs_grad, params.size()), FUSED_REG_STRENGTH_ARGS);
    check_number("upstream", {0, upstream}, params[0].device());
    Tensors grads;
    grads.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      grads.push_back(ListPass::empty_grad(pass.dense(t)));
      pass.write_grad(t, grads.back());
    }
    if (pass.has_norms()) {
      check_norms(norms, first_groups, params, rows);
    }
    pass.run_gradient({0, upstream}, norms, first_groups, /*keep_if_one=*/false);
    for (const auto t : c10::irange(params.size())) {
      grads[t] = laid_out_as(params[t], std::move(grads[t]));
    }
    return grads;
  }

  static void rescale_grad_(const at::Tensor& upstream, at::TensorList params, at::TensorList grads,
                            const c10::List<bool>& needs_grad, FUSED_REG_STRENGTHS) {
    ListPass pass(params, selection_of(needs_grad, params.size()), FUSED_REG_STRENGTH_ARGS);
    check_number("upstream", {0, upstream}, params[0].device());
    check_grads(grads.size(), params.size());
    for (const auto t : c10::irange(params.size())) {
      pass.write_grad(t, grads[t]);
    }
    pass.run_gradient({0, upstream}, std::nullopt, {}, /*keep_if_one=*/true);
  }

  static Value accumulate_grad_(at::TensorList params, at::TensorList grads, at::IntArrayRef modes, double scale,
                                const OptionalTensor& scale_tensor, FUSED_REG_STRENGTHS) {
    const at::NoGradGuard no_grad;
    check_params(params);
    check_number("scale", {scale, scale_tensor}, params[0].device());
    const std::vector<size_t> places = check_accumulation(params, grads, modes);
    // What the kernels read and write: pairs of one layout and dtype, copies where a gradient has another than its
    // parameter. The dtype is one that holds both exactly.
    Tensors read(params.begin(), params.end());
    Tensors written(grads.begin(), grads.end());
    const bool by_rows = rows && (!l2_norm.empty() || l2_norm_tensor.has_value());
    for (const auto i : c10::irange(places.size())) {
      const size_t t = places[i];
      const at::ScalarType dtype = c10::promoteTypes(grads[i].scalar_type(), params[t].scalar_type());
      written[i] = as_run(grads[i], by_rows);
      if (dtype != written[i].scalar_type()) {
        written[i] = written[i].to(dtype);
      }
      if (written[i].scalar_type() != params[t].scalar_type() || !has_layout_of(written[i], params[t])) {
        read[t] = at::empty_like(written[i]).copy_(params[t]);
      }
    }
    ListPass pass(read, all_of(params.size()), FUSED_REG_STRENGTH_ARGS);
    for (const auto i : c10::irange(places.size())) {
      if (modes[places[i]] == kAddGrad) {
        pass.add_grad(places[i], written[i]);
      } else {
        pass.write_grad(places[i], written[i]);
      }
    }
    at::Tensor value = run_penalty_and_grad(pass, params, rows, {scale, scale_tensor});
    for (const auto i : c10::irange(places.size())) {
      copy_back(written[i], grads[i]);
    }
    return value.to(value_dtype(params));
  }

  static Tensors empty_grads(at::TensorList params) {
    const c10::InferenceMode normal(false);  // they serve the next backward, whatever the mode now
    check_params(params);
    Tensors grads;
    grads.reserve(params.size());
    for (const at::Tensor& p : params) {
      grads.push_back(ListPass::empty_grad(p));
    }
    return grads;
  }

  static at::Tensor soft_norms(at::TensorList params, Floats step, const OptionalTensor& step_tensor,
                               FUSED_REG_STRENGTHS) {
    check_params(params);
    check_number_device("step", step_tensor, params[0].device());
    const Selection all = all_of(params.size());
    ListPass pass(params, all, FUSED_REG_STRENGTH_ARGS);
    TORCH_CHECK_VALUE(pass.has_norms(), "l2_norm must be given");
    return pass.run_soft_norms({"step", step, step_tensor}, all);
  }

  static void prox_(at::TensorList params, Floats step, const OptionalTensor& step_tensor, const OptionalTensor& norms,
                    at::IntArrayRef first_groups, FUSED_REG_STRENGTHS) {
    check_not_in_graph(params);
    const at::NoGradGuard no_grad;
    check_params(params);
    check_number_device("step", step_tensor, params[0].device());
    check_writable(params);
    const Selection all = all_of(params.size());
    ListPass pass(params, all, FUSED_REG_STRENGTH_ARGS);
    const StrengthArg steps{"step", step, step_tensor};
    if (!pass.has_norms()) {
      pass.run_prox(steps, all, std::nullopt, {});
    } else if (norms.has_value()) {
      check_norms(norms, first_groups, params, rows);
      pass.run_prox(steps, all, norms, first_groups);
    } else {
      pass.run_prox(steps, all, pass.run_soft_norms(steps, all), own_first_groups(params, rows));
    }
    for (const auto t : c10::irange(params.size())) {
      copy_back(pass.dense(t), params[t]);
    }
  }

  static at::Tensor group_norms(at::TensorList params, bool rows) {
    const double one = 1;
    const StrengthArgs norms{{"l1", {}, kNoTensor}, {"l2", {}, kNoTensor}, {"l2_norm", one, kNoTensor}, rows};
    return std::get<1>(ListPass(params, all_of(params.size()), norms).run_group_penalty());
  }

  static at::Tensor term_sums(at::TensorList params) {
    const double one = 1;
    const StrengthArgs ones{{"l1", one, kNoTensor}, {"l2", one, kNoTensor}, {"l2_norm", {}, kNoTensor}, false};
    return ListPass(params, all_of(params.size()), ones).run_term_sums();
  }

  static at::Tensor zero_counts(at::TensorList params) {
    const double one = 1;
    const StrengthArgs ones{{"l1", {}, kNoTensor}, {"l2", one, kNoTensor}, {"l2_norm", {}, kNoTensor}, false};
    return ListPass(params, all_of(params.size()), ones).run_zero_counts();
  }

 private:
  // After a pass that has written to `written`: that is the tensor, or a copy of it. Autograd shall notice.
  static void copy_back(const at::Tensor& written, const at::Tensor& tensor) {
    if (!written.is_same(tensor)) {
      tensor.copy_(written);
    } else if (!tensor.is_inference()) {
      tensor.unsafeGetTensorImpl()->bump_version();
    }
  }

  // The value, and the gradients that were asked for: one pass, or with norms two.
  static at::Tensor run_penalty_and_grad(ListPass& pass, at::TensorList params, bool rows, const NumberArg& scale) {
    if (!pass.has_norms()) {
      return pass.run_penalty(scale);
    }
    auto [value, norms] = pass.run_group_penalty();
    pass.run_gradient(scale, norms, own_first_groups(params, rows), /*keep_if_one=*/false);
    return value;
  }

  // Where the norms of each parameter begin in those that a pass over the same list gives.
  static std::vector<int64_t> own_first_groups(at::TensorList params, bool rows) {
    std::vector<int64_t> first_groups;
    int64_t groups = 0;
    for (const at::Tensor& p : params) {
      first_groups.push_back(groups);
      groups += groups_of(p, rows);
    }
    return first_groups;
  }
};

// The functions of one backend, under the names of ops.cpp.
#define FUSED_REG_OPERATORS(apply)                                                                                  \
  apply(penalty) apply(penalty_and_norms) apply(penalty_and_grad) apply(penalty_grad) apply(rescale_grad_)          \
      apply(accumulate_grad_) apply(empty_grads) apply(prox_) apply(soft_norms) apply(group_norms) apply(term_sums) \
          apply(zero_counts)

}  // namespace fused_reg
