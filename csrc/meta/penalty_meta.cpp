// Shapes and dtypes without data: what meta tensors, FakeTensorMode and torch.compile run.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../checks.h"
#include "../layout.h"
#include "../registration.h"

namespace fused_reg {

namespace {

using Tensors = std::vector<at::Tensor>;

struct Meta {
  static void check(at::TensorList params) {
    check_params(params);
    check_meta(params);
  }

  static at::Tensor penalty(at::TensorList params, FUSED_REG_STRENGTHS) {
    check(params);
    return at::empty({}, params[0].options().dtype(value_dtype(params)));
  }

  static at::Tensor group_norms(at::TensorList params, bool rows) {
    check(params);
    c10::SymInt groups = 0;
    for (const at::Tensor& p : params) {
      if (p.sym_numel() != 0) {
        groups += rows && p.dim() > 0 ? p.sym_size(0) : 1;
      }
    }
    return at::empty_symint({groups}, params[0].options().dtype(at::kDouble));
  }

  static std::tuple<at::Tensor, at::Tensor> penalty_and_norms(at::TensorList params, FUSED_REG_STRENGTHS) {
    return {at::empty({}, params[0].options().dtype(value_dtype(params))), group_norms(params, rows)};
  }

  static std::tuple<at::Tensor, Tensors> penalty_and_grad(at::TensorList params, const c10::List<bool>& needs_grad,
                                                          FUSED_REG_STRENGTHS) {
    check(params);
    Tensors grads;
    for (const auto t : c10::irange(params.size())) {
      if (needs_grad[t]) {
        grads.push_back(at::empty_like(params[t]));
      }
    }
    return {at::empty({}, params[0].options().dtype(value_dtype(params))), std::move(grads)};
  }

  static Tensors penalty_grad(const at::Tensor&, at::TensorList params, const c10::List<bool>&, const OptionalTensor&,
                              c10::SymIntArrayRef, FUSED_REG_STRENGTHS) {
    check(params);
    Tensors grads;
    for (const at::Tensor& p : params) {
      grads.push_back(at::empty_like(p));
    }
    return grads;
  }

  static void rescale_grad_(const at::Tensor&, at::TensorList, at::TensorList, const c10::List<bool>&,
                            FUSED_REG_STRENGTHS) {}

  static at::Tensor accumulate_grad_(at::TensorList params, at::TensorList, at::IntArrayRef, double,
                                     const OptionalTensor&, FUSED_REG_STRENGTHS) {
    check(params);
    return at::empty({}, params[0].options().dtype(value_dtype(params)));
  }

  static Tensors empty_grads(at::TensorList params) {
    check(params);
    Tensors grads;
    for (const at::Tensor& p : params) {
      grads.push_back(at::empty_like(p));
    }
    return grads;
  }

  static void prox_(at::TensorList params, Floats, const OptionalTensor&, const OptionalTensor&, c10::SymIntArrayRef,
                    FUSED_REG_STRENGTHS) {
    check(params);
  }

  static at::Tensor soft_norms(at::TensorList params, Floats, const OptionalTensor&, FUSED_REG_STRENGTHS) {
    return group_norms(params, rows);
  }

  static at::Tensor term_sums(at::TensorList params) {
    check(params);
    return at::empty({static_cast<int64_t>(params.size()), 2}, params[0].options().dtype(at::kDouble));
  }

  static at::Tensor zero_counts(at::TensorList params) {
    check(params);
    return at::empty({static_cast<int64_t>(params.size())}, params[0].options().dtype(at::kLong));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_reg, Meta, m) { register_operators<Meta>(m); }

}  // namespace fused_reg
