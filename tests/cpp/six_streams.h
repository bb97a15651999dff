// A pass over all the streams that there may be, as an optimizer's step has: it reads five of them and writes four.
#pragma once

#include "passes/pass.h"

namespace fused_reg {

template <int>
struct SixStreamsPass : AnyPass {
  static constexpr unsigned kReads = 0x1f, kWrites = 0x3c;

  template <class V>
  static FUSED_REG_INLINE void element(V* x, const V*) {
    x[5] = x[0] + x[4];
    x[4] = x[4] + x[3];
    x[3] = x[3] - x[2];
    x[2] = x[2] + x[1];
  }
};

}  // namespace fused_reg
