// The sums of the terms, their gradient, or both.
#pragma once

#include "pass.h"

namespace fused_reg {

// The sums of L1 and L2 over a chunk.
template <int terms>
struct PenaltyPass : AnyPass {
  using Sums = PenaltyPass;
  static constexpr unsigned kSums = terms & kL1L2;

  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D*, const Scaled& scaled) {
    if constexpr (terms & kL1) {
      sums[0] = L1::add(sums[0], scaled(w));
    }
    if constexpr (terms & kL2) {
      sums[1] = L2::add<MultiplyAdd>(sums[1], scaled(w));
    }
  }
};

// The sum of a further term, in the place of that of L2.
template <class Term>
struct TermSum {
  template <int>
  struct Pass : AnyPass {
    using Sums = Pass;
    static constexpr unsigned kSums = kL2;
    static constexpr int kSumFactors = Term::kSumFactors;
    static constexpr bool kOfAnyDtype = true;

    template <class S>
    static FUSED_REG_INLINE void sum_factors(const ChunkNumbers& n, int exponent, double* f) {
      Term::sum_factors(n, exponent, f);
    }

    static FUSED_REG_INLINE int result_exponent(const ChunkNumbers& n, int exponent) {
      return Term::result_exponent(n, exponent);
    }

    template <class MultiplyAdd, class D, class Scaled>
    static FUSED_REG_INLINE void add(D* sums, D w, const D* f, const Scaled&) {
      sums[1] = Term::add(sums[1], w, f);
    }
  };
};

// The gradient of L1 and L2, where the compiler knows which there are.
template <int terms>
struct KnownGradient {
  static constexpr int kFactors = 2;

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    f[0] = terms & kL1 ? gradient_factor<S>(n.factor, n.of[kL1Strength]) : 0;
    f[1] = terms & kL2 ? gradient_factor<S>(n.factor, n.of[kL2Strength]) : 0;
  }

  template <class V>
  static FUSED_REG_INLINE V of(V w, const V* f) {
    if constexpr (terms == kL1L2) {
      return L1::gradient(w, f) + L2::gradient(w, f + 1);
    } else if constexpr (terms == kL1) {
      return L1::gradient(w, f);
    } else if constexpr (terms == kL2) {
      return L2::gradient(w, f + 1);
    } else {
      return V{};
    }
  }
};

// That of the norm and of terms of a list, of which the compiler knows some. An absent one is -0.0, which changes no
// bit of a sum.
template <int known, class List>
struct AnyGradient;
template <int known, class... T>
struct AnyGradient<known, TermList<T...>> {
  enum { kStart, kHasNorm, kNormScale, kNormFactor, kFirst };
  static constexpr int kFactors = (kFirst + ... + (1 + T::kFactors));

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    const bool has_norm = (n.terms & kNorm) != 0;
    const NormGradient<S> norm =
        has_norm ? norm_gradient<S>(n.factor, n.of[kNormStrength], n.norm) : NormGradient<S>{0, 0};
    f[kStart] = static_cast<S>(n.terms & kL1L2 ? -0.0 : 0.0);
    f[kHasNorm] = has_norm;
    f[kNormScale] = norm.scale;
    f[kNormFactor] = norm.factor;
    f += kFirst;
    ((f[0] = (n.terms & T::kBit) != 0, f[1] = gradient_factor<S>(n.factor, n.of[T::kStrength]),
      T::gradient_factors(n, f + 1), f += 1 + T::kFactors),
     ...);
  }

  template <class V>
  static FUSED_REG_INLINE V of(V w, const V* f) {
    V sum = known & kL1L2 ? -V{} : f[kStart];
    [[maybe_unused]] const V* own = f + kFirst;
    ((sum = sum + where<bool(known & T::kBit)>(own[0], T::gradient(w, own + 1)), own += 1 + T::kFactors), ...);
    return sum + where<bool(known & kNorm)>(f[kHasNorm], (w * f[kNormScale]) * f[kNormFactor]);
  }

 private:
  template <bool is_known, class V>
  static FUSED_REG_INLINE V where(V is_present, V gradient) {
    return is_known ? gradient : (is_present != 0 ? gradient : -V{});
  }
};

// out = factor * gradient. terms: those of L1 and L2; or the norm alone, with L2, or with L1 and maybe L2; or
// kAnyTerms, each maybe, of which kFurther are the further ones.
template <int terms>
struct GradientPass : AnyPass {
  static constexpr bool kIsAny = (terms & ~kFurther) == kAnyTerms;
  using Further = std::conditional_t<(terms & kFurther) != 0, AllTerms, TermList<L1, L2>>;
  using Few = std::conditional_t<terms == kNorm, TermList<>, TermList<L2>>;
  using Listed = std::conditional_t<(terms & kL1) != 0, Further, Few>;
  using Any = AnyGradient<kIsAny ? kNone : terms & kL1 ? terms & ~kL2 : terms, Listed>;
  using Gradient = std::conditional_t<(terms & ~kL1L2) == 0, KnownGradient<terms>, Any>;
  static constexpr unsigned kReads = bit(0), kWrites = bit(1);
  static constexpr int kFactors = Gradient::kFactors;

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    Gradient::factors(n, f);
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[1] = Gradient::of(x[0], f);
  }
};

// out = out + factor * gradient
template <int terms>
struct AccumulatePass : GradientPass<terms> {
  using Fresh = GradientPass<terms>;
  static constexpr unsigned kReads = bit(0) | bit(1);

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[1] = x[1] + Fresh::Gradient::of(x[0], f);
  }
};

// A pass over the gradient that takes the sums of L1 and L2, too.
template <template <int> class Gradient, int terms>
struct WithSums : Gradient<terms> {
  template <int any>
  using Alone = Gradient<any>;
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
