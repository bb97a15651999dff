// THE MATHS of one element, for every backend. No torch, no memory, no threads.
//
//   penalty(w)  = l1 * |w| + l2 * w^2             and for each group g of elements   l2_norm * ||w_g||
//   gradient(w) = l1 * sgn(w) + l2 * 2w + l2_norm * w / ||w_g||      (subgradient 0 at w = 0, and at ||w_g|| = 0)
//   prox(w)     = soft(w) * max(0, 1 - step * l2_norm / ||soft(w_g)||) / (1 + 2 * step * l2)
//                 with soft(w) = sgn(w) * max(0, |w| - step * l1)
//
// and of further terms what is said with each.
//
// V is a float, a double, or a SIMD vector of either: the formulas use operators and `?:` only. Every
// operation must round once, as in the hand-written loop: compile with -ffp-contract=off (nvcc:
// -fmad=false). The tests compare the bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define FUSED_REG_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_REG_INLINE inline __attribute__((always_inline))
#endif

namespace fused_reg {

// The numbers of a tensor, and their names as arguments: the columns of the operators, in their order. L1 and L2 alone
// need the first kTermNumbers; a list without further terms the first kGroupNumbers.
enum Number : int {
  kL1Strength,
  kL2Strength,
  kNormStrength,
  kStep,
  kSmoothL1Strength,
  kBeta,
  kMcpStrength,
  kMcpGamma,
  kScadStrength,
  kScadA,
  kLower,
  kUpper,
  kMaxNorm,
  kNumbers
};
constexpr const char* kNumberNames[] = {"l1",        "l2",   "l2_norm", "step",  "smooth_l1", "beta",    "mcp",
                                        "mcp_gamma", "scad", "scad_a",  "lower", "upper",     "max_norm"};
static_assert(sizeof kNumberNames / sizeof *kNumberNames == kNumbers);

// What a number may be: from the least on, or above it, up to the most.
struct NumberRule {
  double least;
  bool is_above;
  double most;
  const char* text;
};
constexpr NumberRule rule_of(int number) {
  constexpr double kLargest = std::numeric_limits<double>::max(), kInfinity = std::numeric_limits<double>::infinity();
  switch (number) {
    case kMcpGamma:
      return {1, true, kLargest, "finite and > 1"};
    case kScadA:
      return {2, true, kLargest, "finite and > 2"};
    case kLower:
    case kUpper:
      return {-kInfinity, false, kInfinity, "a number"};
    case kMaxNorm:
      return {0, true, kInfinity, "> 0"};
    default:
      return {0, false, kLargest, "finite and >= 0"};
  }
}
constexpr int kTermNumbers = kNormStrength, kGroupNumbers = kStep + 1;

// The terms that a tensor has, and its box. A term whose strength is 0 is absent: 0 * inf must not become NaN. Beside
// them kRelative: they are of the difference from a reference weight, times the importance of each element.
enum Terms : int {
  kNone = 0,
  kL1 = 1,
  kL2 = 2,
  kL1L2 = kL1 | kL2,
  kNorm = 4,
  kSmoothL1 = 8,
  kRelative = 16,
  kMcp = 32,
  kScad = 64,
  kBox = 128
};

// What is known of a chunk.
struct ChunkNumbers {
  double of[kNumbers];  // its tensor's
  double factor;        // what gradients are multiplied by
  double norm;          // of its group, if it has one
  int terms;            // Terms; an absent one is neither summed nor differentiated
};

// ilogb(x) and ldexp(1, exponent), which take long, where these are normal numbers.
FUSED_REG_INLINE int exponent_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff);
  return exponent == 0 || exponent == 0x7ff ? std::ilogb(x) : exponent - 1023;
}
FUSED_REG_INLINE double normal_power_of_two(int exponent) {
  const int64_t bits = static_cast<int64_t>(exponent + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
FUSED_REG_INLINE double power_of_two(int exponent) {
  return exponent < -1022 || exponent > 1023 ? std::ldexp(1.0, exponent) : normal_power_of_two(exponent);
}

// What a term's gradient is multiplied by: the upstream gradient times the strength, each rounded to the
// type S in which the gradient is computed.
template <class S>
FUSED_REG_INLINE S gradient_factor(double upstream, double strength) {
  return static_cast<S>(upstream) * static_cast<S>(strength);
}

// |w|. Of a vector it clears the sign: one instruction, where compare and blend are two.
template <class V>
FUSED_REG_INLINE V magnitude(V w) {
  if constexpr (std::is_arithmetic_v<V>) {
    return std::fabs(w);
  } else {
    using Bits = decltype(w < w);
    return (V)((Bits)w & ~(Bits)(-V{}));
  }
}

// sgn(w) * max(0, |w| - threshold): w without its part between -threshold and threshold. NaN stays NaN, and so it is by
// a threshold that is; a zero is +0.
template <class V>
FUSED_REG_INLINE V soft(V w, V threshold) {
  const V below = w < threshold ? w : threshold, part = below > -threshold ? below : -threshold;
  return w == part ? V{} : w - part;
}

struct TwoRoundings {
  template <class V>
  static FUSED_REG_INLINE V of(V a, V b, V c) {
    return a * b + c;
  }
};

template <class V>
FUSED_REG_INLINE V square_root(V x) {
  if constexpr (std::is_arithmetic_v<V>) {
    return std::sqrt(x);
  } else {
    for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) {
      x[i] = std::sqrt(x[i]);
    }
    return x;
  }
}

// A sum over elements that were divided by 2^exponent.
struct ScaledSum {
  double sum;
  int exponent;
};

// strength * 2^exponent * sum, without an overflow on the way.
FUSED_REG_INLINE double scaled_product(double strength, double sum, int exponent) {
  if (exponent == 0) {
    return strength * sum;
  }
  int own = 0;
  const double fraction = std::frexp(strength, &own);
  return std::ldexp(fraction * sum, own + exponent);
}

// A TERM: its value, gradient and proximal operator. AllTerms lists them.
//
//   kBit, kStrength              its bit in Terms, its strength
//   kSum, kDegree                the place of its sum among those of a chunk; the sum of w * x is x^kDegree times that
//                                of w
//   gradient_factors(n, f)       the kFactors numbers that its gradient needs, in the type S in which that is computed;
//                                it is proportional to the first kScaled of them
//   gradient(w, f)
//
// L1 and L2 are summed side by side, and compiled for each combination. A further term is summed by itself, and has
//
//   sum_factors(n, exponent, f)  the kSumFactors that its sum needs, in float64; the exponent is 0, or that of
//                                rescue_exponent() after a sum with 0
//   result_exponent(...)         of that sum
//   add(sum, w, f)
//   prox_factors(n, f)           the kProxFactors that its proximal operator needs
//   prox(w, f)                   which follows on those of L1 and L2
//   prox_numbers(n, f)           the kProxNumbers that it needs where each element has a step of its own
//   prox_with(w, step, f)
template <Terms bit, Number strength>
struct Term {
  static constexpr Terms kBit = bit;
  static constexpr Number kStrength = strength;
  static constexpr int kFactors = 1, kScaled = 1;

  template <class S>
  static FUSED_REG_INLINE void gradient_factors(const ChunkNumbers& n, S* f) {
    f[0] = gradient_factor<S>(n.factor, n.of[kStrength]);
  }
};

struct L1 : Term<kL1, kL1Strength> {
  static constexpr int kSum = 0, kDegree = 1;

  template <class V>
  static FUSED_REG_INLINE V add(V sum, V w) {
    return sum + magnitude(w);
  }

  // f * sgn(w) is written as a choice; 0 * f is NaN for an infinite upstream gradient, as in the loop.
  template <class V>
  static FUSED_REG_INLINE V gradient(V w, const V* f) {
    const V zero = f[0] * 0;
    return w > 0 ? f[0] : (w < 0 ? -f[0] : zero);
  }
};

struct L2 : Term<kL2, kL2Strength> {
  static constexpr int kSum = 1, kDegree = 2;

  // MultiplyAdd says how: fused gives the same bits where the square is exact, as in float64 for elements of 32 bits
  // and less; for float64 elements it must round twice, on every machine.
  template <class MultiplyAdd, class V>
  static FUSED_REG_INLINE V add(V sum, V w) {
    return add<MultiplyAdd>(sum, w, w);
  }

  // weighted: w times its importance, if that is first, so that no square leaves the range where the product does not.
  template <class MultiplyAdd, class V>
  static FUSED_REG_INLINE V add(V sum, V w, V weighted) {
    return MultiplyAdd::of(weighted, w, sum);
  }

  template <class V>
  static FUSED_REG_INLINE V gradient(V w, const V* f) {
    return f[0] * (w + w);
  }

  template <class V>
  static FUSED_REG_INLINE V prox(V w, V step, V strength) {
    return w / (1 + 2 * (step * strength));
  }
};

// |w| with a parabola of the width beta at 0: w^2 / (2 beta) where |w| < beta, else |w| - beta / 2.
struct SmoothL1 : Term<kSmoothL1, kSmoothL1Strength> {
  static constexpr int kSum = 2, kDegree = 1, kFactors = 4, kScaled = 2, kSumFactors = 4;
  static constexpr int kProxFactors = 3, kProxNumbers = 2;

  // The sum is of w * 2^shift. A tiny one, where all are below any but a tiny beta, is that of a parabola: its exponent
  // need not be that of |w|.
  static FUSED_REG_INLINE bool is_parabola(double beta, int exponent) { return exponent < 0 && beta > 0x1p-899; }
  static FUSED_REG_INLINE int shift(double beta, int exponent) {
    const int wanted = is_parabola(beta, exponent) ? 600 - std::ilogb(beta) / 2 : -exponent;
    return wanted < 1023 ? wanted : 1023;
  }
  static FUSED_REG_INLINE int result_exponent(const ChunkNumbers& n, int exponent) {
    const double beta = n.of[kBeta];
    return is_parabola(beta, exponent) ? -2 * shift(beta, exponent) - std::ilogb(beta) : exponent;
  }

  static FUSED_REG_INLINE void sum_factors(const ChunkNumbers& n, int exponent, double* f) {
    constexpr double kLargest = std::numeric_limits<double>::max();
    const double beta = n.of[kBeta];
    const int shift = SmoothL1::shift(beta, exponent);
    const double slope = 0.5 / std::ldexp(beta, 2 * shift + result_exponent(n, exponent));
    f[0] = std::ldexp(1.0, shift);
    f[1] = std::ldexp(beta, shift);  // infinite: all are below
    f[2] = slope > kLargest ? kLargest : slope;
    f[3] = f[1] / 2;
  }

  template <class V>
  static FUSED_REG_INLINE V add(V sum, V w, const V* f) {
    const V x = w * f[0], size = magnitude(x);
    return sum + (size < f[1] ? (x * f[2]) * x : size - f[3]);
  }

  // Within beta (w * f[2]) * f[1], where f[2] is a power of two: 1 unless the slope would leave the range of S.
  template <class S>
  static FUSED_REG_INLINE void gradient_factors(const ChunkNumbers& n, S* f) {
    constexpr int kLimit = sizeof(S) == 4 ? 126 : 1022;
    const auto is_normal = [](S x) {
      return std::fabs(x) >= std::numeric_limits<S>::min() && std::fabs(x) <= std::numeric_limits<S>::max();
    };
    Term::gradient_factors(n, f);
    const double height = f[0], beta = n.of[kBeta];
    const S half = static_cast<S>(0.5 / beta);
    f[1] = is_normal(half) ? f[0] * half * 2 : static_cast<S>(height / beta);
    f[2] = 1;
    f[3] = static_cast<S>(beta);
    if (f[3] == 0 || f[0] == 0) {  // and not 0 times the slope of a tiny beta, which may be infinite
      f[1] = f[0];
    } else if (!is_normal(f[1])) {
      const int exponent = std::fabs(height / beta) > 1 ? kLimit : -kLimit;
      f[1] = static_cast<S>(std::ldexp(height, -exponent / 2) / std::ldexp(beta, exponent / 2));
      f[2] = static_cast<S>(std::ldexp(1.0, exponent));
    }
  }

  template <class V>
  static FUSED_REG_INLINE V gradient(V w, const V* f) {
    const V within = (w * f[2]) * f[1];
    return magnitude(w) < f[3] ? within : (w > 0 ? f[0] : (w < 0 ? -f[0] : within));
  }

  template <class S>
  static FUSED_REG_INLINE void prox_factors(const ChunkNumbers& n, S* f) {
    const double step = L2::prox(n.of[kStep], n.of[kStep], n.of[kL2Strength]);
    const double height = step * n.of[kStrength], beta = n.of[kBeta];
    f[0] = static_cast<S>(height);
    f[1] = static_cast<S>(beta + height);
    f[2] = static_cast<S>(height == 0 ? 1 : 1 / (1 + height / beta));
  }

  template <class V>
  static FUSED_REG_INLINE V prox(V w, const V* f) {
    return w > f[1] ? w - f[0] : (w < -f[1] ? w + f[0] : w * f[2]);
  }

  template <class S>
  static FUSED_REG_INLINE void prox_numbers(const ChunkNumbers& n, S* f) {
    f[0] = static_cast<S>(n.of[kStrength]);
    f[1] = static_cast<S>(n.of[kBeta]);
  }

  template <class V>
  static FUSED_REG_INLINE V prox_with(V w, V step, const V* f) {
    const V one = V{} + 1, height = step * f[0];
    const V own[kProxFactors] = {height, f[1] + height, height == 0 ? one : one / (one + height / f[1])};
    return prox(w, own);
  }
};

// A penalty that begins as L1 does and grows ever less, to a constant:
//
//   strength * m - max(0, m - knee)^2 / (2 * width)   with m = min(|w|, end), end = knee + width * strength
//
// in which the strength is more than a factor. knee = kKnee * strength and width = shape - kKnee, of 0 or 1.
template <Terms bit, Number strength, Number shape, int knee>
struct Concave : Term<bit, strength> {
  static constexpr int kDegree = 1, kFactors = 5, kSumFactors = 4, kProxFactors = 4, kProxNumbers = 2;

  static FUSED_REG_INLINE int result_exponent(const ChunkNumbers&, int exponent) { return exponent; }

  // Of w * 2^-exponent, and of a strength that is likewise.
  static FUSED_REG_INLINE void sum_factors(const ChunkNumbers& n, int exponent, double* f) {
    constexpr double kLargest = std::numeric_limits<double>::max();
    const double height = std::ldexp(n.of[strength], -exponent), width = n.of[shape] - knee;
    const double end = height * n.of[shape], slope = end <= kLargest ? 0.5 / (height * width) : 0.5 / height / width;
    f[0] = std::ldexp(1.0, -exponent);
    f[1] = end > kLargest ? kLargest : end;
    f[2] = knee * height;
    f[3] = slope <= kLargest ? slope : kLargest;
  }

  template <class V>
  static FUSED_REG_INLINE V add(V sum, V w, const V* f) {
    const V size = magnitude(w * f[0]), m = size > f[1] ? f[1] : size;
    if constexpr (knee == 0) {
      return sum + m * (1 - m * f[3]);
    } else {
      const V over = m > f[2] ? m - f[2] : V{};
      return sum + (m - over * (over * f[3]));
    }
  }

  template <class S>
  static FUSED_REG_INLINE void gradient_factors(const ChunkNumbers& n, S* f) {
    f[0] = static_cast<S>(n.factor);
    f[1] = static_cast<S>(n.of[strength]);
    f[2] = static_cast<S>(knee * n.of[strength]);
    f[3] = static_cast<S>(1 / (n.of[shape] - knee));
    f[4] = static_cast<S>(n.of[strength] * n.of[shape]);
  }

  template <class V>
  static FUSED_REG_INLINE V gradient(V w, const V* f) {
    const V size = magnitude(w), over = size < f[2] ? V{} : size - f[2], left = f[1] - over * f[3];
    const V slope = f[0] * (size >= f[4] ? V{} : left < 0 ? V{} : left);
    return w > 0 ? slope : (w < 0 ? -slope : f[0] * w);
  }

  template <class S>
  static FUSED_REG_INLINE void prox_factors(const ChunkNumbers& n, S* f) {
    double own[kProxFactors];
    set_prox(L2::prox(n.of[kStep], n.of[kStep], n.of[kL2Strength]), n.of[strength], n.of[shape], own);
    for (int i = 0; i < kProxFactors; ++i) {
      f[i] = static_cast<S>(own[i]);
    }
    f[3] = f[3] <= std::numeric_limits<S>::max() ? f[3] : std::numeric_limits<S>::max();
  }

  // The minimum over x of (x - w)^2 / 2 + step * penalty(x): w beyond f[3], else the soft threshold f[0], of which what
  // is more than the knee f[1] grows by the share f[2]. Where step < width, that is firm thresholding, which has no
  // jump. Else there are two minima, the other one at w, and beyond f[3] that is the lower one: hard thresholding.
  template <class V>
  static FUSED_REG_INLINE V prox(V w, const V* f) {
    const V near = soft(w, f[0]), rest = soft(near, f[1]);
    return magnitude(w) > f[3] ? w : near + rest * f[2];
  }

  template <class S>
  static FUSED_REG_INLINE void prox_numbers(const ChunkNumbers& n, S* f) {
    f[0] = static_cast<S>(n.of[strength]);
    f[1] = static_cast<S>(n.of[shape]);
  }

  template <class V>
  static FUSED_REG_INLINE V prox_with(V w, V step, const V* f) {
    V own[kProxFactors];
    set_prox(step, f[0], f[1], own);
    return prox(w, own);
  }

 private:
  template <class V>
  static FUSED_REG_INLINE void set_prox(V step, V height, V end, V* f) {
    const V none{}, ratio = step / (end - knee), q = end + knee;
    const V jump = step < q ? (step + q) / 2 : square_root(step) * square_root(q);
    f[0] = height * step;
    f[1] = height * knee;
    f[2] = ratio < 1 ? ratio / (1 - ratio) : none - 1;
    f[3] = height * (ratio < 1 ? end : jump);
  }
};

// The minimax concave penalty (Zhang 2010): strength * |w| - w^2 / (2 gamma) up to gamma * strength.
struct Mcp : Concave<kMcp, kMcpStrength, kMcpGamma, 0> {
  static constexpr int kSum = 3;
};

// Smoothly clipped absolute deviation (Fan and Li 2001): L1 up to the strength, from a * strength on constant.
struct Scad : Concave<kScad, kScadStrength, kScadA, 1> {
  static constexpr int kSum = 4;
};

// lower <= w <= upper: no value, and a proximal operator that clips. Two numbers that are 0 are none.
struct Box {
  static constexpr int kProxFactors = 2, kProxNumbers = 2;

  static FUSED_REG_INLINE int present(const double* numbers) {
    return numbers[kLower] != 0 || numbers[kUpper] != 0 ? kBox : kNone;
  }

  // A step of 0 moves nothing.
  template <class S>
  static FUSED_REG_INLINE void prox_factors(const ChunkNumbers& n, S* f) {
    const bool is_there = present(n.of) != kNone && n.of[kStep] != 0;
    f[0] = static_cast<S>(is_there ? n.of[kLower] : -std::numeric_limits<double>::infinity());
    f[1] = static_cast<S>(is_there ? n.of[kUpper] : std::numeric_limits<double>::infinity());
  }

  template <class V>
  static FUSED_REG_INLINE V prox(V w, const V* f) {
    return w < f[0] ? f[0] : (w > f[1] ? f[1] : w);
  }

  template <class S>
  static FUSED_REG_INLINE void prox_numbers(const ChunkNumbers& n, S* f) {
    prox_factors(n, f);
  }

  template <class V>
  static FUSED_REG_INLINE V prox_with(V w, V step, const V* f) {
    return step == 0 ? w : prox(w, f);
  }
};

// l2_norm * ||w_g||, which comes from the sum of L2: its gradient as (w * f[0]) * f[1]. f[0], a power of two, keeps
// w / ||w_g|| from overflow where the norm is tiny, and f[1] from underflow where the norm is large or l2_norm small.
struct Norm : Term<kNorm, kNormStrength> {
  static constexpr int kFactors = 2;

  template <class S>
  static FUSED_REG_INLINE void gradient_factors(const ChunkNumbers& n, S* f) {
    constexpr int kLargest = sizeof(S) == 4 ? 127 : 1023;
    const double weight = n.factor * n.of[kStrength];
    f[0] = 1;
    if (n.norm == 0) {
      f[1] = static_cast<S>(weight * 0);
    } else if (!(n.norm - n.norm == 0)) {  // infinite or NaN
      f[1] = static_cast<S>(weight / n.norm);
    } else {
      const int of_norm = exponent_of(n.norm);
      int exponent = -of_norm > kLargest ? kLargest : -of_norm < -kLargest / 2 ? -kLargest / 2 : -of_norm;
      if (weight != 0 && weight - weight == 0) {
        constexpr int kSmallest = sizeof(S) == 4 ? -149 : -1074;           // subnormal
        const int highest = exponent_of(weight) - of_norm + kLargest - 3;  // so that the factor is normal
        exponent = exponent < highest ? exponent : highest < kSmallest ? kSmallest : highest;
      }
      const double power = power_of_two(exponent);
      f[0] = static_cast<S>(power);
      f[1] = static_cast<S>(weight / (power < 0x1p-900 ? std::ldexp(n.norm, exponent) : n.norm * power));
    }
  }

  template <class V>
  static FUSED_REG_INLINE V gradient(V w, const V* f) {
    return (w * f[0]) * f[1];
  }
};

// Terms in the order in which they are added.
template <class... T>
struct TermList {
  static constexpr int kCount = sizeof...(T);
  static constexpr int kBits = (kNone | ... | T::kBit);

  // body(T{}) for every term T.
  template <class Body>
  static FUSED_REG_INLINE void each(const Body& body) {
    (body(T{}), ...);
  }

  static FUSED_REG_INLINE int present(const double* numbers) {
    return (kNone | ... | (numbers[T::kStrength] != 0 ? T::kBit : kNone));
  }

  static FUSED_REG_INLINE double penalty(const double* numbers, const ScaledSum* sums) {
    return (... + penalty_of<T>(numbers[T::kStrength], sums[T::kSum]));
  }

 private:
  template <class Term>
  static FUSED_REG_INLINE double penalty_of(double strength, const ScaledSum& sum) {
    return strength == 0 ? 0 : scaled_product(strength, sum.sum, Term::kDegree * sum.exponent);
  }
};

using FurtherTerms = TermList<SmoothL1, Mcp, Scad>;
using SummedTerms = TermList<L1, L2, SmoothL1, Mcp, Scad>;
using AllTerms = TermList<L1, L2, SmoothL1, Mcp, Scad, Norm>;
using FurtherProx = TermList<SmoothL1, Mcp, Scad, Box>;  // what follows on L1, L2 and the norm
constexpr int kFurther = FurtherTerms::kBits | kBox, kAllTerms = AllTerms::kBits | kBox;
constexpr int kAnyTerms = kNorm | kL1;  // of a pass: L1, L2 and the norm, each chosen at run time
constexpr int kSums = SummedTerms::kCount;

// Those that are there, by the numbers.
FUSED_REG_INLINE int terms_of(const double* numbers) { return AllTerms::present(numbers) | Box::present(numbers); }

// The sums of a chunk's terms. Those of float64 elements may be too large or too small for a double where the penalty
// or the norm is not: they are first taken with exponent 0, and where digits may have been lost, once more of the
// elements divided by a power of two, which rounds nothing.
struct ChunkSums {
  ScaledSum of[kSums];
};

constexpr int kRescueExponent = 600;

// What the float64 elements must be taken again with, after their sums with exponent 0 (an absent one is 0); 0: these
// are good. Where importances make it small, the sum of a further term says nothing about the elements.
FUSED_REG_INLINE int rescue_exponent(double l1, double l2, bool may_be_small) {
  if (l1 > 0x1p1000 || l2 > 0x1p1000) {
    return kRescueExponent;
  }
  return may_be_small && l2 < 0x1p-900 ? -kRescueExponent : 0;
}

// 0 where the importance is 0, lest it leave the range when it is scaled; NaN if it is not finite.
template <class V>
FUSED_REG_INLINE V without_masked(V w, V importance) {
  return importance == 0 ? w * importance : w;
}

// The norm of a group, of its sum of squares. NaN has one form.
FUSED_REG_INLINE double norm_of(const ScaledSum& squares) {
  const double norm = std::sqrt(squares.sum);
  return norm == norm ? (squares.exponent == 0 ? norm : std::ldexp(norm, squares.exponent)) : static_cast<double>(NAN);
}

FUSED_REG_INLINE double norm_penalty(double l2_norm, const ScaledSum& squares) {
  return l2_norm == 0 ? 0 : scaled_product(l2_norm, std::sqrt(squares.sum), squares.exponent);
}

// What the elements of a group whose norm after soft() is this are multiplied by, before L2: by the norm's strength, or
// so that it is max_norm after L2, which is 0 if there is none. A NaN norm makes the group NaN, but for max_norm alone.
FUSED_REG_INLINE double share_of_norm(double l2, double l2_norm, double max_norm, double step, double norm) {
  const double threshold = step * l2_norm;
  const double block = threshold == 0 ? 1 : norm <= threshold ? 0 : 1 - threshold / norm;
  if (max_norm == 0 || step == 0) {
    return block;
  }
  const double most = norm > max_norm ? max_norm / norm * (1 + 2 * (step * l2)) : 1;
  return most < block ? most : block;
}

// Of the bits of a half type, of which -0 comes from the last rounding.
template <class Bits16>
FUSED_REG_INLINE Bits16 with_positive_zero(Bits16 half) {
  return half == 0x8000 ? Bits16{} : half;
}

}  // namespace fused_reg
