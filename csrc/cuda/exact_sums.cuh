// The sums of |w| and w^2 of a lane by integers, where float64 units are few (kFewDoubles): the same bits wherever
// every sum on the way is exact in float64, in any order.
//
// 2^e is the power of two below the largest |w| of the lane. |w| * 2^(22 - e), which is below 2^23, is rounded to an
// integer, and with two limbs what is left, times 2^23, to another. If that leaves nothing of any element, the sums are
// multiples of one power of two and less than 2^53 times that: exact, in integers and in float64.
#pragma once

#include "element.cuh"

namespace fused_reg::cuda {

// What is added to round to an integer, which the last bits of the sum hold: of 0 to 2^23, and of -2^22 to 2^22.
constexpr float kRounder = 0x1p23f, kSignedRounder = 0x1.8p23f;
constexpr unsigned kRounderBits = 0x4b000000, kSignedRounderBits = 0x4b400000;

// An integer below 2^52, times 2^exponent.
__device__ __forceinline__ double from_integer(uint64_t integer, int exponent) {
  const double above = normal_power_of_two(exponent + 52);
  return bits_as<double>(bits_as<uint64_t>(above) | integer) - above;
}

// Of `count` magnitudes, w(0), w(1), ...: their sum and that of their squares. One limb is for elements of 16 bits;
// with two there is no sum of squares. False: something was rounded, or is not finite.
template <int limbs, int count, class Magnitude>
__device__ __forceinline__ bool exact_sums(const Magnitude& w, double* l1, double* l2) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    largest = fmaxf(largest, w(i));
  }
  const int own = static_cast<int>(bits_as<unsigned>(largest) >> 23) - 127, exponent = own > -105 ? own : -105;
  const float scale = bits_as<float>(static_cast<unsigned>(22 - exponent + 127) << 23);
  unsigned high = 0, low = 0;
  uint64_t squares = 0;
  bool is_exact = true;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float rounded = fmaf(w(i), scale, kRounder);
    const float rest = fmaf(w(i), scale, kRounder - rounded);
    high += bits_as<unsigned>(rounded);
    if constexpr (limbs == 1) {
      const uint64_t integer = bits_as<unsigned>(rounded) & 0x7fffff;
      squares = L2::add<TwoRoundings>(squares, integer);
      is_exact = is_exact && rest == 0;
    } else {
      const float rounded_rest = fmaf(rest, 0x1p23f, kSignedRounder);
      low += bits_as<unsigned>(rounded_rest);
      is_exact = is_exact && fmaf(rest, 0x1p23f, kSignedRounder - rounded_rest) == 0;
    }
  }
  high -= count * kRounderBits;
  if constexpr (limbs == 1) {
    *l1 = from_integer(high, exponent - 22);
    *l2 = from_integer(squares, 2 * (exponent - 22));
  } else {
    low -= count * kSignedRounderBits;
    const int64_t both = (static_cast<int64_t>(high) << 23) + static_cast<int>(low);
    *l1 = from_integer(static_cast<uint64_t>(both), exponent - 45);
  }
  return is_exact;
}

}  // namespace fused_reg::cuda
