// Compensated sums against exact ones, for content that plain float64 sums get wrong.
#include <cmath>
#include <limits>
#include <vector>

#include "expect.h"
#include "summation.h"

using namespace fused_reg;

namespace {

double sum(const std::vector<double>& x) {
  CompensatedSum<double> s;
  for (const double v : x) {
    s.add(v);
  }
  return result(s);
}

}  // namespace

int main() {
  EXPECT(sum({}) == 0);
  EXPECT(sum({1e16, 1, 1, 1, 1}) == 1e16 + 4);               // plain: 1e16
  EXPECT(sum({1, 1e100, 1, -1e100}) == 2);                   // plain: 0
  EXPECT(sum({0.1, 0.2, 0.3, -0.6}) == std::ldexp(1, -55));  // plain: 1.1e-16
  EXPECT(sum(std::vector<double>(1000000, 0.1)) == 100000);  // plain: 100000.00000133288

  const double inf = std::numeric_limits<double>::infinity();
  EXPECT(sum({1, inf, 2}) == inf);
  EXPECT(std::isnan(sum({inf, -inf})));
  EXPECT(std::isnan(sum({1, std::nan(""), 2})));
  EXPECT(sum({1e308, 1e308}) == inf);
  return fused_reg::testing::report();
}
