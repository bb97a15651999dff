// The CPU backend of the operators in ops.cpp.
#include <torch/library.h>

#include "list_pass.h"

namespace fused_reg {

namespace {

using Floats = at::ArrayRef<double>;
using OptionalTensor = std::optional<at::Tensor>;

ListPass make_pass(at::TensorList params, const Selection& selection, Floats l1, Floats l2,
                   const OptionalTensor& l1_tensor, const OptionalTensor& l2_tensor) {
  check_params(params);
  return {params, {{{"l1", l1, l1_tensor}, selection}, {{"l2", l2, l2_tensor}, selection}}};
}

at::Tensor penalty(at::TensorList params, Floats l1, Floats l2, const OptionalTensor& l1_tensor,
                   const OptionalTensor& l2_tensor) {
  ListPass pass = make_pass(params, all_of(params.size()), l1, l2, l1_tensor, l2_tensor);
  pass.run();
  return pass.penalty();
}

std::tuple<at::Tensor, std::vector<at::Tensor>> penalty_and_grad(at::TensorList params,
                                                                 const c10::List<bool>& needs_grad, Floats l1,
                                                                 Floats l2, const OptionalTensor& l1_tensor,
                                                                 const OptionalTensor& l2_tensor) {
  ListPass pass = make_pass(params, all_of(params.size()), l1, l2, l1_tensor, l2_tensor);
  check_needs_grad(needs_grad.size(), params.size());
  std::vector<at::Tensor> grads;
  grads.reserve(params.size());
  for (const auto t : c10::irange(params.size())) {
    if (needs_grad[t]) {
      grads.push_back(pass.fresh_grad(t));
      pass.write_grad(t, grads.back(), 1, Pass::kSumsAndGradient);
    }
  }
  pass.run();
  return {pass.penalty(), std::move(grads)};
}

std::vector<at::Tensor> penalty_grad(const at::Tensor& upstream, at::TensorList params,
                                     const c10::List<bool>& needs_grad, Floats l1, Floats l2,
                                     const OptionalTensor& l1_tensor, const OptionalTensor& l2_tensor) {
  ListPass pass = make_pass(params, selection_of(needs_grad, params.size()), l1, l2, l1_tensor, l2_tensor);
  const double factor = upstream.item<double>();
  std::vector<at::Tensor> grads;
  grads.reserve(params.size());
  for (const auto t : c10::irange(params.size())) {
    grads.push_back(pass.fresh_grad(t));
    pass.write_grad(t, grads.back(), factor, Pass::kGradient);
  }
  pass.run();
  return grads;
}

void rescale_grad_(const at::Tensor& upstream, at::TensorList params, at::TensorList grads,
                   const c10::List<bool>& needs_grad, Floats l1, Floats l2, const OptionalTensor& l1_tensor,
                   const OptionalTensor& l2_tensor) {
  const double factor = upstream.item<double>();
  if (factor == 1) {
    return;
  }
  ListPass pass = make_pass(params, selection_of(needs_grad, params.size()), l1, l2, l1_tensor, l2_tensor);
  check_grads(grads.size(), params.size());
  for (const auto t : c10::irange(params.size())) {
    pass.write_grad(t, grads[t], factor, Pass::kGradient);
  }
  pass.run();
}

at::Tensor term_sums(at::TensorList params) {
  const double one = 1;
  ListPass pass = make_pass(params, all_of(params.size()), one, one, std::nullopt, std::nullopt);
  pass.run();
  at::Tensor out = at::empty({static_cast<int64_t>(params.size()), 2}, at::kDouble);
  double* row = out.mutable_data_ptr<double>();
  for (const auto t : c10::irange(params.size())) {
    const ChunkSums sums = pass.term_sums(t);
    *row++ = sums.l1;
    *row++ = sums.l2;
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_reg, CPU, m) {
  m.impl("penalty", TORCH_FN(penalty));
  m.impl("penalty_and_grad", TORCH_FN(penalty_and_grad));
  m.impl("penalty_grad", TORCH_FN(penalty_grad));
  m.impl("rescale_grad_", TORCH_FN(rescale_grad_));
  m.impl("term_sums", TORCH_FN(term_sums));
}

}  // namespace fused_reg
