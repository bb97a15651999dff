// Gives a backend's functions to torch's dispatcher.
#pragma once

#include "operators.h"
#include "torch_compat.h"

namespace fused_reg {

template <class Functions>
void register_operators(torch::Library& m) {
#define FUSED_REG_REGISTER(name) m.impl(#name, TORCH_FN(Functions::name));
  FUSED_REG_OPERATORS(FUSED_REG_REGISTER)
#undef FUSED_REG_REGISTER
}

}  // namespace fused_reg
