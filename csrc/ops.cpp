// The operators' schemas. Each backend registers its own kernels, in its own folder; operators.h says what they do, and
// numbers.h how the strengths of a list are given.

#include "operators.h"
#include "torch_compat.h"

#define NUMBERS FUSED_REG_NUMBERS_SCHEMA

TORCH_LIBRARY(fused_reg, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  // In one pass (on a GPU with l2_norm two): the penalty of the whole list, 0-dim, float64 if any parameter is, else
  // float32; the gradient of every parameter whose needs_grad is true (none if that is empty); and with l2_norm, one
  // tensor: the norm of every group, [groups] float64, those of the first parameter, of the second, ...; an empty one
  // has none.
  m.def("penalty(Tensor[] params, bool[] needs_grad, " NUMBERS ") -> (Tensor, Tensor[], Tensor[])", tags);

  // upstream * d(penalty)/d(param). The parameters are those of a list that need a gradient; needs_grad and the numbers
  // belong to the whole list. With l2_norm: the norms that penalty gave for the whole list, and where those of each
  // parameter begin.
  m.def(
      "penalty_grad(Tensor upstream, Tensor[] params, bool[] needs_grad, Tensor? norms, SymInt[] "
      "first_groups, " NUMBERS ") -> Tensor[]",
      tags);

  // The same, written over gradients that penalty has computed for an upstream gradient of 1. Where upstream is 1,
  // nothing is read or written.
  m.def(
      "rescale_grad_(Tensor upstream, Tensor[] params, Tensor(a!)[] grads, bool[] needs_grad, Tensor? norms, SymInt[] "
      "first_groups, " NUMBERS ") -> ()",
      tags);

  // The penalty; and scale * its gradient in grads, which has one for each parameter whose mode is not 0 (not wanted):
  // 1 written over what is there, 2 added to it.
  m.def("accumulate_grad_(Tensor[] params, Tensor(a!)[] grads, int[] modes, float scale, Tensor? scale_tensor, " NUMBERS
        ") -> Tensor",
        tags);

  // Memory for the gradient of every parameter, of its shape and dtype, and of its strides where these are dense.
  m.def("empty_grads(Tensor[] params) -> Tensor[]", tags);

  // These numbers as a tensor, float64, where the other is. On a GPU nothing waits for them, and a graph that captures
  // the call has them in it.
  m.def("numbers(Tensor like, float[] values) -> Tensor", tags);

  // The proximal operator of step * penalty, in place. With l2_norm it takes norms that the operator of that name gave,
  // and where those of each parameter begin, or finds them itself.
  m.def("prox_(Tensor(a!)[] params, Tensor? norms, SymInt[] first_groups, " NUMBERS ") -> ()", tags);

  // A step of an optimizer (passes/step.h), and the penalty before it, float64. states: one list of all parameters
  // after the other; steps: how many each has made, counted on, or none; is_first: of each, or none; rates: four
  // numbers for each parameter, or for all. Where found_inf is not 0, nothing is written, and the value has no meaning.
  m.def(
      "step_(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, bool[] is_first, int "
      "optimizer, int options, float[] rates, Tensor? grad_scale, Tensor? found_inf, " NUMBERS ") -> Tensor",
      tags);

  // The norm of every group after the soft threshold step * l1, as penalty gives those before it.
  m.def("norms(Tensor[] params, " NUMBERS ") -> Tensor", tags);

  // [number of params, terms (+ 1)] float64: the sum of each term over each parameter, that of |w|, of w^2, and of
  // smooth L1, MCP and SCAD where their strengths are given, else 0; and how many of its elements are 0, if asked for.
  m.def("sums(Tensor[] params, bool with_zeros, " NUMBERS ") -> Tensor", tags);
}

// The derivatives are those of fused_reg's autograd functions. Without this, torch's own fallback would wrap every
// call, only to warn of a backward that nobody has written: 2 us.
TORCH_LIBRARY_IMPL(fused_reg, Autograd, m) {
#define FUSED_REG_FALL_THROUGH(name) m.impl(#name, torch::CppFunction::makeFallthrough());
  FUSED_REG_OPERATORS(FUSED_REG_FALL_THROUGH)
}

namespace fused_reg {

static void refuse_vmap(const c10::OperatorHandle&, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "torch.func.vmap is not supported, but for fused_penalty");
}

}  // namespace fused_reg

TORCH_LIBRARY_IMPL(fused_reg, FuncTorchBatched, m) {
#define FUSED_REG_REFUSE(name) m.impl(#name, torch::CppFunction::makeFromBoxedFunction<&fused_reg::refuse_vmap>());
  FUSED_REG_OPERATORS(FUSED_REG_REFUSE)
}
