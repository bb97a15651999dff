// penalty.h on scalars: each term, its gradient against a difference quotient, and the special values.
#include <limits>

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

}  // namespace

int main() {
  expect_gradient_is_the_slope<kL1>();
  expect_gradient_is_the_slope<kL2>();
  expect_gradient_is_the_slope<kL1L2>();
  expect_special_values();
  expect_factor_rounds_as_the_loop();
  expect_scale_rounds_nothing();
  return fused_reg::testing::report();
}
