// What is done with the elements of a chunk (ChunkPass says when). The formulas are penalty.h's.
#pragma once

#include "chunk_pass.cuh"

namespace fused_reg::cuda {

template <Dtype dtype>
constexpr bool kWide = std::is_same_v<typename Element<dtype>::Scalar, double>;

// In float64 the square of a narrower element is exact.
template <Dtype dtype>
using MultiplyAdd = std::conditional_t<kWide<dtype>, TwoRoundings, OneRounding>;

// The sums of the terms, and their gradient: each, or both. `adds`: the gradient may be added to what is there;
// `norms`: it may have that of the group's norm in it.
template <Dtype dtype, bool sums, bool adds, bool norms>
class TermsJob {
 public:
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  static constexpr bool kSums = sums, kWrites = true, kAdds = adds, kInPlace = false;
  static constexpr int kBatch = adds ? 4 : 8, kUnrolled = adds ? 1 : 2;

  __device__ TermsJob(const Chunk& chunk, double factor)
      : terms_(terms_of(chunk.l1, chunk.l2)),
        c1_(gradient_factor<Scalar>(factor, chunk.l1)),
        c2_(gradient_factor<Scalar>(factor, chunk.l2)),
        norm_{} {}

  // norm: of the chunk's group.
  __device__ TermsJob(const Chunk& chunk, double factor, double l2_norm, double norm) : TermsJob(chunk, factor) {
    if (l2_norm != 0) {
      terms_ = static_cast<Terms>(terms_ | kNorm);
      norm_ = norm_gradient<Scalar>(factor, l2_norm, norm);
    }
  }

  static __device__ Storage padding() { return {}; }

  template <int count>
  __device__ __forceinline__ void add(const Storage (&w)[count], double (&l1)[count], double (&l2)[count]) const {
    if (terms_ & kL1) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        l1[i] = add_l1_term(l1[i], static_cast<double>(E::widen(w[i])));
      }
    }
    if (terms_ & kL2) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        l2[i] = add_l2_term<MultiplyAdd<dtype>>(l2[i], static_cast<double>(E::widen(w[i])));
      }
    }
  }

  template <int count>
  __device__ __forceinline__ void write(const Storage (&w)[count], const Storage (&old)[count], bool add_to_old,
                                        Storage (&out)[count]) const {
    switch (static_cast<Terms>(terms_ & kL1L2)) {
      case kNone:
        return write_terms<kNone>(w, old, add_to_old, out);
      case kL1:
        return write_terms<kL1>(w, old, add_to_old, out);
      case kL2:
        return write_terms<kL2>(w, old, add_to_old, out);
      case kL1L2:
        return write_terms<kL1L2>(w, old, add_to_old, out);
      case kNorm:
        break;
    }
  }

 private:
  template <Terms terms, int count>
  __device__ __forceinline__ void write_terms(const Storage (&w)[count], const Storage (&old)[count], bool add_to_old,
                                              Storage (&out)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const Scalar wide = E::widen(w[i]);
      Scalar g = gradient<terms>(wide, c1_, c2_);
      if (norms && (terms_ & kNorm)) {
        g = add_norm_gradient(g, wide, norm_.scale, norm_.factor);
      }
      out[i] = E::narrow(adds && add_to_old ? E::widen(old[i]) + g : g);
    }
  }

  Terms terms_;
  Scalar c1_, c2_;
  NormGradient<Scalar> norm_;
};

template <Dtype dtype>
using PenaltyJob = TermsJob<dtype, true, false, false>;
template <Dtype dtype>
using AccumulateJob = TermsJob<dtype, true, true, false>;
template <Dtype dtype>
using GradientJob = TermsJob<dtype, false, false, false>;
template <Dtype dtype>
using NormGradientJob = TermsJob<dtype, false, true, true>;

// The sums of |w / 2^exponent| and of (w / 2^exponent)^2.
template <Dtype dtype>
class TermSumsJob {
 public:
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  static constexpr bool kSums = true, kWrites = false, kAdds = false, kInPlace = false;
  static constexpr int kBatch = 4, kUnrolled = 1;

  __device__ TermSumsJob(const Chunk& chunk, Sums, double, int exponent)
      : has_l1_(chunk.l1 != 0), scale_(std::ldexp(1.0, -exponent)) {}

  static __device__ Storage padding() { return {}; }

  template <int count>
  __device__ __forceinline__ void add(const Storage (&w)[count], double (&l1)[count], double (&l2)[count]) const {
    if (has_l1_) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        l1[i] = add_l1_term(l1[i], scaled(w[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < count; ++i) {
      l2[i] = add_l2_term<MultiplyAdd<dtype>>(l2[i], scaled(w[i]));
    }
  }

 private:
  __device__ double scaled(Storage w) const { return kWide<dtype> ? E::widen(w) * scale_ : E::widen(w); }

  bool has_l1_;
  double scale_;
};

// In the second sum: of (soft(w) / 2^exponent)^2, or how many elements are 0.
template <Dtype dtype>
class OneSumJob {
 public:
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  static constexpr bool kSums = true, kWrites = false, kAdds = false, kInPlace = false;
  static constexpr int kBatch = sizeof(Storage) == 2 ? 2 : 4, kUnrolled = 1;

  __device__ OneSumJob(const Chunk& chunk, Sums what, double step, int exponent)
      : zeros_(what == Sums::kZeros),
        threshold_(static_cast<typename E::Scalar>(step * chunk.l1)),
        scale_(std::ldexp(1.0, -exponent)) {}

  __device__ Storage padding() const { return zeros_ ? Storage{1} : Storage{}; }

  template <int count>
  __device__ __forceinline__ void add(const Storage (&w)[count], double (&)[count], double (&sum)[count]) const {
    if (zeros_) {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        sum[i] = sum[i] + (E::widen(w[i]) == 0 ? 1 : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const double softened = soft<double>(E::widen(w[i]), threshold_);
        sum[i] = add_l2_term<TwoRoundings>(sum[i], kWide<dtype> ? softened * scale_ : softened);
      }
    }
  }

 private:
  bool zeros_;
  double threshold_, scale_;
};

// The proximal operator, in place; with the norm of the group's soft(w).
template <Dtype dtype>
class ProxJob {
 public:
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  static constexpr bool kSums = false, kWrites = true, kAdds = false, kInPlace = true;
  static constexpr int kBatch = 4, kUnrolled = 1;

  __device__ ProxJob(const Chunk& chunk, double step, double l2_norm, double norm)
      : threshold_(static_cast<Scalar>(step * chunk.l1)),
        shrinkage_(static_cast<Scalar>(shrinkage(chunk.l2, l2_norm, step, norm))) {}

  static __device__ Storage padding() { return {}; }

  template <int count>
  __device__ __forceinline__ void write(const Storage (&w)[count], const Storage (&)[count], bool,
                                        Storage (&out)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      out[i] = E::narrow(prox<Scalar>(E::widen(w[i]), threshold_, shrinkage_));
      if constexpr (sizeof(Storage) == sizeof(uint16_t)) {
        out[i] = with_positive_zero(out[i]);
      }
    }
  }

 private:
  Scalar threshold_, shrinkage_;
};

}  // namespace fused_reg::cuda
