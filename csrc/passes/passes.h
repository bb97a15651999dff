// The passes: name, the terms that it is compiled for, and how many of the numbers it needs at most. Those of lists
// without groups and further terms need the numbers of L1 and L2 alone.
#pragma once

#include <vector>

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
  apply(Prox, kFurther, kNumbers)                \
  apply(SoftSquares, kNone, kGroupNumbers)       \
  apply(Zeros, kNone, kGroupNumbers)             \
  apply(Sgd, kNone, kNumbers)                    \
  apply(Adam, kNone, kNumbers)                   \
  apply(Rmsprop, kNone, kNumbers)                \
  apply(Adagrad, kNone, kNumbers)
// clang-format on

enum class Pass {
#define FUSED_REG_ENUMERATE(name, terms, numbers) k##name,
  FUSED_REG_PASSES(FUSED_REG_ENUMERATE)
#undef FUSED_REG_ENUMERATE
};

// Optimizers by number.
inline Pass optimizer_pass(int64_t optimizer) { return static_cast<Pass>(static_cast<int64_t>(Pass::kSgd) + optimizer); }

// The streams of an optimizer's states, in the order in which they are given.
inline std::vector<int> state_streams(Pass optimizer, unsigned options) {
  switch (optimizer) {
    case Pass::kSgd:
      return options & kMomentum ? std::vector<int>{2} : std::vector<int>{};
    case Pass::kAdam:
      return options & kAmsgrad ? std::vector<int>{2, 3, 4} : std::vector<int>{2, 3};
    case Pass::kRmsprop: {
      std::vector<int> streams{2};
      if (options & kMomentum) {
        streams.push_back(3);
      }
      if (options & kCentered) {
        streams.push_back(4);
      }
      return streams;
    }
    default:
      return {2};
  }
}

}  // namespace fused_reg
