// How many elements are 0, in the place of the sum of L2.
#pragma once

#include "pass.h"

namespace fused_reg {

template <int>
struct ZerosPass : AnyPass {
  static constexpr unsigned kSums = kL2;
  static constexpr bool kIsCount = true;
  static constexpr int kPadding = 1;  // no zero

  template <class MultiplyAdd, class D, class Factors, class Scaled>
  static FUSED_REG_INLINE void add(D* sums, D w, const Factors&, const Scaled&) {
    sums[1] = sums[1] + (w == 0 ? D{} + 1 : D{});
  }
};

}  // namespace fused_reg
