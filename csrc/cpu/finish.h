// What follows on the sums of chunks: norms, penalties and their sums.
#pragma once

#include <algorithm>

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

// is_usual: no sum has an exponent, and there are none of further terms.
template <bool is_usual>
void finish_of(const double* numbers, int64_t chunks, const TaskSums& sums, double* __restrict norms,
               double* __restrict penalties) {
  double own[kNumbers];
  std::copy_n(numbers, int{kNumbers}, own);
  for (int64_t c = 0; c < chunks; ++c) {
    ChunkSums found{};
    if constexpr (is_usual) {
      for (int k = 0; k < kPassSums; ++k) {
        found.of[k].sum = sums.sum[k][c];
      }
    } else {
      found = sums.of(c);
    }
    const ScaledSum& squares = found.of[L2::kSum];
    norms[c] = norm_of(squares);
    if (penalties != nullptr) {
      penalties[c] = SummedTerms::penalty(own, found.of) + norm_penalty(own[kNormStrength], squares);
    }
  }
}

inline void finish(const double* numbers, int64_t chunks, const TaskSums& sums, double* norms, double* penalties) {
  sums.is_scaled || sums.has_further ? finish_of<false>(numbers, chunks, sums, norms, penalties)
                                     : finish_of<true>(numbers, chunks, sums, norms, penalties);
}

// Some numbers as a vector; 0 behind them.
FUSED_REG_INLINE Double some_of(const double* numbers, int64_t count, int64_t apart) {
  double some[kDoubles]{};
  const auto copy = [&](int64_t end) __attribute__((always_inline)) {
    for (int64_t i = 0; i < end; ++i) {
      some[i] = numbers[i * apart];
    }
  };
  count < kDoubles ? copy(count) : copy(kDoubles);
  return load<Double>(some);
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
