// The proximal operator, and what its norms come from.
#pragma once

#include "pass.h"

namespace fused_reg {

// In place; the norm is that after the soft threshold. terms: L1 and further ones, L1, or neither; or the first of
// these, relative: what is left of the difference is added to the reference weight.
template <int terms>
struct ProxPass : AnyPass {
  using Further = std::conditional_t<(terms & kFurther) == 0, TermList<>, FurtherProx>;
  static constexpr bool kIsRelative = (terms & kRelative) != 0, kPositiveZeros = true;
  static constexpr unsigned kReads = bit(0) | relative_streams(terms), kWrites = bit(0);
  static constexpr unsigned kOptional = relative_streams(terms);

  // Those of L1, of L2 and the norm, and of each further term. Relative: the steps of L1 and of others, the share that
  // the norm leaves, the strength of L2, and the numbers of each further term.
  template <class... T>
  static constexpr int factors_of(TermList<T...>) {
    return kIsRelative ? (4 + ... + T::kProxNumbers) : (2 + ... + T::kProxFactors);
  }
  static constexpr int kFactors = factors_of(Further{});

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    if constexpr (kIsRelative) {
      *f++ = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
      *f++ = static_cast<S>(n.of[kStep]);
      *f++ = static_cast<S>(share_of_norm(n));
      *f++ = static_cast<S>(n.of[kL2Strength]);
      Further::each([&](auto term) {
        using T = decltype(term);
        T::prox_numbers(n, f);
        f += T::kProxNumbers;
      });
      return;
    }
    *f++ = static_cast<S>(n.of[kStep] * n.of[kL1Strength]);
    *f++ = static_cast<S>(L2::prox(share_of_norm(n), n.of[kStep], n.of[kL2Strength]));
    Further::each([&](auto term) {
      using T = decltype(term);
      T::prox_factors(n, f);
      f += T::kProxFactors;
    });
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[0] = shrunk(x[0], x, f);
  }

  // Of a weight, and the streams beside it. A zero is +0, also one that comes from shrinkage.
  template <class V>
  static FUSED_REG_INLINE V shrunk(V w, const V* x, const V* f) {
    if constexpr (kIsRelative) {
      return moved(w, x, [&](V d) __attribute__((always_inline)) { return of_difference(d, x[kImportance], f); });
    } else {
      w = (terms & kL1 ? soft(w, f[0]) : w) * f[1];
      f += 2;
      Further::each([&](auto term) {
        using T = decltype(term);
        w = T::prox(w, f);
        f += T::kProxFactors;
      });
      return w + V{};
    }
  }

  // The weight whose difference is prox(that of w). Where that is the same, so is the weight, to the bit.
  template <class V, class Prox>
  static FUSED_REG_INLINE V moved(V w, const V* x, const Prox& prox) {
    const V d = difference<terms>(w, x), left = prox(d);
    return (left == d ? w : x[kToward] + left) + V{};
  }

 private:
  static FUSED_REG_INLINE double share_of_norm(const ChunkNumbers& n) {
    return fused_reg::share_of_norm(n.of[kL2Strength], n.of[kNormStrength], n.of[kMaxNorm], n.of[kStep], n.norm);
  }

  template <class V>
  static FUSED_REG_INLINE V of_difference(V d, V importance, const V* f) {
    const V step = f[1] * importance;
    V w = L2::prox(soft(d, f[0] * importance) * f[2], step, f[3]);
    const V rest = L2::prox(step, step, f[3]);
    f += 4;
    Further::each([&](auto term) {
      using T = decltype(term);
      w = T::prox_with(w, rest, f);
      f += T::kProxNumbers;
    });
    return Further::kCount == 0 ? w + step * V{} : w;  // an infinite step gives NaN, as with further terms
  }
};

// The sum of soft(w)^2, in the place of that of L2.
template <int terms>
struct SoftSquaresPass : AnyPass {
  using Sums = SoftSquaresPass;
  static constexpr bool kIsRelative = (terms & kRelative) != 0;
  static constexpr unsigned kReads = relative_streams(terms), kOptional = kReads, kSums = kL2;
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

  // Norms come without importances.
  template <class D, class Scaled>
  static FUSED_REG_INLINE void add_weighted(D* sums, D w, D, const D* f, const Scaled& scaled) {
    add<TwoRoundings>(sums, w, f, scaled);
  }
};

}  // namespace fused_reg
