// EXPECT(condition, what...) prints the place, the condition and the values where it fails; report() is main's result.
#pragma once

#include <cstdio>
#include <iostream>

namespace fused_reg::testing {

inline int checks = 0;
inline int failures = 0;

template <class... Values>
void expect(bool ok, const char* file, int line, const char* condition, const Values&... values) {
  ++checks;
  if (ok) {
    return;
  }
  if (++failures <= 20) {
    std::cerr << file << ':' << line << ": " << condition;
    ((std::cerr << ' ' << values), ...);
    std::cerr << '\n';
  }
}

inline int report() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace fused_reg::testing

#define EXPECT(condition, ...) \
  ::fused_reg::testing::expect((condition), __FILE__, __LINE__, #condition __VA_OPT__(, ) __VA_ARGS__)
