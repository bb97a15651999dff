// The proximal operator, and what its norms come from.
#pragma once

#include "pass.h"

namespace fused_reg {

// In place; the norm is that after the soft threshold. terms: L1 and further ones, L1, or neither.
template <int terms>
struct ProxPass : AnyPass {
  using Further = std::conditional_t<(terms & kFurther) == 0, TermList<>, FurtherTerms>;
  static constexpr unsigned kReads = bit(0), kWrites = bit(0);
  static constexpr bool kPositiveZeros = true;

  // Those of L1, of L2 and the norm, and of each further term.
  template <class... T>
  static constexpr int factors_of(TermList<T...>) {
    return (2 + ... + T::kProxFactors);
  }
  static constexpr int kFactors = factors_of(Further{});

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    *f++ = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
    *f++ = static_cast<S>(shrinkage(n.of[kL2Strength], n.of[kNormStrength], n.of[kStep], n.norm));
    Further::each([&](auto term) {
      using T = decltype(term);
      T::prox_factors(n, f);
      f += T::kProxFactors;
    });
  }

  // A zero is +0, also one that comes from shrinkage.
  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    V w = (terms & kL1 ? soft(x[0], f[0]) : x[0]) * f[1];
    f += 2;
    Further::each([&](auto term) {
      using T = decltype(term);
      w = T::prox(w, f);
      f += T::kProxFactors;
    });
    x[0] = w + V{};
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
