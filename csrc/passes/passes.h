// The passes: name, the terms that it is compiled for, and how many of the numbers it needs at most. Those of lists
// without groups and further terms need the numbers of L1 and L2 alone.
#pragma once

#include "prox.h"
#include "terms.h"
#include "zeros.h"

namespace fused_reg {

// clang-format off
#define FUSED_REG_PASSES(apply)                  \
  apply(Penalty, kL1L2, kNumbers)                \
  apply(PenaltyGradient, kL1L2, kTermNumbers)    \
  apply(PenaltyAccumulate, kL1L2, kTermNumbers)  \
  apply(Gradient, kAllTerms, kTermNumbers)       \
  apply(Accumulate, kAllTerms, kNumbers)         \
  apply(Prox, kFurther, kNumbers)                \
  apply(SoftSquares, kNone, kGroupNumbers)       \
  apply(Zeros, kNone, kGroupNumbers)
// clang-format on

enum class Pass {
#define FUSED_REG_ENUMERATE(name, terms, numbers) k##name,
  FUSED_REG_PASSES(FUSED_REG_ENUMERATE)
#undef FUSED_REG_ENUMERATE
};

}  // namespace fused_reg
