// Shapes and dtypes without data: what meta tensors, FakeTensorMode and torch.compile run.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../checks.h"

namespace fused_reg {

namespace {

using Floats = at::ArrayRef<double>;
using OptionalTensor = std::optional<at::Tensor>;

at::Tensor penalty(at::TensorList params, Floats, Floats, const OptionalTensor&, const OptionalTensor&) {
  check_params(params);
  check_meta(params);
  bool any_float64 = false;
  for (const at::Tensor& p : params) {
    any_float64 |= p.scalar_type() == at::kDouble;
  }
  return at::empty({}, params[0].options().dtype(any_float64 ? at::kDouble : at::kFloat));
}

std::tuple<at::Tensor, std::vector<at::Tensor>> penalty_and_grad(at::TensorList params,
                                                                 const c10::List<bool>& needs_grad, Floats l1,
                                                                 Floats l2, const OptionalTensor& l1_tensor,
                                                                 const OptionalTensor& l2_tensor) {
  at::Tensor value = penalty(params, l1, l2, l1_tensor, l2_tensor);
  std::vector<at::Tensor> grads;
  for (const auto t : c10::irange(params.size())) {
    if (needs_grad[t]) {
      grads.push_back(at::empty_like(params[t]));
    }
  }
  return {std::move(value), std::move(grads)};
}

std::vector<at::Tensor> penalty_grad(const at::Tensor&, at::TensorList params, const c10::List<bool>&, Floats, Floats,
                                     const OptionalTensor&, const OptionalTensor&) {
  check_params(params);
  check_meta(params);
  std::vector<at::Tensor> grads;
  for (const at::Tensor& p : params) {
    grads.push_back(at::empty_like(p));
  }
  return grads;
}

void rescale_grad_(const at::Tensor&, at::TensorList, at::TensorList, const c10::List<bool>&, Floats, Floats,
                   const OptionalTensor&, const OptionalTensor&) {}

at::Tensor term_sums(at::TensorList params) {
  check_params(params);
  return at::empty({static_cast<int64_t>(params.size()), 2}, params[0].options().dtype(at::kDouble));
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_reg, Meta, m) {
  m.impl("penalty", TORCH_FN(penalty));
  m.impl("penalty_and_grad", TORCH_FN(penalty_and_grad));
  m.impl("penalty_grad", TORCH_FN(penalty_grad));
  m.impl("rescale_grad_", TORCH_FN(rescale_grad_));
  m.impl("term_sums", TORCH_FN(term_sums));
}

}  // namespace fused_reg
