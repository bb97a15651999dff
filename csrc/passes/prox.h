// The proximal operator, and what its norms come from.
#pragma once

#include "pass.h"

namespace fused_reg {

// Of further terms, one after the other.
template <class List>
struct FurtherProx;
template <class... T>
struct FurtherProx<TermList<T...>> {
  static constexpr int kFactors = (0 + ... + T::kProxFactors);

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    ((T::prox_factors(n, f), f += T::kProxFactors), ...);
  }

  template <class V>
  static FUSED_REG_INLINE V of(V w, const V* f) {
    ((w = T::prox(w, f), f += T::kProxFactors), ...);
    return w;
  }
};

// In place; the norm is that after the soft threshold. terms: with further ones, or none.
template <int terms>
struct ProxPass : AnyPass {
  using Further = FurtherProx<std::conditional_t<terms == kNone, TermList<>, FurtherTerms>>;
  enum { kThreshold, kShrinkage, kFirst };
  static constexpr unsigned kReads = bit(0), kWrites = bit(0);
  static constexpr bool kPositiveZeros = true;
  static constexpr int kFactors = kFirst + Further::kFactors;

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    f[kThreshold] = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
    f[kShrinkage] = static_cast<S>(shrinkage(n.of[kL2Strength], n.of[kNormStrength], n.of[kStep], n.norm));
    Further::factors(n, f + kFirst);
  }

  // A zero is +0.
  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[0] = Further::of(soft(x[0], f[kThreshold]) * f[kShrinkage], f + kFirst) + V{};
  }
};

// The sum of soft(w)^2, in the place of that of L2.
template <int>
struct SoftSquaresPass : AnyPass {
  using Sums = SoftSquaresPass;
  static constexpr unsigned kSums = kL2;
  static constexpr int kSumFactors = 1;

  template <class S>
  static FUSED_REG_INLINE void sum_factors(const ChunkNumbers& n, int, double* f) {
    f[0] = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
  }

  // The square of soft(w) in float64 is not exact.
  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D* f, const Scaled& scaled) {
    sums[1] = L2::add<TwoRoundings>(sums[1], scaled(soft(w, f[0])));
  }
};

}  // namespace fused_reg
