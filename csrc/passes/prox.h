// The proximal operator, and what its norms come from.
#pragma once

#include "pass.h"

namespace fused_reg {

// In place; the norm is that after the soft threshold.
template <int>
struct ProxPass : AnyPass {
  static constexpr unsigned kReads = bit(0), kWrites = bit(0);
  static constexpr bool kPositiveZeros = true;
  enum { kThreshold, kShrinkage, kFactors };

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    f[kThreshold] = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
    f[kShrinkage] = static_cast<S>(shrinkage(n.of[kL2Strength], n.of[kNormStrength], n.of[kStep], n.norm));
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[0] = prox(x[0], f[kThreshold], f[kShrinkage]);
  }
};

// The sum of soft(w)^2, in the place of that of L2.
template <int>
struct SoftSquaresPass : AnyPass {
  using Sums = SoftSquaresPass;
  static constexpr unsigned kSums = kL2;
  enum { kThreshold, kFactors };

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    f[kThreshold] = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
  }

  // The square of soft(w) in float64 is not exact.
  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D* f, const Scaled& scaled) {
    sums[1] = add_l2_term<TwoRoundings>(sums[1], scaled(soft(w, f[kThreshold])));
  }
};

}  // namespace fused_reg
