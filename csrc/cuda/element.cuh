// Elements and numbers as device code reads and writes them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "table.h"

namespace fused_reg::cuda {

template <Dtype>
struct Element;

template <>
struct Element<Dtype::kFloat32> {
  using Storage = float;
  using Scalar = float;  // in which the gradient is computed
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
};

template <>
struct Element<Dtype::kFloat64> {
  using Storage = double;
  using Scalar = double;
  static __device__ double widen(double x) { return x; }
  static __device__ double narrow(double x) { return x; }
};

template <>
struct Element<Dtype::kBFloat16> {
  using Storage = uint16_t;
  using Scalar = float;
  static __device__ float widen(uint16_t x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
  static __device__ uint16_t narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

template <>
struct Element<Dtype::kFloat16> {
  using Storage = uint16_t;
  using Scalar = float;
  static __device__ float widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ uint16_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct OneRounding {
  static __device__ double of(double a, double b, double c) { return fma(a, b, c); }
};

// Whether a device has so few float64 units, 1 for 32 or 64 of float32, that they and not its memory bound a sum.
#if defined(FUSED_REG_FEW_DOUBLES)
constexpr bool kFewDoubles = FUSED_REG_FEW_DOUBLES;  // the tests on the host have both
#elif defined(__CUDA_ARCH__)
constexpr bool kFewDoubles =
    __CUDA_ARCH__ != 700 && __CUDA_ARCH__ != 800 && __CUDA_ARCH__ != 900 && __CUDA_ARCH__ != 1000;
#else
constexpr bool kFewDoubles = false;
#endif

// Whether its memory needs as many bytes on their way as that of devices with many float64 units: B300's does.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1030
constexpr bool kFastMemory = true;
#else
constexpr bool kFastMemory = !kFewDoubles;
#endif

// Whether the code for a device has no registers left for the next rows while further terms are summed: A100's.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

// Whether moving bits does not make a float64 of it: subnormal, infinite or NaN.
__device__ __forceinline__ bool is_rare(float x) {
  const unsigned bits = bits_as<unsigned>(x), next = bits + 0x00800000;  // one exponent more
  return (next & 0x7f000000) == 0 && (bits << 1) != 0;
}
__device__ __forceinline__ double float64_by_bits(float x) {
  const unsigned bits = bits_as<unsigned>(x);
  const uint64_t high = (bits & 0x80000000) | (bits << 1 == 0 ? 0 : ((bits & 0x7fffffff) >> 3) + 0x38000000);
  return bits_as<double>(high << 32 | bits << 29);
}

// To the type of sums: float64, where the units are few by moving bits, unless one is rare.
template <int count>
__device__ __forceinline__ void widen(const float (&x)[count], double (&wide)[count]) {
  bool any_rare = !kFewDoubles;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    any_rare = any_rare || is_rare(x[i]);
    wide[i] = float64_by_bits(x[i]);
  }
  if (any_rare) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      wide[i] = static_cast<double>(x[i]);
    }
  }
}
template <class T, int count>
__device__ __forceinline__ void widen(const T (&x)[count], T (&wide)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    wide[i] = x[i];
  }
}

inline __device__ double read(const NumberRef& number, Source source) {
  switch (source) {
    case Source::kFloat32:
      return *static_cast<const float*>(number.address);
    case Source::kFloat64:
      return *static_cast<const double*>(number.address);
    case Source::kBFloat16:
      return Element<Dtype::kBFloat16>::widen(*static_cast<const uint16_t*>(number.address));
    case Source::kFloat16:
      return Element<Dtype::kFloat16>::widen(*static_cast<const uint16_t*>(number.address));
    case Source::kValue:
      return number.value;
  }
  return NAN;
}

}  // namespace fused_reg::cuda
