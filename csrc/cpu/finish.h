// What follows on the sums of chunks: norms, penalties and their sums.
#pragma once

#include <algorithm>

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

// is_plain: all exponents are 0.
template <bool is_plain>
void finish_of(const double* numbers, int64_t chunks, const TaskSums& sums, TaskNorms* __restrict out) {
  double own[kNumbers];
  std::copy_n(numbers, int{kNumbers}, own);
  for (int64_t c = 0; c < chunks; ++c) {
    ScaledSum of[kSums];
    for (int k = 0; k < kSums; ++k) {
      of[k] = {sums.sum[k][c], is_plain ? 0 : sums.exponent[k][c]};
    }
    out->norm[c] = norm_of(of[L2::kSum]);
    out->penalty[c] = SummedTerms::penalty(own, of) + norm_penalty(own[kNormStrength], of[L2::kSum]);
  }
}

inline void finish(const double* numbers, int64_t chunks, const TaskSums& sums, TaskNorms* out) {
  int exponents = 0;
  for (const auto& of_term : sums.exponent) {
    for (int64_t c = 0; c < chunks; ++c) {
      exponents |= of_term[c];
    }
  }
  exponents == 0 ? finish_of<true>(numbers, chunks, sums, out) : finish_of<false>(numbers, chunks, sums, out);
}

// Some numbers as a vector; 0 behind them.
FUSED_REG_INLINE Double some_of(const double* numbers, int64_t count, int64_t apart) {
  Double some{};
  for (int i = 0; i < std::min<int64_t>(count, kDoubles); ++i) {
    some[i] = numbers[i * apart];
  }
  return some;
}

inline void sum_runs(const double* numbers, int64_t length, int64_t runs, double* sums) {
  for (int64_t r = 0; r < runs; r += kDoubles) {
    CompensatedSums<Double> run{};
    for (int64_t i = 0; i < length; ++i) {
      run.add(some_of(numbers + r * length + i, runs - r, length));
    }
    const Double found = result(run);
    std::memcpy(sums + r, &found, std::min<int64_t>(runs - r, kDoubles) * sizeof(double));
  }
}

inline double sum_columns(const double* numbers, int64_t count) {
  return column_sum<kColumns, Double>(count, [&](int64_t i) __attribute__((always_inline)) {
    return count - i < kDoubles ? some_of(numbers + i, count - i, 1) : load<Double>(numbers + i);
  });
}

}  // namespace fused_reg::FUSED_REG_ISA
