// The sums of the terms, their gradient, or both.
#pragma once

#include "pass.h"

namespace fused_reg {

// The sums of L1 and L2 over a chunk.
template <int terms>
struct PenaltyPass : AnyPass {
  using Sums = PenaltyPass;
  static constexpr bool kIsRelative = (terms & kRelative) != 0;
  static constexpr unsigned kReads = relative_streams(terms), kOptional = kReads, kSums = terms & kL1L2;

  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D*, const Scaled& scaled) {
    if constexpr (terms & kL1) {
      sums[0] = L1::add(sums[0], scaled(w));
    }
    if constexpr (terms & kL2) {
      sums[1] = L2::add<MultiplyAdd>(sums[1], scaled(w));
    }
  }

  template <class D, class Scaled>
  static FUSED_REG_INLINE void add_weighted(D* sums, D w, D importance, const D*, const Scaled& scaled) {
    const D x = scaled(w), weighted = x * importance;
    if constexpr (terms & kL1) {
      sums[0] = L1::add(sums[0], weighted);
    }
    if constexpr (terms & kL2) {
      sums[1] = L2::add<TwoRoundings>(sums[1], x, weighted);
    }
  }
};

// The sum of a further term, in the place of that of L2.
template <class Term>
struct TermSum {
  template <int terms>
  struct Pass : AnyPass {
    using Sums = Pass;
    static constexpr bool kIsRelative = (terms & kRelative) != 0;
    static constexpr unsigned kReads = relative_streams(terms), kOptional = kReads, kSums = kL2;
    static constexpr int kSumFactors = Term::kSumFactors;
    static constexpr bool kOfAnyDtype = true;

    template <class S>
    static FUSED_REG_INLINE void sum_factors(const ChunkNumbers& n, int exponent, double* f) {
      Term::sum_factors(n, exponent, f);
    }

    template <class MultiplyAdd, class D, class Scaled>
    static FUSED_REG_INLINE void add(D* sums, D w, const D* f, const Scaled&) {
      sums[1] = Term::add(sums[1], w, f);
    }

    template <class D, class Scaled>
    static FUSED_REG_INLINE void add_weighted(D* sums, D w, D importance, const D* f, const Scaled&) {
      sums[1] = sums[1] + Term::add(D{}, w, f) * importance;
    }
  };
};

// out = factor * gradient. terms: those of L1 and L2; or the norm, alone, with L2, or with L1 and maybe L2; or
// kAnyTerms, each maybe, of which kFurther are the further ones. Relative are these, or L1 and L2, each maybe.
template <int terms>
struct GradientPass : AnyPass {
  static constexpr bool kIsRelative = (terms & kRelative) != 0;
  static constexpr int kTerms = terms & ~kRelative;
  static constexpr bool kIsAny = (kTerms & ~kFurther) == kAnyTerms;
  static constexpr int kMaybe = kIsAny ? kTerms | kL2 : kTerms == (kNorm | kL1L2) ? kL2 : kIsRelative ? kTerms : kNone;
  static constexpr int kKnown = kTerms & ~kMaybe;
  // Those whose factors there are: of L1 and L2 alone always both, for a caller that chooses between these passes.
  static constexpr int kHeld = (kTerms & ~kL1L2) == 0 ? kL1L2 : kKnown | kMaybe;
  static constexpr unsigned kReads = bit(0) | relative_streams(terms), kWrites = bit(1);
  static constexpr unsigned kOptional = relative_streams(terms);

  // The first is what the sum starts with, then come those of each term, and whether it is there.
  template <class... T>
  static constexpr int factors_of(TermList<T...>) {
    return (1 + ... + (kHeld & T::kBit ? T::kFactors + 1 : 0));
  }
  static constexpr int kFactors = factors_of(AllTerms{});

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    *f++ = static_cast<S>(n.terms & kL1L2 ? -0.0 : 0.0);
    AllTerms::each([&](auto term) {
      using T = decltype(term);
      if constexpr ((kHeld & T::kBit) != 0) {
        T::gradient_factors(n, f);
        f[T::kFactors] = (n.terms & T::kBit) != 0;
        f += T::kFactors + 1;
      }
    });
  }

  // Of streams, of which the first is the parameter. An absent term is -0.0, which changes no bit of a sum.
  template <class V>
  static FUSED_REG_INLINE V gradient(const V* x, const V* f) {
    const V w = difference<terms>(x[0], x);
    V sum = kKnown & kL1L2 ? -V{} : kMaybe & kL1L2 ? f[0] : V{};
    ++f;
    AllTerms::each([&](auto term) {
      using T = decltype(term);
      if constexpr ((kKnown & T::kBit) != 0) {
        sum = sum + gradient_of<T>(w, x, f);
      } else if constexpr ((kMaybe & T::kBit) != 0) {
        sum = sum + (f[T::kFactors] != 0 ? gradient_of<T>(w, x, f) : -V{});
      }
      f += kHeld & T::kBit ? T::kFactors + 1 : 0;
    });
    return sum;
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[1] = gradient(x, f);
  }

 private:
  // That of a term; its factors times the importance, as in a loop that multiplies what it sums.
  template <class T, class V>
  static FUSED_REG_INLINE V gradient_of(V w, const V* x, const V* f) {
    if constexpr (kIsRelative) {
      V own[T::kFactors];
      for (int i = 0; i < T::kFactors; ++i) {
        own[i] = i < T::kScaled ? f[i] * x[kImportance] : f[i];
      }
      return T::gradient(w, own);
    } else {
      return T::gradient(w, f);
    }
  }
};

// out = out + factor * gradient
template <int terms>
struct AccumulatePass : GradientPass<terms> {
  using Fresh = GradientPass<terms>;
  static constexpr unsigned kReads = bit(1) | Fresh::kReads;

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f) {
    x[1] = x[1] + Fresh::gradient(x, f);
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

  template <class D, class Scaled>
  static FUSED_REG_INLINE void add_weighted(D* sums, D w, D importance, const D* f, const Scaled& scaled) {
    PenaltyPass<terms>::add_weighted(sums, w, importance, f, scaled);
  }
};

template <int terms>
using PenaltyGradientPass = WithSums<GradientPass, terms>;
template <int terms>
using PenaltyAccumulatePass = WithSums<AccumulatePass, terms>;

}  // namespace fused_reg
