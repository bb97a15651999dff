// The operators' schemas. Each backend registers its own kernels, in its own folder; operators.h says what they do.
//
// A strength is given as floats (none: the term is absent; one; one per parameter), or as a tensor of one
// or of one per parameter, which wins and may live on the parameters' device. The groups of l2_norm are whole tensors,
// or with `rows` the slices of each along dimension 0.
#include <torch/library.h>

#include "checks.h"
#include "operators.h"

#define STRENGTHS                                                                                           \
  "float[] l1, float[] l2, float[] l2_norm, Tensor? l1_tensor, Tensor? l2_tensor, Tensor? l2_norm_tensor, " \
  "bool rows"

TORCH_LIBRARY(fused_reg, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  // The penalty of the whole list, 0-dim: float64 if any parameter is, else float32.
  m.def("penalty(Tensor[] params, " STRENGTHS ") -> Tensor", tags);

  // The penalty, and the norm of every group, [groups] float64: those of the first parameter, of the second, ...; an
  // empty parameter has none.
  m.def("penalty_and_norms(Tensor[] params, " STRENGTHS ") -> (Tensor, Tensor)", tags);

  // The penalty, and in the same pass (with l2_norm: in a second one) the gradient of every parameter whose needs_grad
  // is true.
  m.def("penalty_and_grad(Tensor[] params, bool[] needs_grad, " STRENGTHS ") -> (Tensor, Tensor[])", tags);

  // upstream * d(penalty)/d(param). The parameters are those of a list that need a gradient; needs_grad and the
  // strengths belong to the whole list. With l2_norm: the norms that penalty_and_norms gave for the whole list, and
  // where those of each parameter begin.
  m.def(
      "penalty_grad(Tensor upstream, Tensor[] params, bool[] needs_grad, Tensor? norms, SymInt[] "
      "first_groups, " STRENGTHS ") -> Tensor[]",
      tags);

  // The same without l2_norm, written over gradients that penalty_and_grad has computed for an upstream gradient of 1.
  // Where upstream is 1, nothing is read or written.
  m.def("rescale_grad_(Tensor upstream, Tensor[] params, Tensor(a!)[] grads, bool[] needs_grad, " STRENGTHS ") -> ()",
        tags);

  // The penalty; and scale * its gradient in grads, which has one for each parameter whose mode is not 0 (not wanted):
  // 1 written over what is there, 2 added to it.
  m.def(
      "accumulate_grad_(Tensor[] params, Tensor(a!)[] grads, int[] modes, float scale, Tensor? scale_tensor, " STRENGTHS
      ") -> Tensor",
      tags);

  // Memory for the gradient of every parameter, of its shape and dtype, and of its strides where these are dense.
  m.def("empty_grads(Tensor[] params) -> Tensor[]", tags);

  // The proximal operator of step * penalty, in place. A step is given as a strength is. With l2_norm it takes norms
  // that soft_norms gave, and where those of each parameter begin, or finds them itself.
  m.def("prox_(Tensor(a!)[] params, float[] step, Tensor? step_tensor, Tensor? norms, SymInt[] first_groups, " STRENGTHS
        ") -> ()",
        tags);

  // The norm of every group after the soft threshold step * l1, as penalty_and_norms gives those before it.
  m.def("soft_norms(Tensor[] params, float[] step, Tensor? step_tensor, " STRENGTHS ") -> Tensor", tags);

  // The errors that accumulate_grad_ and prox_ would raise, for lists that they are given in parts.
  m.def("check_accumulation(Tensor[] params, Tensor[] grads, int[] modes) -> ()",
        [](at::TensorList params, at::TensorList grads, at::IntArrayRef modes) {
          fused_reg::check_dtypes(params);
          fused_reg::check_accumulation(params, grads, modes);
        });
  m.def("check_writable(Tensor[] params) -> ()", [](at::TensorList params) {
    fused_reg::check_dtypes(params);
    fused_reg::check_not_in_graph(params);
    fused_reg::check_writable(params);
  });

  // The norm of every group, as penalty_and_norms gives it.
  m.def("group_norms(Tensor[] params, bool rows) -> Tensor", tags);

  // [number of params, 2] float64: the sum of |w| and the sum of w^2 of each parameter.
  m.def("term_sums(Tensor[] params) -> Tensor", tags);

  // [number of params] int64: how many elements of each parameter are 0.
  m.def("zero_counts(Tensor[] params) -> Tensor", tags);
}

// The derivatives are those of fused_reg's autograd functions. Without this, torch's own fallback would wrap every
// call, only to warn of a backward that nobody has written: 2 us.
TORCH_LIBRARY_IMPL(fused_reg, Autograd, m) {
#define FUSED_REG_FALL_THROUGH(name) m.impl(#name, torch::CppFunction::makeFallthrough());
  FUSED_REG_OPERATORS(FUSED_REG_FALL_THROUGH)
}
