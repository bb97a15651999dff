// The operators' schemas. Each backend registers its own kernels, in its own folder.
//
// A strength is given as floats (none: the term is absent; one; one per parameter), or as a tensor of one
// or of one per parameter, which wins and may live on the parameters' device.
#include <torch/library.h>

TORCH_LIBRARY(fused_reg, m) {
  // The penalty of the whole list, 0-dim: float64 if any parameter is, else float32.
  m.def("penalty(Tensor[] params, float[] l1, float[] l2, Tensor? l1_tensor, Tensor? l2_tensor) -> Tensor",
        {at::Tag::pt2_compliant_tag});

  // The penalty, and in the same pass the gradient of every parameter whose needs_grad is true.
  m.def(
      "penalty_and_grad(Tensor[] params, bool[] needs_grad, float[] l1, float[] l2, Tensor? l1_tensor, "
      "Tensor? l2_tensor) -> (Tensor, Tensor[])",
      {at::Tag::pt2_compliant_tag});

  // upstream * d(penalty)/d(param). The parameters are those of a list that need a gradient; needs_grad and the
  // strengths belong to the whole list.
  m.def(
      "penalty_grad(Tensor upstream, Tensor[] params, bool[] needs_grad, float[] l1, float[] l2, Tensor? l1_tensor, "
      "Tensor? l2_tensor) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});

  // The same, written over gradients that penalty_and_grad has computed for an upstream gradient of 1.
  // Where upstream is 1, nothing is read or written.
  m.def(
      "rescale_grad_(Tensor upstream, Tensor[] params, Tensor(a!)[] grads, bool[] needs_grad, float[] l1, float[] l2, "
      "Tensor? l1_tensor, Tensor? l2_tensor) -> ()",
      {at::Tag::pt2_compliant_tag});

  // [number of params, 2] float64: the sum of |w| and the sum of w^2 of each parameter.
  m.def("term_sums(Tensor[] params) -> Tensor", {at::Tag::pt2_compliant_tag});
}
