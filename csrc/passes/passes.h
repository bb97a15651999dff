// The passes: name, the terms that it is compiled for, and how many of the numbers it needs at most. Those of lists
// without groups and further terms need the numbers of L1 and L2 alone.
#pragma once

#include "prox.h"
#include "step.h"
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
  apply(Prox, kL1 | kFurther, kNumbers)          \
  apply(SoftSquares, kNone, kGroupNumbers)       \
  apply(Zeros, kNone, kGroupNumbers)

// Those of optimizers, by number.
#define FUSED_REG_STEPS(apply)           \
  apply(Sgd, kL1L2, kGroupNumbers)       \
  apply(Adam, kL1L2, kGroupNumbers)      \
  apply(Rmsprop, kL1L2, kGroupNumbers)   \
  apply(Adagrad, kL1L2, kGroupNumbers)
// clang-format on

enum class Pass {
#define FUSED_REG_ENUMERATE(name, terms, numbers) k##name,
  FUSED_REG_PASSES(FUSED_REG_ENUMERATE) FUSED_REG_STEPS(FUSED_REG_ENUMERATE)
#undef FUSED_REG_ENUMERATE
      kCount,
};

inline Pass step_of(int64_t optimizer) { return static_cast<Pass>(static_cast<int64_t>(Pass::kSgd) + optimizer); }
constexpr int64_t kOptimizers = static_cast<int64_t>(Pass::kCount) - static_cast<int64_t>(Pass::kSgd);

// The streams that a pass reads and writes, a bit each.
struct StreamUse {
  unsigned reads, writes;
};

inline StreamUse streams_used(Pass pass) {
  switch (pass) {
#define FUSED_REG_USED(name, terms, numbers) \
  case Pass::k##name:                        \
    return {name##Pass<terms>::kReads | bit(0), name##Pass<terms>::kWrites};
    FUSED_REG_PASSES(FUSED_REG_USED)
    FUSED_REG_STEPS(FUSED_REG_USED)
#undef FUSED_REG_USED
    default:
      return {};
  }
}

// The streams of an optimizer's states, a bit each.
inline unsigned state_streams(Pass step, unsigned options) {
  switch (step) {
#define FUSED_REG_STATES(name, terms, numbers) \
  case Pass::k##name:                          \
    return name##Pass<terms>::states(options);
    FUSED_REG_STEPS(FUSED_REG_STATES)
#undef FUSED_REG_STATES
    default:
      return 0;
  }
}

}  // namespace fused_reg
