// The sums of the terms, their gradient, or both.
#pragma once

#include "pass.h"

namespace fused_reg {

// The sum of each term over a chunk.
template <int terms>
struct PenaltyPass : AnyPass {
  using Sums = PenaltyPass;
  static constexpr unsigned kSums = terms & kL1L2;

  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D*, const Scaled& scaled) {
    if constexpr (terms & kL1) {
      sums[0] = add_l1_term(sums[0], scaled(w));
    }
    if constexpr (terms & kL2) {
      sums[1] = add_l2_term<MultiplyAdd>(sums[1], scaled(w));
    }
  }
};

// out = factor * gradient
template <int terms>
struct GradientPass : AnyPass {
  static constexpr unsigned kReads = bit(0), kWrites = bit(1);
  enum { kC1, kC2, kNormScale, kNormFactor, kFactors };

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    f[kC1] = terms & kL1 ? gradient_factor<S>(n.factor, n.of[kL1Strength]) : 0;
    f[kC2] = terms & kL2 ? gradient_factor<S>(n.factor, n.of[kL2Strength]) : 0;
    if constexpr (terms & kNorm) {
      const NormGradient<S> norm = norm_gradient<S>(n.factor, n.of[kNormStrength], n.norm);
      f[kNormScale] = norm.scale;
      f[kNormFactor] = norm.factor;
    } else {
      f[kNormScale] = f[kNormFactor] = 0;
    }
  }

  template <class V>
  static FUSED_REG_INLINE V of(V w, const V* f) {
    const V g = gradient<(terms & kL1L2)>(w, f[kC1], f[kC2]);
    if constexpr (terms & kNorm) {
      return add_norm_gradient(g, w, f[kNormScale], f[kNormFactor]);
    } else {
      return g;
    }
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[1] = of(x[0], f);
  }
};

// out = out + factor * gradient
template <int terms>
struct AccumulatePass : GradientPass<terms> {
  using Fresh = GradientPass<terms>;
  static constexpr unsigned kReads = bit(0) | bit(1);

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[1] = x[1] + GradientPass<terms>::of(x[0], f);
  }
};

// A pass over the gradient that takes the sums of the terms, too.
template <template <int> class Gradient, int terms>
struct WithSums : Gradient<terms> {
  using Sums = PenaltyPass<terms>;
  static constexpr unsigned kSums = PenaltyPass<terms>::kSums;

  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D* f, const Scaled& scaled) {
    PenaltyPass<terms>::template add<MultiplyAdd>(sums, w, f, scaled);
  }
};

template <int terms>
using PenaltyGradientPass = WithSums<GradientPass, terms>;
template <int terms>
using PenaltyAccumulatePass = WithSums<AccumulatePass, terms>;

}  // namespace fused_reg
