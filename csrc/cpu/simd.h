// SIMD vectors and the loads and stores of every dtype, for the instruction set that the including file
// chose: FUSED_REG_ISA names it, FUSED_REG_VECTOR_BYTES is its width. Vectors are GCC vector types, so the
// operators and `?:` of penalty.h work on them; intrinsics stand only where GCC's own code is slow.
#pragma once

#include <cstdint>
#include <cstring>

#include "chunk_kernel.h"

#if FUSED_REG_VECTOR_BYTES > 16
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false for _mm512_undefined_pd (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fused_reg::FUSED_REG_ISA {

typedef float Float __attribute__((vector_size(FUSED_REG_VECTOR_BYTES)));
typedef double Double __attribute__((vector_size(FUSED_REG_VECTOR_BYTES)));
typedef uint64_t Bits64 __attribute__((vector_size(FUSED_REG_VECTOR_BYTES)));
typedef uint32_t Bits32 __attribute__((vector_size(FUSED_REG_VECTOR_BYTES)));
typedef uint16_t Bits16 __attribute__((vector_size(FUSED_REG_VECTOR_BYTES)));
typedef uint16_t HalfBits16 __attribute__((vector_size(FUSED_REG_VECTOR_BYTES / 2)));

constexpr int kFloats = sizeof(Float) / sizeof(float);
constexpr int kDoubles = kFloats / 2;

template <int count>
struct Doubles {
  Double of[count];
};
using DoublePair = Doubles<2>;  // the elements of one Float: of[0] has the first of them

template <class V>
FUSED_REG_INLINE V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));  // an unaligned load
  return v;
}

template <class V>
FUSED_REG_INLINE void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// The numbers in these places of a and, behind it, b.
template <size_t... place>
FUSED_REG_INLINE Double shuffled(Double a, Double b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, place...);
#else
  return __builtin_shuffle(a, b, Bits64{place...});
#endif
}

template <class S>
FUSED_REG_INLINE auto broadcast(double x) {
  using V = std::conditional_t<std::is_same_v<S, float>, Float, Double>;
  return static_cast<S>(x) - V{};  // x - 0 is x, also for -0.0
}

#if FUSED_REG_VECTOR_BYTES == 64
struct OneRounding {
  static FUSED_REG_INLINE Double of(Double a, Double b, Double c) {
    return (Double)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
};
FUSED_REG_INLINE DoublePair widen(const float* p) {
  return {{(Double)_mm512_cvtps_pd(_mm256_loadu_ps(p)), (Double)_mm512_cvtps_pd(_mm256_loadu_ps(p + 8))}};
}
FUSED_REG_INLINE DoublePair widen(Float v) {
  return {{(Double)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)),
           (Double)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1))}};
}
FUSED_REG_INLINE Float load_float16(const uint16_t* p) { return (Float)_mm512_cvtph_ps(load<__m256i>(p)); }
FUSED_REG_INLINE HalfBits16 to_float16(Float v) {
  return (HalfBits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif FUSED_REG_VECTOR_BYTES == 32
struct OneRounding {
  static FUSED_REG_INLINE Double of(Double a, Double b, Double c) {
    return (Double)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
};
FUSED_REG_INLINE DoublePair widen(const float* p) {
  return {{(Double)_mm256_cvtps_pd(_mm_loadu_ps(p)), (Double)_mm256_cvtps_pd(_mm_loadu_ps(p + 4))}};
}
FUSED_REG_INLINE DoublePair widen(Float v) {
  return {{(Double)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v)),
           (Double)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1))}};
}
FUSED_REG_INLINE Float load_float16(const uint16_t* p) { return (Float)_mm256_cvtph_ps(load<__m128i>(p)); }
FUSED_REG_INLINE HalfBits16 to_float16(Float v) {
  return (HalfBits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__aarch64__)
struct OneRounding {
  static FUSED_REG_INLINE Double of(Double a, Double b, Double c) {
    return (Double)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
};
FUSED_REG_INLINE DoublePair widen(Float v) {
  return {{(Double)vcvt_f64_f32(vget_low_f32((float32x4_t)v)), (Double)vcvt_high_f64_f32((float32x4_t)v)}};
}
FUSED_REG_INLINE DoublePair widen(const float* p) { return widen(load<Float>(p)); }
FUSED_REG_INLINE Float load_float16(const uint16_t* p) { return (Float)vcvt_f32_f16(load<float16x4_t>(p)); }
FUSED_REG_INLINE HalfBits16 to_float16(Float v) { return (HalfBits16)vcvt_f16_f32((float32x4_t)v); }
#else
using OneRounding = TwoRoundings;  // no such instruction; used only where both give the same bits
FUSED_REG_INLINE DoublePair widen(const float* p) { return {{Double{p[0], p[1]}, Double{p[2], p[3]}}}; }
FUSED_REG_INLINE DoublePair widen(Float v) { return {{Double{v[0], v[1]}, Double{v[2], v[3]}}}; }
FUSED_REG_INLINE Float load_float16(const uint16_t* p) {
  const Bits32 bits = __builtin_convertvector(load<HalfBits16>(p), Bits32), magnitude = bits & 0x7fff;
  // By way of exponents so high that infinity and NaN have their own; and no subnormal float, which may be flushed to
  // 0.
  const Float normal = (Float)((magnitude << 13) + 0x70000000) * 0x1p-112f;
  const Float subnormal = (Float)(magnitude | 0x3f000000) - 0.5f;
  return (Float)((Bits32)(magnitude < 0x400 ? subnormal : normal) | (bits & 0x8000) << 16);
}
FUSED_REG_INLINE HalfBits16 to_float16(Float v) {
  const Bits32 bits = (Bits32)v, magnitude = bits & 0x7fffffff;
  const Bits32 normal = (magnitude - 0x38000000 + (((magnitude >> 13) & 1) + 0xfff)) >> 13;
  const Bits32 subnormal = (Bits32)((Float)magnitude + 0.5f) - 0x3f000000;
  const Bits32 finite = magnitude < 0x38800000 ? subnormal : normal;
  const Bits32 other = v == v ? Bits32{} + 0x7c00 : Bits32{} + 0x7e00;
  return __builtin_convertvector((magnitude < 0x47800000 ? finite : other) | (bits >> 16 & 0x8000), HalfBits16);
}
#endif

// In the upper half of every number, and anything in the lower; NaN has one form.
FUSED_REG_INLINE Bits32 to_bfloat16(Float v) {
  const Bits32 bits = (Bits32)v;
  const Bits32 nearest_even = bits + ((bits >> 16) & 1) + 0x7fff;
  return v == v ? nearest_even : Bits32{} + 0x7fc00000;
}

// One Element a dtype: how kCount consecutive elements reach the sums, in float64, and the functions of a pass, in the
// compute type; and how they are written, of the first and the last of kParts vectors. Element i is in part i % kParts;
// the vectors of float64 are those of the parts in turn.
template <Dtype>
struct Element;

template <>
struct Element<Dtype::kFloat32> {
  using Storage = float;
  using Scalar = float;
  static constexpr int kCount = kFloats, kParts = 1;
  static FUSED_REG_INLINE DoublePair widened(const float* p) { return widen(p); }
  static FUSED_REG_INLINE Float read(const float* p, int) { return load<Float>(p); }
  static FUSED_REG_INLINE Float written(Float v, Float) { return v; }
};

template <>
struct Element<Dtype::kFloat64> {
  using Storage = double;
  using Scalar = double;
  static constexpr int kCount = kDoubles, kParts = 1;
  static FUSED_REG_INLINE Doubles<1> widened(const double* p) { return {{load<Double>(p)}}; }
  static FUSED_REG_INLINE Double read(const double* p, int) { return load<Double>(p); }
  static FUSED_REG_INLINE Double written(Double v, Double) { return v; }
};

// Pairs of 32 bits: to take them apart, and put together, takes less than to widen them in order.
template <>
struct Element<Dtype::kBFloat16> {
  using Storage = uint16_t;
  using Scalar = float;
  static constexpr int kCount = 2 * kFloats, kParts = 2;
  static FUSED_REG_INLINE Doubles<4> widened(const uint16_t* p) {
    const DoublePair even = widen(read(p, 0)), odd = widen(read(p, 1));
    return {{even.of[0], odd.of[0], even.of[1], odd.of[1]}};
  }
  static FUSED_REG_INLINE Float read(const uint16_t* p, int part) {
    const Bits32 pairs = load<Bits32>(p);
    return (Float)(part == 0 ? pairs << 16 : pairs & 0xffff0000);
  }
  static FUSED_REG_INLINE Bits16 written(Float even, Float odd) {
    return (Bits16)(to_bfloat16(even) >> 16 | (to_bfloat16(odd) & 0xffff0000));
  }
};

template <>
struct Element<Dtype::kFloat16> {
  using Storage = uint16_t;
  using Scalar = float;
  static constexpr int kCount = kFloats, kParts = 1;
  static FUSED_REG_INLINE DoublePair widened(const uint16_t* p) { return widen(load_float16(p)); }
  static FUSED_REG_INLINE Float read(const uint16_t* p, int) { return load_float16(p); }
  static FUSED_REG_INLINE HalfBits16 written(Float v, Float) { return to_float16(v); }
};

}  // namespace fused_reg::FUSED_REG_ISA
