// penalty.h on scalars: each term, its gradient against a difference quotient, norms
// and proximal operators, and the special values.
#include <cstdint>
#include <limits>
#include <vector>

#include "expect.h"
#include "passes/passes.h"

using namespace fused_reg;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr int kAnyAndFurther = kAnyTerms | kFurther;

// A penalty moves nothing that the step does not: so many tensors are read and written, with it and without.
template <template <int> class Step>
constexpr bool moves(int tensors, unsigned options = 0) {
  const auto count = [options](auto pass) {
    const unsigned there = ~pass.kOptional | pass.states(options);
    return __builtin_popcount(pass.kReads & there) + __builtin_popcount(pass.kWrites & there);
  };
  return count(Step<kNone>{}) == tensors && count(Step<kL1L2>{}) == tensors;
}
static_assert(moves<SgdPass>(3) && moves<SgdPass>(5, kMomentum | kProximal));
static_assert(moves<AdamPass>(7) && moves<AdamPass>(9, kAmsgrad | kPreconditioned));
static_assert(moves<RmspropPass>(5) && moves<AdagradPass>(5));

// The gradient of a pass, with numbers {l1, l2, l2_norm, step, ...}.
template <int terms, class S>
S gradient(S w, const ChunkNumbers& numbers) {
  using Pass = GradientPass<terms>;
  S f[Pass::kFactors], x[2] = {w, 0};
  Pass::factors(numbers, f);
  Pass::element(x, f);
  return x[1];
}

template <int terms>
double gradient(double w, double l1, double l2) {
  return gradient<terms>(w, {{l1, l2}, 1, 0, terms & kL1L2});
}

template <int terms>
void expect_gradient_is_the_slope() {
  const double l1 = (terms & kL1) ? 0.7 : 0, l2 = (terms & kL2) ? 0.3 : 0;
  for (const double w : {-3.0, -0.25, 0.125, 2.0}) {
    const double h = 1e-6;
    const auto value = [&](double x) { return l1 * L1::add(0.0, x) + l2 * L2::add<TwoRoundings>(0.0, x); };
    const double slope = (value(w + h) - value(w - h)) / (2 * h);
    EXPECT(std::abs(gradient<terms>(w, l1, l2) - slope) < 1e-8, terms, w, slope);
  }
}

void expect_special_values() {
  EXPECT(gradient<kL1>(0.0, 2.0, 0.0) == 0 && !std::signbit(gradient<kL1>(-0.0, 2.0, 0.0)));
  EXPECT(gradient<kL1>(kNan, 2.0, 0.0) == 0);  // sgn(NaN) is 0 in torch
  EXPECT(std::isnan(gradient<kL1>(0.0, kInf, 0.0)));
  EXPECT(gradient<kL1>(-5.0, kInf, 0.0) == -kInf);
  EXPECT(std::isnan(gradient<kL2>(kNan, 0.0, 1.0)));
  EXPECT(gradient<kL1>(-kInf, 2.0, 0.0) == -2);
  EXPECT(gradient<kL1L2>(-kInf, 2.0, 1.0) == -kInf);
  EXPECT(gradient<kNone>(kNan, 1.0, 1.0) == 0);
  for (const int terms : {kNone, kL1, kL2, kL1L2}) {
    const double numbers[kNumbers] = {terms & kL1 ? 0.5 : 0, terms & kL2 ? 0.5 : 0, 1, 1};
    EXPECT(terms_of(numbers) == (terms | kNorm), terms);
  }
}

void expect_factor_rounds_as_the_loop() {
  const double strength = 0.1, upstream = 1.0f / 3;
  EXPECT(gradient_factor<float>(upstream, strength) == static_cast<float>(upstream) * 0.1f);
  EXPECT(gradient_factor<double>(upstream, strength) == upstream * strength);
}

double penalty_of(double l1, double l2, const ScaledSum& sum1, const ScaledSum& sum2) {
  const double numbers[kNumbers] = {l1, l2};
  const ScaledSum sums[kSums] = {sum1, sum2};
  return SummedTerms::penalty(numbers, sums);
}

// A penalty from sums of scaled elements, and of a subnormal strength.
void expect_penalty_of_sums() {
  for (const int exponent : {0, kRescueExponent, -kRescueExponent}) {
    for (const double strength : {1.0, 0.3, 1e-300, 1e300, 5e-324, 1e-310}) {
      const auto expect_near = [&](double penalty, long double exact) {
        EXPECT(exact > 1e308L ? penalty == kInf : std::abs(penalty - exact) <= 1.2e-16L * exact + 5e-324L, exponent,
               strength, penalty);
      };
      expect_near(penalty_of(strength, 0, {1.5, exponent}, {2.25, exponent}),
                  std::ldexp(static_cast<long double>(strength) * 1.5L, exponent));
      expect_near(penalty_of(0, strength, {1.5, exponent}, {2.25, exponent}),
                  std::ldexp(static_cast<long double>(strength) * 2.25L, 2 * exponent));
    }
  }
  EXPECT(penalty_of(1e-310, 0, {1e10, 0}, {0, 0}) == 1e-310 * 1e10);
  EXPECT(penalty_of(0.5, 0.25, {2, 0}, {4, 0}) == 2 && penalty_of(0, 0, {kInf, 0}, {kNan, 0}) == 0);
  EXPECT(penalty_of(0, 1, {kInf, 0}, {3, 0}) == 3 && std::isnan(penalty_of(1, 0, {kNan, 0}, {3, 0})));
}

void expect_sums_are_taken_again() {
  const auto again = [](double l1, double l2, bool has_l2) { return rescue_exponent(l1, l2, has_l2); };
  EXPECT(again(1, 1, true) == 0 && again(kNan, kNan, true) == 0);
  EXPECT(again(0, kInf, true) == kRescueExponent && again(0, 0x1p1001, true) == kRescueExponent);
  EXPECT(again(kInf, 0, false) == kRescueExponent && again(0x1p1001, 0, false) == kRescueExponent);
  EXPECT(again(0, 0, true) == -kRescueExponent && again(1e-200, 1e-300, true) == -kRescueExponent);
  EXPECT(again(0, 0, false) == 0 && again(5e-324, 0, false) == 0, "a sum of |w| loses nothing below");
}

template <class S>
void norm_factors(double upstream, double strength, double norm, S* f) {
  ChunkNumbers numbers{{}, upstream, norm, kNorm};
  numbers.of[kNormStrength] = strength;
  Norm::gradient_factors(numbers, f);
}

// strength * w / ||w_g||, however large or small the norm and the strength.
template <class S>
void expect_norm_gradient_at_extremes(const std::vector<double>& norms, const std::vector<double>& strengths) {
  const double tolerance = sizeof(S) == 4 ? 3e-7 : 6e-16;
  for (const double norm : norms) {
    for (const double strength : strengths) {
      S f[2];
      norm_factors(0.5, strength, norm, f);
      int exponent = 0;
      EXPECT(std::frexp(f[0], &exponent) == S{0.5}, norm, f[0]);  // a power of two
      for (const double part : {1.0, -0.5, 0.001}) {
        const S w = static_cast<S>(part * norm);
        const double expected = 0.5 * strength * (w / norm);
        const double actual = Norm::gradient(w, f);
        EXPECT(std::abs(actual - expected) <= tolerance * std::abs(expected), norm, strength, part, actual, expected);
      }
    }
  }
  S f[2];
  norm_factors(0.5, 0.3, 0, f);
  EXPECT(Norm::gradient<S>(0, f) == 0);
  norm_factors(0.5, 0.3, kInf, f);
  EXPECT(Norm::gradient<S>(1, f) == 0);
  norm_factors(0.5, 0.3, kNan, f);
  EXPECT(std::isnan(f[1]));
}

void expect_squares_without_overflow() {
  for (const int exponent : {0, kRescueExponent, -kRescueExponent}) {
    for (const double strength : {1.0, 0.3, 1e-300, 1e300, 5e-324}) {
      const ScaledSum squares{2.25, exponent};
      EXPECT(norm_of(squares) == std::ldexp(1.5, exponent), exponent);
      const double penalty = norm_penalty(strength, squares);
      const long double exact = std::ldexp(static_cast<long double>(strength) * 1.5L, exponent);
      EXPECT(exact > 1e308L ? penalty == kInf : std::abs(penalty - exact) <= 1.2e-16L * exact + 5e-324L, exponent,
             strength, penalty);
    }
  }
  EXPECT(norm_penalty(0, {kInf, 0}) == 0);
  const double nan = norm_of({-kNan, 0});
  EXPECT(std::isnan(nan) && !std::signbit(nan));
}

void expect_soft() {
  for (const double threshold : {0.0, 0.25, 2.0}) {
    for (const double w : {-3.0, -2.0, -0.25, -0.0, 0.0, 0.1, 0.25, 2.5, kInf, -kInf}) {
      const double size = std::abs(w) - threshold, expected = size > 0 ? std::copysign(size, w) : 0;
      EXPECT(soft(w, threshold) == expected && std::signbit(soft(w, threshold)) == std::signbit(expected), w,
             threshold);
    }
    EXPECT(std::isnan(soft(kNan, threshold)));
  }
  EXPECT(soft(5.0, kInf) == 0 && soft(-5.0, kInf) == 0);
}

void expect_zeros_are_positive() {
  const auto prox = [](double w, double threshold, double shrinkage) {
    const double f[] = {threshold, shrinkage};
    ProxPass<kL1>::element(&w, f);
    return w;
  };
  EXPECT(!std::signbit(prox(-1e-300, 0.0, 1e-300)) && !std::signbit(prox(-0.0, 0.0, 1.0)));
  EXPECT(!std::signbit(prox(-0.5, 0.5, 1.0)) && !std::signbit(prox(-2.0, 0.5, 0.0)));
  const uint16_t bits[] = {0x8000, 0, 1, 0x8001, 0x7c00, 0xfe00}, expected[] = {0, 0, 1, 0x8001, 0x7c00, 0xfe00};
  for (int i = 0; i < 6; ++i) {
    EXPECT(with_positive_zero(bits[i]) == expected[i], i);
  }
}

void expect_share_of_norm() {
  EXPECT(share_of_norm(0, 0, 0, 0.5, 0) == 1 && share_of_norm(0, 0, 0, 0.5, 3) == 1);
  EXPECT(share_of_norm(0, 2, 0, 0.5, 4) == 0.75 && share_of_norm(1, 2, 0, 0.5, 4) == 0.75);
  EXPECT(share_of_norm(0, 2, 0, 0.5, 1) == 0 && share_of_norm(0, 2, 0, 0.5, 0) == 0);
  EXPECT(std::isnan(share_of_norm(0, 2, 0, 0.5, kNan)) && share_of_norm(0, 2, 0, 0.5, kInf) == 1);
  EXPECT(share_of_norm(0, 0, 1, 0.5, 4) == 0.25 && share_of_norm(0, 2, 1, 0.5, 4) == 0.25);
  EXPECT(share_of_norm(0, 2, 3.5, 0.5, 4) == 0.75 && share_of_norm(0, 0, kInf, 0.5, kInf) == 1);
  EXPECT(share_of_norm(0, 0, 4, 0.5, 4) == 1 && share_of_norm(0, 0, 1, 0.5, 0) == 1);
  EXPECT(share_of_norm(1, 0, 1, 0.5, 4) == 0.5, "halved once more by L2");
  EXPECT(share_of_norm(0, 0, 1, 0, 4) == 1 && share_of_norm(0, 0, 1, 0.5, kNan) == 1);
}

// What smooth L1 is compared with: its value and slope where a strength of 1 is meant.
long double smooth(long double w, long double beta) {
  return std::abs(w) < beta ? w * w / (2 * beta) : std::abs(w) - beta / 2;
}

long double smooth_slope(long double w, long double beta) { return std::abs(w) < beta ? w / beta : (w > 0) - (w < 0); }

ChunkNumbers smooth_numbers(double strength, double beta, double factor = 1) {
  ChunkNumbers numbers{{}, factor, 0, kSmoothL1};
  numbers.of[kSmoothL1Strength] = strength;
  numbers.of[kBeta] = beta;
  return numbers;
}

const std::vector<double> kBetas = {0,   5e-324, 1e-310, 1e-300, 1e-45, 1e-39, 1e-30,
                                    0.1, 1,      3e38,   1e39,   1e200, 1e300, 1.7e308};

// The penalty as a chunk's, of elements however large or small.
double smooth_penalty(const std::vector<double>& elements, double strength, double beta) {
  const ChunkNumbers numbers = smooth_numbers(strength, beta);
  const auto sum_with = [&](int exponent) {
    double f[SmoothL1::kSumFactors], sum = 0;
    SmoothL1::sum_factors(numbers, exponent, f);
    for (const double w : elements) {
      sum = SmoothL1::add(sum, w, f);
    }
    return sum;
  };
  const double first = sum_with(0);
  const int exponent = rescue_exponent(0, first, true);
  const ScaledSum sum{exponent == 0 ? first : sum_with(exponent), SmoothL1::result_exponent(numbers, exponent)};
  const ScaledSum sums[kSums] = {{}, {}, sum};
  return SummedTerms::penalty(numbers.of, sums);
}

void expect_smooth_penalty() {
  for (const double beta : kBetas) {
    for (const double strength : {1.0, 0.3, 1e-300, 1e300, 1.7e308}) {
      for (const double w :
           {0.0, 5e-324, 1e-310, 1e-300, 1e-200, 1e-45, 1e-30, 0.1, 1.0, 3e38, 1e150, 1e300, 1.7e308}) {
        const std::vector<double> elements{w, -w, w / 3, -w / 3};
        long double exact = 0;
        for (const double x : elements) {
          exact += strength * smooth(x, beta);
        }
        const double penalty = smooth_penalty(elements, strength, beta);
        EXPECT(exact > 1.79e308L ? penalty > 1.78e308 : std::abs(penalty - exact) <= 3e-15L * exact + 5e-324L, beta,
               strength, w, penalty, static_cast<double>(exact));
      }
    }
  }
  EXPECT(smooth_penalty({kInf}, 2, 1) == kInf && std::isnan(smooth_penalty({kNan}, 2, 1)));
  EXPECT(smooth_penalty({kNan, kInf}, 0, 1) == 0);
}

template <class S>
S smooth_gradient(S w, const ChunkNumbers& numbers) {
  return gradient<kAnyAndFurther>(w, numbers);
}

template <class S>
void expect_smooth_gradient() {
  const S smallest = std::numeric_limits<S>::denorm_min(), largest = std::numeric_limits<S>::max();
  for (const double beta : kBetas) {
    for (const S strength : {S(1), S(0.3), S(1e-30), S(1e30), largest / 4, smallest * 1000}) {
      for (const S size : {S(0), smallest, smallest * 1000, S(1e-30), S(0.05), S(1), S(1e30), largest}) {
        for (const S w : {size, -size}) {
          if (beta < std::numeric_limits<S>::min() && strength == largest / 4) {
            continue;  // far beyond S
          }
          const long double exact = strength * smooth_slope(w, beta);
          const S slope = smooth_gradient<S>(w, smooth_numbers(strength, beta));
          const long double bound =
              2 * std::numeric_limits<S>::epsilon() * std::abs(exact) + 2 * static_cast<long double>(smallest);
          // Where S rounds beta to the element, either side of it is right.
          EXPECT(std::abs(slope - exact) <= bound || (S(beta) == size && std::abs(slope) == strength), beta, strength,
                 w, slope, static_cast<double>(exact));
        }
      }
    }
  }
  const S inf = std::numeric_limits<S>::infinity();
  for (const double beta : {0.0, 1.0, 1e39}) {
    EXPECT(smooth_gradient<S>(inf, smooth_numbers(2, beta)) == 2 &&
           smooth_gradient<S>(-inf, smooth_numbers(2, beta)) == -2);
    EXPECT(std::isnan(smooth_gradient<S>(std::nan(""), smooth_numbers(2, beta))), beta);
    EXPECT(std::isnan(smooth_gradient<S>(0, smooth_numbers(2, beta, kInf))), beta);
    EXPECT(smooth_gradient<S>(largest, smooth_numbers(2, beta, kInf)) == inf, beta);
  }
  for (const double beta : kBetas) {  // a strength that S rounds to 0, whatever the slope
    EXPECT(smooth_gradient<S>(smallest, smooth_numbers(1e-200, beta, 1e-200)) == 0, beta);
  }
}

// Rounded as the loop's c * w^2 / (2 beta): its derivative is (c * h) * w + (c * h) * w, with h = 0.5 / beta.
void expect_smooth_gradient_rounds_as_the_loop() {
  for (const float beta : {0.1f, 0.7f, 3.0f}) {
    for (const float w : {0.01f, -0.07f, 0.09999f}) {
      const float half = 0.3f * static_cast<float>(0.5 / beta);
      EXPECT(smooth_gradient<float>(w, smooth_numbers(0.3, beta)) == half * w + half * w, beta, w);
    }
  }
}

// Terms that are chosen at run time, and those that the compiler knows: the same bits.
void expect_terms_at_run_time() {
  ChunkNumbers numbers{{0.3, 0.7, 0.9}, 0.6, 2.5, kNone};
  numbers.of[kSmoothL1Strength] = 0.4;
  numbers.of[kBeta] = 0.5;
  for (const double w : {-2.0, -0.25, -0.0, 0.0, 0.1, 3.0, kInf, kNan}) {
    for (const Terms terms : {kNone, kL1, kL2, kL1L2}) {
      numbers.terms = terms;
      const double known = terms == kNone ? gradient<kNone>(w, numbers)
                           : terms == kL1 ? gradient<kL1>(w, numbers)
                           : terms == kL2 ? gradient<kL2>(w, numbers)
                                          : gradient<kL1L2>(w, numbers);
      const auto same = [](double a, double b) {
        return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
      };
      EXPECT(same(gradient<kAnyTerms>(w, numbers), known), w, terms);
      EXPECT(same(gradient<kAnyAndFurther>(w, numbers), known), w, terms);
      double f[2];
      norm_factors(0.6, 0.9, 2.5, f);
      const double with_norm = known + Norm::gradient(w, f);
      numbers.terms = terms | kNorm;
      EXPECT(same(gradient<kAnyTerms>(w, numbers), with_norm), w, terms);
      EXPECT(same(gradient<kAnyAndFurther>(w, numbers), with_norm), w, terms);
      const double compiled = terms & kL1   ? gradient<(kNorm | kL1L2)>(w, numbers)
                              : terms & kL2 ? gradient<(kNorm | kL2)>(w, numbers)
                                            : gradient<kNorm>(w, numbers);
      EXPECT(same(compiled, with_norm), w, terms);
      numbers.terms = terms | kSmoothL1;
      const double sum = known + 0.24 * static_cast<double>(smooth_slope(w, 0.5L));
      const double actual = gradient<kAnyAndFurther>(w, numbers);
      EXPECT(std::isnan(w) ? std::isnan(actual) : actual == sum || std::abs(actual - sum) < 1e-15, w, terms);
    }
  }
}

template <class S>
S smooth_prox(S w, const ChunkNumbers& numbers) {
  constexpr int kTerms = kL1 | kFurther;
  using Pass = ProxPass<kTerms>;
  S f[Pass::kFactors];
  Pass::factors(numbers, f);
  Pass::element(&w, f);
  return w;
}

// Where the proximal operator ends, its gradient is what it went.
void expect_smooth_prox() {
  for (const double l1 : {0.0, 0.2}) {
    for (const double l2 : {0.0, 0.3}) {
      for (const double beta : {0.0, 1e-300, 0.1, 1.0, 1e300}) {
        for (const double strength : {0.0, 0.5, 1e-300}) {
          ChunkNumbers numbers = smooth_numbers(strength, beta);
          numbers.of[kL1Strength] = l1;
          numbers.of[kL2Strength] = l2;
          numbers.of[kStep] = 0.7;
          for (const double w : {-3.0, -0.8, 0.05, 0.4, 2.0}) {
            const double p = smooth_prox<double>(w, numbers);
            const double sign = (p > 0) - (p < 0), slope = static_cast<double>(smooth_slope(p, beta));
            const double gap = (w - p) - 0.7 * (l1 * sign + 2 * l2 * p + strength * slope);
            EXPECT(p == 0 || std::abs(p) <= 2 * beta ? std::abs(gap) <= 0.7 * (l1 + strength) + 1e-15
                                                     : std::abs(gap) < 1e-14,
                   l1, l2, beta, strength, w, p);
            EXPECT(p == 0 || beta < 1e-200 || std::abs(gap) < 1e-14, l1, l2, beta, strength, w, p);
            EXPECT(std::abs(smooth_prox<float>(static_cast<float>(w), numbers) - p) < 1e-6, beta, strength, w);
          }
          EXPECT(!std::signbit(smooth_prox<double>(-0.0, numbers)) && smooth_prox<double>(0.0, numbers) == 0);
          EXPECT(std::isnan(smooth_prox<double>(kNan, numbers)) && smooth_prox<double>(kInf, numbers) == kInf, beta);
        }
      }
    }
  }
}

// What MCP, and SCAD with a knee, are compared with: where a strength of 1 is meant, the value and the slope.
template <class Term>
struct OfConcave {
  Number strength, shape;
  int knee;

  ChunkNumbers numbers(double height, double end, double factor = 1) const {
    ChunkNumbers numbers{{}, factor, 0, Term::kBit};
    numbers.of[strength] = height;
    numbers.of[shape] = end;
    return numbers;
  }

  static long double value(long double w, long double height, long double shape, int knee) {
    const long double m = std::min(std::abs(w), height * shape), over = std::max(m - knee * height, 0.0L);
    return height * m - over * over / (2 * (shape - knee));
  }

  static long double slope(long double w, long double height, long double shape, int knee) {
    const long double over = std::max(std::abs(w) - knee * height, 0.0L);
    return ((w > 0) - (w < 0)) * std::max(height - over / (shape - knee), 0.0L);
  }

  double penalty(const std::vector<double>& elements, double height, double end) const {
    const ChunkNumbers own = numbers(height, end);
    const auto sum_with = [&](int exponent) {
      double f[Term::kSumFactors], sum = 0;
      Term::sum_factors(own, exponent, f);
      for (const double w : elements) {
        sum = Term::add(sum, w, f);
      }
      return sum;
    };
    const double first = sum_with(0);
    const int exponent = rescue_exponent(0, first, true);
    ScaledSum sums[kSums]{};
    sums[Term::kSum] = {exponent == 0 ? first : sum_with(exponent), Term::result_exponent(own, exponent)};
    return SummedTerms::penalty(own.of, sums);
  }

  void expect_penalty() const {
    for (const double height : {5e-324, 1e-310, 1e-200, 0.3, 1.0, 1e3, 1e150, 1e300, 1.7e308}) {
      for (const double end : {2.1, 3.7, 1e10, 1e300, 1e306}) {
        for (const double w : {0.0, 5e-324, 1e-310, 1e-200, 1e-30, 0.1, 1.0, 3e38, 1e150, 1e300, 1.7e308}) {
          const std::vector<double> elements{w, -w, w / 3, -w / 3};
          long double exact = 0;
          for (const double x : elements) {
            exact += value(x, height, end, knee);
          }
          const double found = penalty(elements, height, end);
          EXPECT(exact > 1.79e308L ? found > 1.78e308 : std::abs(found - exact) <= 4e-15L * exact + 5e-324L, height,
                 end, w, found, static_cast<double>(exact));
        }
      }
    }
    EXPECT(penalty({kInf}, 2, 3) == static_cast<double>(value(1e9L, 2, 3, knee)) && std::isnan(penalty({kNan}, 2, 3)));
    EXPECT(penalty({kInf}, 1.7e308, 3) == kInf && penalty({kNan, kInf}, 0, 3) == 0);
  }

  template <class S>
  void expect_gradient() const {
    const S smallest = std::numeric_limits<S>::denorm_min(), largest = std::numeric_limits<S>::max();
    for (const double end : {2.1, 3.7, 1e10, 1e300}) {
      for (const S height : {S(1), S(0.3), S(1e-30), S(1e30), smallest * 1000}) {
        for (const S size : {S(0), smallest, S(1e-30), S(0.05), S(1), S(2.5), S(1e30), largest}) {
          for (const S w : {size, -size}) {
            const long double exact = slope(w, height, end, knee);
            const S found = gradient<kAnyAndFurther>(w, numbers(height, end));
            EXPECT(std::abs(found - exact) <= 4 * std::numeric_limits<S>::epsilon() * static_cast<long double>(height) +
                                                  2 * static_cast<long double>(smallest),
                   end, height, w, found, static_cast<double>(exact));
          }
        }
      }
      const S inf = std::numeric_limits<S>::infinity();
      EXPECT(gradient<kAnyAndFurther>(inf, numbers(2, end)) == 0, end);
      EXPECT(std::isnan(gradient<kAnyAndFurther>(std::numeric_limits<S>::quiet_NaN(), numbers(2, end))), end);
      EXPECT(std::isnan(gradient<kAnyAndFurther>(S(0), numbers(2, end, kInf))), end);
      EXPECT(gradient<kAnyAndFurther>(smallest, numbers(2, end, -0.5)) == -1, end);
    }
  }

  // No point of a grid is lower than where the proximal operator ends, also where there are two minima.
  void expect_prox() const {
    for (const double l1 : {0.0, 0.2}) {
      for (const double l2 : {0.0, 0.3}) {
        for (const double end : {2.1, 3.7, 1e10}) {
          for (const double height : {0.0, 0.5}) {
            for (const double step : {0.0, 0.7, 2.0, 3.0, 4.5, 30.0}) {
              ChunkNumbers own = numbers(height, end);
              own.of[kL1Strength] = l1;
              own.of[kL2Strength] = l2;
              own.of[kStep] = step;
              const auto cost = [&](long double x, double w) {
                return (x - w) * (x - w) / 2 +
                       step * (l1 * std::abs(x) + l2 * x * x + (height == 0 ? 0 : value(x, height, end, knee)));
              };
              for (const double w : {-9.0, -3.0, -0.8, -0.05, 0.4, 1.2, 2.0, 3.1}) {
                const double p = smooth_prox<double>(w, own);
                for (int i = -200; i <= 200; ++i) {
                  EXPECT(cost(p, w) <= cost(i * 0.05L, w) + 1e-13L, l1, l2, end, height, step, w, p, i * 0.05);
                }
                for (const double near : {p * (1 - 1e-4), p * (1 + 1e-4), p + 1e-5, p - 1e-5}) {
                  EXPECT(cost(p, w) <= cost(near, w) + 1e-13L, l1, l2, end, height, step, w, p, near);
                }
                EXPECT(std::abs(smooth_prox<float>(static_cast<float>(w), own) - p) < 1e-5, end, height, step, w);
              }
              EXPECT(!std::signbit(smooth_prox<double>(-0.0, own)) && smooth_prox<double>(0.0, own) == 0);
              EXPECT(std::isnan(smooth_prox<double>(kNan, own)) && smooth_prox<double>(-kInf, own) == -kInf, step);
            }
          }
        }
      }
    }
    const ChunkNumbers huge = [&] {
      ChunkNumbers own = numbers(1e38, 4);
      own.of[kStep] = 100;
      return own;
    }();
    EXPECT(smooth_prox<float>(static_cast<float>(kInf), huge) == kInf && smooth_prox<float>(3e38f, huge) == 0);
    ChunkNumbers square = numbers(1, 5);  // whose thresholds are the same but for a rounding: nothing is between them
    square.of[kStep] = 5;
    for (double w = 4.999999999999996; w < 5.000000000000005; w = std::nextafter(w, 6)) {
      const double p = smooth_prox<double>(w, square);
      EXPECT(knee == 1 || p == 0 || p == w, w, p);
    }
  }

  void expect_all() const {
    expect_penalty();
    expect_gradient<float>();
    expect_gradient<double>();
    expect_prox();
  }
};

void expect_box() {
  const auto clipped = [](double w, double lower, double upper, double step = 0.5) {
    ChunkNumbers n{};
    n.of[kLower] = lower;
    n.of[kUpper] = upper;
    n.of[kStep] = step;
    n.of[kL1Strength] = 0.5;
    return smooth_prox<double>(w, n);
  };
  EXPECT(clipped(2, -0.5, 1) == 1 && clipped(-2, -0.5, 1) == -0.5 && clipped(0.75, -0.5, 1) == 0.5);
  EXPECT(clipped(-2, 0, kInf) == 0 && clipped(2, 0, kInf) == 1.75 && clipped(2, -kInf, 0) == 0);
  EXPECT(clipped(0.1, 0.25, 1) == 0.25 && clipped(kInf, -1, 1) == 1 && std::isnan(clipped(kNan, -1, 1)));
  EXPECT(clipped(2, 0, 0) == 1.75, "none");
  EXPECT(clipped(2, -1, 1, 0) == 2, "no step");
}

}  // namespace

int main() {
  OfConcave<Mcp>{kMcpStrength, kMcpGamma, 0}.expect_all();
  OfConcave<Scad>{kScadStrength, kScadA, 1}.expect_all();
  expect_smooth_penalty();
  expect_smooth_gradient<float>();
  expect_smooth_gradient<double>();
  expect_smooth_gradient_rounds_as_the_loop();
  expect_terms_at_run_time();
  expect_smooth_prox();
  expect_gradient_is_the_slope<kL1>();
  expect_gradient_is_the_slope<kL2>();
  expect_gradient_is_the_slope<kL1L2>();
  expect_special_values();
  expect_factor_rounds_as_the_loop();
  expect_penalty_of_sums();
  expect_sums_are_taken_again();
  expect_norm_gradient_at_extremes<float>({1, 0.37, 1e-30, 1e30, 1e37}, {0.3, 1e-30, 1e30});
  expect_norm_gradient_at_extremes<double>({1, 0.37, 2.3e-308, 1e-300, 1e-290, 1e300, 1.7e308}, {0.3, 1e-300, 1e307});
  expect_squares_without_overflow();
  expect_soft();
  expect_zeros_are_positive();
  expect_share_of_norm();
  expect_box();
  return fused_reg::testing::report();
}
