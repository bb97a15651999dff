// penalty.h on scalars: each term, its gradient against a difference quotient, norms
// and proximal operators, and the special values.
#include <limits>
#include <vector>

#include "expect.h"
#include "penalty.h"

using namespace fused_reg;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <int terms>
void expect_gradient_is_the_slope() {
  const double l1 = (terms & kL1) ? 0.7 : 0, l2 = (terms & kL2) ? 0.3 : 0;
  for (const double w : {-3.0, -0.25, 0.125, 2.0}) {
    const double h = 1e-6;
    const auto value = [&](double x) { return l1 * add_l1_term(0.0, x) + l2 * add_l2_term<TwoRoundings>(0.0, x); };
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
  EXPECT(terms_of(0, 0) == kNone && terms_of(1, 0) == kL1 && terms_of(0, 1) == kL2 && terms_of(1, 1) == kL1L2);
}

void expect_factor_rounds_as_the_loop() {
  const double strength = 0.1, upstream = 1.0f / 3;
  EXPECT(gradient_factor<float>(upstream, strength) == static_cast<float>(upstream) * 0.1f);
  EXPECT(gradient_factor<double>(upstream, strength) == upstream * strength);
}

void expect_scale_rounds_nothing() {
  for (const double strength : {1.0, 0.1, 1e-4, 3e300, 1e-300, 5e-324, 1e-50}) {
    for (const Terms term : {kL1, kL2}) {
      const ScaledStrength s = scaled_strength(strength, term, true);
      const int degree = term == kL1 ? 1 : 2;
      EXPECT(std::ldexp(s.factor, degree * std::ilogb(s.scale)) == strength, strength, degree);
      EXPECT(s.factor >= 1 && s.factor < 4 && std::ldexp(1.0, std::ilogb(s.scale)) == s.scale, strength, s.factor);
      EXPECT(scaled_strength(strength, term, false).scale == 1);
    }
  }
  for (const double strength : {0.0, kInf, kNan}) {
    EXPECT(scaled_strength(strength, kL2, true).scale == 1, strength);
  }
}

// w / ||w_g||, however large or small the norm.
template <class S>
void expect_norm_gradient_at_extremes(const std::vector<double>& norms) {
  const double tolerance = sizeof(S) == 4 ? 3e-7 : 6e-16;
  for (const double norm : norms) {
    const NormGradient<S> g = norm_gradient<S>(0.5, 0.3, norm);
    int exponent = 0;
    EXPECT(std::frexp(g.scale, &exponent) == S{0.5}, norm, g.scale);  // a power of two
    for (const double part : {1.0, -0.5, 0.001}) {
      const S w = static_cast<S>(part * norm);
      const double expected = 0.15 * (w / norm);
      EXPECT(std::abs(add_norm_gradient<S>(1, w, g.scale, g.factor) - (1 + expected)) <= tolerance, norm, part);
      const double actual = add_norm_gradient<S>(0, w, g.scale, g.factor);
      EXPECT(std::abs(actual - expected) <= tolerance * std::abs(expected), norm, part, actual, expected);
    }
  }
  const NormGradient<S> zero = norm_gradient<S>(0.5, 0.3, 0);
  EXPECT(add_norm_gradient<S>(2, 0, zero.scale, zero.factor) == 2);
  const NormGradient<S> infinite = norm_gradient<S>(0.5, 0.3, kInf);
  EXPECT(add_norm_gradient<S>(2, 1, infinite.scale, infinite.factor) == 2);
  EXPECT(std::isnan(norm_gradient<S>(0.5, 0.3, kNan).factor));
}

void expect_squares_without_overflow() {
  for (const int exponent : {0, kRescueExponent, -kRescueExponent}) {
    for (const double strength : {1.0, 0.3, 1e-300, 1e300, 5e-324}) {
      const Squares squares{2.25, exponent};
      EXPECT(norm_of(squares) == std::ldexp(1.5, exponent), exponent);
      const double penalty = norm_penalty(strength, squares);
      const long double exact = std::ldexp(static_cast<long double>(strength) * 1.5L, exponent);
      EXPECT(exact > 1e308L ? penalty == kInf : std::abs(penalty - exact) <= 1.2e-16L * exact + 5e-324L, exponent,
             strength, penalty);
      const long double exact_l2 = std::ldexp(static_cast<long double>(strength) * 2.25L, 2 * exponent);
      const double l2 = l2_penalty(strength, squares);
      EXPECT(exact_l2 > 1e308L ? l2 == kInf : std::abs(l2 - exact_l2) <= 1.2e-16L * exact_l2 + 5e-324L, exponent,
             strength, l2);
    }
  }
  EXPECT(rescue_exponent(1) == 0 && rescue_exponent(kInf) == kRescueExponent && rescue_exponent(kNan) == 0);
  EXPECT(rescue_exponent(0) == -kRescueExponent && rescue_exponent(1e-300) == -kRescueExponent);
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

void expect_shrinkage() {
  EXPECT(shrinkage(0, 0, 0.5, 0) == 1 && shrinkage(0, 0, 0.5, 3) == 1);
  EXPECT(shrinkage(1, 0, 0.5, 3) == 0.5);
  EXPECT(shrinkage(0, 2, 0.5, 4) == 0.75 && shrinkage(1, 2, 0.5, 4) == 0.375);
  EXPECT(shrinkage(0, 2, 0.5, 1) == 0 && shrinkage(0, 2, 0.5, 0) == 0);
  EXPECT(std::isnan(shrinkage(0, 2, 0.5, kNan)) && shrinkage(0, 2, 0.5, kInf) == 1);
}

}  // namespace

int main() {
  expect_gradient_is_the_slope<kL1>();
  expect_gradient_is_the_slope<kL2>();
  expect_gradient_is_the_slope<kL1L2>();
  expect_special_values();
  expect_factor_rounds_as_the_loop();
  expect_scale_rounds_nothing();
  expect_norm_gradient_at_extremes<float>({1, 0.37, 1e-30, 1e30, 1e37});
  expect_norm_gradient_at_extremes<double>({1, 0.37, 1e-300, 1e-290, 1e300, 1e307});
  expect_squares_without_overflow();
  expect_soft();
  expect_shrinkage();
  return fused_reg::testing::report();
}
