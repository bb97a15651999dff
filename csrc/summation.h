// Sums whose error does not grow with their length: the error of every addition is kept and added at the
// end (Knuth's TwoSum; Ogita, Rump and Oishi 2005, "Accurate sum and dot product"). V is a double or a SIMD
// vector of doubles.
#pragma once

#include "penalty.h"

namespace fused_reg {

template <class V>
struct CompensatedSum {
  V sum{};
  V error{};

  FUSED_REG_INLINE void add(V x) {
    const V total = sum + x;
    const V x_part = total - sum;
    error = error + ((sum - (total - x_part)) + (x - x_part));
    sum = total;
  }
};

// An infinite or NaN sum has a NaN error, which says nothing: the sum alone is the result.
template <class V>
FUSED_REG_INLINE V result(const CompensatedSum<V>& s) {
  return s.sum - s.sum == 0 ? s.sum + s.error : s.sum;
}

}  // namespace fused_reg
