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

struct OneRounding {
  static __device__ double of(double a, double b, double c) { return fma(a, b, c); }
};

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
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
