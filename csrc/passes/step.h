// The step of an optimizer: torch's single-tensor formulas in their order, every operation rounded once; with the
// gradient of the penalty, or its proximal operator behind the step, and the sums of its terms before it.
//
//   g        the gradient, divided by a loss scale, negated where the objective is maximized
//            + the penalty's gradient, unless the step is proximal
//            + weight_decay * w, unless that is decoupled
//
//   SGD      b = momentum * b + (1 - dampening) * g, at first g
//            w = w - lr * b;  with nesterov w - lr * (g + momentum * b)
//   Adam     m = lerp(m, g, 1 - beta1)
//            v = beta2 * v + (1 - beta2) * g * g;  with amsgrad d is of the largest so far
//            d = sqrt(v) / sqrt(1 - beta2^t) + eps
//            w = w - lr / (1 - beta1^t) * m / d
//   RMSprop  v = alpha * v + (1 - alpha) * g * g, a = lerp(a, g, 1 - alpha)
//            d = sqrt(v) + eps;  centered: sqrt(v - a * a) + eps
//            w = w - lr * g / d;  with momentum b = momentum * b + g / d, w = w - lr * b
//   Adagrad  s = s + g * g
//            w = w - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
//
// A proximal step is that of prox.h with the learning rate, or with `kPreconditioned` with the rate of the element,
// that is, what the step multiplies a gradient by that stays the same: lr / d. (SGD: lr * the sum of what momentum
// makes of it.) Then training comes to rest at the minimum of loss + penalty (Yun, Lozano and Yang 2021, "Adaptive
// proximal gradient methods for structured neural networks").
#pragma once

#include "prox.h"
#include "terms.h"

namespace fused_reg {

// All of them; kFirst and kDecay are found for each parameter.
enum StepOption : unsigned {
  kMaximize = 1,
  kDecoupled = 2,
  kNesterov = 4,
  kMomentum = 8,
  kAmsgrad = 16,
  kCentered = 32,
  kProximal = 64,
  kPreconditioned = 128,
  kUnscale = 256,
  kFirst = 512,
  kDecay = 1024,
};

// base^count by squaring: the same on every machine.
FUSED_REG_INLINE double power(double base, double count) {
  double result = 1;
  for (int64_t n = static_cast<int64_t>(count); n > 0; n /= 2, base = base * base) {
    result = n % 2 == 1 ? result * base : result;
  }
  return result;
}

// a + weight * (b - a), from the end that is nearer, as torch has it.
template <class V>
FUSED_REG_INLINE V lerp(V a, V b, V weight) {
  const V difference = b - a;
  return weight < V{} + 0.5f ? a + weight * difference : b + (weight - 1) * difference;
}

// That of L1 and L2, of which the options say whether they are there.
struct L1L2Gradient {
  static constexpr int kFactors = 2;

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers& n, S* f) {
    L1::gradient_factors(n, f);
    L2::gradient_factors(n, f + 1);
  }

  template <class V>
  static FUSED_REG_INLINE V added(V g, const V* x, const V* f, unsigned options) {
    const V w = x[0];
    switch (options & (kAddsL1 | kAddsL2)) {
      case kAddsL1 | kAddsL2:
        return g + (L1::gradient(w, f) + L2::gradient(w, f + 1));
      case kAddsL1:
        return g + L1::gradient(w, f);
      case kAddsL2:
        return g + L2::gradient(w, f + 1);
      default:
        return g;
    }
  }
};

// That of all terms, each maybe.
template <int relative, class Pass = GradientPass<kAnyTerms | kFurther | relative>>
struct AnyGradient : Pass {
  template <class V>
  static FUSED_REG_INLINE V added(V g, const V* x, const V* f, unsigned) {
    return g + Pass::gradient(x, f);
  }
};

// What all optimizers do. terms: kNone; kL1L2 for a penalty of these, each maybe; or kAllTerms, each maybe, with sums
// that somebody else takes before, and the proximal step behind where there are norms; these alone may be relative.
template <int terms>
struct StepPass : AnyPass {
  static constexpr int kRelativeBit = terms & kRelative;
  static constexpr bool kIsAny = (terms & ~kRelative) == kAllTerms, kIsRelative = kRelativeBit != 0;
  using Gradient = std::conditional_t<kIsAny, AnyGradient<kRelativeBit>, L1L2Gradient>;
  static constexpr int kProxTerms = kIsAny ? kL1 | kFurther | kRelativeBit : kL1;
  using Prox = ProxPass<kProxTerms>;
  static constexpr int kSummed = terms == kL1L2 ? kL1L2 : kNone;
  using Summed = PenaltyPass<kSummed>;
  using Sums = std::conditional_t<kSummed == kNone, void, Summed>;
  static constexpr unsigned kSums = Summed::kSums;
  static constexpr unsigned kReads = bit(0) | bit(1) | relative_streams(terms), kWrites = bit(0) | bit(kUnscaled);
  static constexpr unsigned kOptional = bit(kUnscaled) | relative_streams(terms);
  static constexpr bool kHasOptions = true, kPositiveZeros = terms != kNone;
  static constexpr unsigned kUsual = kIsAny ? 0 : kDecoupled | kMomentum | kDecay | kAddsL1 | kAddsL2;
  enum { kDecayFactor = Gradient::kFactors, kGradScaleFactor, kRateL1, kRateL2, kProx, kOwn = kProx + Prox::kFactors };

  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const D* f, const Scaled& scaled) {
    Summed::template add<MultiplyAdd>(sums, w, f, scaled);
  }

  // rate: what a gradient that stays the same is multiplied by, if that is one number.
  template <class S>
  static FUSED_REG_INLINE void factors(const StepNumbers& n, S* f, double rate) {
    Gradient::factors(n, f);
    const double decay = n.step[kWeightDecay];
    f[kDecayFactor] = static_cast<S>(n.options & kDecoupled ? 1 - n.of[kStep] * decay : decay);
    f[kGradScaleFactor] = static_cast<S>(n.step[kGradScale]);
    f[kRateL1] = static_cast<S>(n.of[kL1Strength]);
    f[kRateL2] = static_cast<S>(n.of[kL2Strength]);
    ChunkNumbers own = n;
    own.of[kStep] = rate > 0 ? rate : 0;  // a penalty shrinks
    Prox::factors(own, f + kProx);
  }

  template <class V>
  static FUSED_REG_INLINE V gradient(V* x, const V* f, unsigned options) {
    V g = x[1];
    if (options & (kUnscale | kMaximize)) {  // one question in the usual case
      if (options & kUnscale) {
        g = g / f[kGradScaleFactor];
        x[kUnscaled] = g;
      }
      g = options & kMaximize ? -g : g;
    }
    if constexpr (terms != kNone) {
      if (!(options & kProximal)) {
        g = Gradient::added(g, x, f, options);
      }
    }
    if ((options & (kDecay | kDecoupled)) == kDecay) {
      g = g + f[kDecayFactor] * x[0];
    }
    return g;
  }

  // Before the step.
  template <class V>
  static FUSED_REG_INLINE V decayed(V w, const V* f, unsigned options) {
    return (options & (kDecay | kDecoupled)) == (kDecay | kDecoupled) ? w * f[kDecayFactor] : w;
  }

  // Behind the step; x: the other streams.
  template <class V>
  static FUSED_REG_INLINE V shrunk(V w, const V* x, const V* f, unsigned options) {
    return terms != kNone && options & kProximal ? Prox::shrunk(w, x, f + kProx) : w;
  }

  // The same; rate(): of each element, for kPreconditioned.
  template <class V, class Rate>
  static FUSED_REG_INLINE V shrunk(V w, const V* x, const V* f, unsigned options, const Rate& rate) {
    if (terms != kNone && options & kPreconditioned) {
      const V given = rate(), positive = given > 0 ? given : V{};
      if constexpr (kIsRelative) {
        const V r = positive * x[kImportance];
        return Prox::moved(
            w, x, [&](V d) __attribute__((always_inline)) { return L2::prox(soft(d, r * f[kRateL1]), r, f[kRateL2]); });
      } else {
        return L2::prox(soft(w, positive * f[kRateL1]), positive, f[kRateL2]) + V{};
      }
    }
    return shrunk(w, x, f, options);
  }
};

template <int terms>
struct SgdPass : StepPass<terms> {
  using Base = StepPass<terms>;
  static constexpr unsigned kReads = Base::kReads | bit(2), kWrites = Base::kWrites | bit(2);
  static constexpr unsigned kOptional = Base::kOptional | bit(2);
  enum { kMomentumFactor = Base::kOwn, kGradFactor, kMinusLr, kFactors };

  static constexpr unsigned states(unsigned options) { return options & kMomentum ? bit(2) : 0; }

  template <class S>
  static FUSED_REG_INLINE void factors(const StepNumbers& n, S* f) {
    const double momentum = n.step[kFirstDecay], share = 1 - n.step[kSecondDecay], lr = n.of[kStep];
    const double sum = n.options & kMomentum ? share / (1 - momentum) : 1;  // of the weights of a gradient
    const double gain = n.options & kNesterov ? 1 + momentum * sum : sum;
    Base::factors(n, f, n.options & kPreconditioned ? lr * gain : lr);
    f[kMomentumFactor] = static_cast<S>(momentum);
    f[kGradFactor] = static_cast<S>(share);
    f[kMinusLr] = static_cast<S>(-lr);
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f, unsigned options) {
    V g = Base::gradient(x, f, options);
    if (options & kMomentum) {
      const V b = options & kFirst ? g : x[2] * f[kMomentumFactor] + f[kGradFactor] * g;
      x[2] = b;
      g = options & kNesterov ? g + f[kMomentumFactor] * b : b;
    }
    x[0] = Base::shrunk(Base::decayed(x[0], f, options) + f[kMinusLr] * g, x, f, options);
  }
};

// AdamW is Adam with kDecoupled.
template <int terms>
struct AdamPass : StepPass<terms> {
  using Base = StepPass<terms>;
  static constexpr unsigned kReads = Base::kReads | bit(2) | bit(3) | bit(4);
  static constexpr unsigned kWrites = Base::kWrites | bit(2) | bit(3) | bit(4);
  static constexpr unsigned kOptional = Base::kOptional | bit(4);
  enum { kWeight = Base::kOwn, kBeta2, kSquareFactor, kMinusStep, kRootFactor, kEps, kLr, kFactors };

  static constexpr unsigned states(unsigned options) { return bit(2) | bit(3) | (options & kAmsgrad ? bit(4) : 0); }

  template <class S>
  static FUSED_REG_INLINE void factors(const StepNumbers& n, S* f) {
    const double beta1 = n.step[kFirstDecay], beta2 = n.step[kSecondDecay], lr = n.of[kStep], t = n.step[kCount];
    Base::factors(n, f, lr);
    f[kWeight] = static_cast<S>(1 - beta1);
    f[kBeta2] = static_cast<S>(beta2);
    f[kSquareFactor] = static_cast<S>(1 - beta2);
    f[kMinusStep] = static_cast<S>(-(lr / (1 - power(beta1, t))));
    f[kRootFactor] = static_cast<S>(std::sqrt(1 - power(beta2, t)));
    f[kEps] = static_cast<S>(n.step[kEpsilon]);
    f[kLr] = static_cast<S>(lr);
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f, unsigned options) {
    const V g = Base::gradient(x, f, options);
    x[2] = lerp(x[2], g, f[kWeight]);
    x[3] = x[3] * f[kBeta2] + f[kSquareFactor] * g * g;
    V largest = x[3];
    if (options & kAmsgrad) {
      largest = x[4] = x[4] > x[3] || x[4] != x[4] ? x[4] : x[3];
    }
    const V d = square_root(largest) / f[kRootFactor] + f[kEps];
    const V w = Base::decayed(x[0], f, options) + f[kMinusStep] * x[2] / d;
    x[0] = Base::shrunk(w, x, f, options, [&] { return f[kLr] / d; });
  }
};

template <int terms>
struct RmspropPass : StepPass<terms> {
  using Base = StepPass<terms>;
  static constexpr unsigned kReads = Base::kReads | bit(2) | bit(3) | bit(4);
  static constexpr unsigned kWrites = Base::kWrites | bit(2) | bit(3) | bit(4);
  static constexpr unsigned kOptional = Base::kOptional | bit(3) | bit(4);
  enum { kAlpha = Base::kOwn, kSquareFactor, kMomentumFactor, kMinusLr, kEps, kRate, kFactors };

  static constexpr unsigned states(unsigned options) {
    return bit(2) | (options & kMomentum ? bit(3) : 0) | (options & kCentered ? bit(4) : 0);
  }

  template <class S>
  static FUSED_REG_INLINE void factors(const StepNumbers& n, S* f) {
    const double momentum = n.step[kFirstDecay], alpha = n.step[kSecondDecay], lr = n.of[kStep];
    Base::factors(n, f, lr);
    f[kAlpha] = static_cast<S>(alpha);
    f[kSquareFactor] = static_cast<S>(1 - alpha);
    f[kMomentumFactor] = static_cast<S>(momentum);
    f[kMinusLr] = static_cast<S>(-lr);
    f[kEps] = static_cast<S>(n.step[kEpsilon]);
    f[kRate] = static_cast<S>(n.options & kMomentum ? lr / (1 - momentum) : lr);
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f, unsigned options) {
    const V g = Base::gradient(x, f, options);
    x[2] = x[2] * f[kAlpha] + f[kSquareFactor] * g * g;
    V v = x[2];
    if (options & kCentered) {
      x[4] = lerp(x[4], g, f[kSquareFactor]);
      v = v - x[4] * x[4];
    }
    const V d = square_root(v) + f[kEps];
    V w = Base::decayed(x[0], f, options);
    if (options & kMomentum) {
      x[3] = x[3] * f[kMomentumFactor] + g / d;
      w = w + f[kMinusLr] * x[3];
    } else {
      w = w + f[kMinusLr] * g / d;
    }
    x[0] = Base::shrunk(w, x, f, options, [&] { return f[kRate] / d; });
  }
};

template <int terms>
struct AdagradPass : StepPass<terms> {
  using Base = StepPass<terms>;
  static constexpr unsigned kReads = Base::kReads | bit(2), kWrites = Base::kWrites | bit(2);
  enum { kMinusLr = Base::kOwn, kEps, kLr, kFactors };

  static constexpr unsigned states(unsigned) { return bit(2); }

  template <class S>
  static FUSED_REG_INLINE void factors(const StepNumbers& n, S* f) {
    const double lr = n.of[kStep] / (1 + (n.step[kCount] - 1) * n.step[kFirstDecay]);
    Base::factors(n, f, n.options & kPreconditioned ? lr : n.of[kStep]);
    f[kMinusLr] = static_cast<S>(-lr);
    f[kEps] = static_cast<S>(n.step[kEpsilon]);
    f[kLr] = static_cast<S>(lr);
  }

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V* f, unsigned options) {
    const V g = Base::gradient(x, f, options);
    x[2] = x[2] + g * g;
    const V d = square_root(x[2]) + f[kEps];
    const V w = Base::decayed(x[0], f, options) + f[kMinusLr] * g / d;
    x[0] = Base::shrunk(w, x, f, options, [&] { return f[kLr] / d; });
  }
};

}  // namespace fused_reg
