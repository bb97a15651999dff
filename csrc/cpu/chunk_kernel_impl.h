// The kernel of one chunk, its sums in the order of summation.h. chunk_kernel_<isa>.cpp includes it with
// FUSED_REG_ISA and FUSED_REG_VECTOR_BYTES set. Whatever the width of the vectors, every instruction set gives the same
// bits.
#pragma once

#include "../chunks.h"
#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

// Ahead of the reads, into the second-level cache. The hardware prefetcher alone leaves a third of the
// bandwidth unused, because the arithmetic fills the reorder buffer.
constexpr int64_t kPrefetchBytes = 4096;
constexpr size_t kCacheLine = 64;

// Lanes that are summed at a time: as many as the registers hold for two terms.
constexpr int kStrip = kFloats * (FUSED_REG_VECTOR_BYTES == 64 ? 4 : 2);
constexpr int kDoubles = kFloats / 2;

// A block is compiled for each of its calls, whose numbers of rows differ; in the baseline once, which takes less time.
#if FUSED_REG_VECTOR_BYTES == 16
#define FUSED_REG_BLOCK __attribute__((noinline))
#else
#define FUSED_REG_BLOCK FUSED_REG_INLINE
#endif

// The sums of one term over the rows of a block, lane by lane.
struct Lanes {
  Double sums[kLanes / kDoubles];

  // The halving tree from kLanes to kFoldedLanes.
  FUSED_REG_INLINE void fold_into(double* folded) {
    for (int half = kLanes / kDoubles / 2; half >= kFoldedLanes / kDoubles; half /= 2) {
      for (int v = 0; v < half; ++v) {
        sums[v] = sums[v] + sums[v + half];
      }
    }
    for (int v = 0; v < kFoldedLanes / kDoubles; ++v) {
      store(folded + v * kDoubles, sums[v]);
    }
  }
};

struct Work {
  bool sums, writes, reads_out;
};

constexpr Work work_of(Pass pass) {
  switch (pass) {
    case Pass::kSums:
    case Pass::kSoftSquares:
    case Pass::kZeros:
      return {true, false, false};
    case Pass::kSumsAndGradient:
      return {true, true, false};
    case Pass::kSumsAndAccumulate:
      return {true, true, true};
    case Pass::kGradient:
    case Pass::kProx:
      return {false, true, false};
    case Pass::kAccumulate:
      return {false, true, true};
  }
  return {};
}

template <Dtype dtype, int terms, Pass pass>
struct Kernel {
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using Factor = decltype(broadcast<Scalar>(0));
  static constexpr Work kWork = work_of(pass);
  static constexpr bool kWide = std::is_same_v<Scalar, double>;
  // The square of soft(w) in float64 is not exact.
  using MultiplyAdd = std::conditional_t<kWide || pass == Pass::kSoftSquares, TwoRoundings, OneRounding>;

  Factor c1, c2, norm_scale, norm_factor, threshold, shrinkage;
  Double scale, sum_threshold;  // of the sums
  BlockSums l1[kBlocks], l2[kBlocks];

  FUSED_REG_INLINE Double scaled(Double w) const { return kWide ? w * scale : w; }

  // What an element is in the sum of L2.
  FUSED_REG_INLINE Double l2_element(Double w) const {
    if constexpr (pass == Pass::kSoftSquares) {
      return scaled(soft(w, sum_threshold));
    } else if constexpr (pass == Pass::kZeros) {
      return w == 0 ? Double{} + 1 : Double{};
    } else {
      return scaled(w);
    }
  }

  FUSED_REG_INLINE Factor full_gradient(Factor w) const {
    const Factor g = gradient<(terms & kL1L2)>(w, c1, c2);
    if constexpr (terms & kNorm) {
      return add_norm_gradient(g, w, norm_scale, norm_factor);
    } else {
      return g;
    }
  }

  // What a strip of a row will be, some rows later.
  static FUSED_REG_INLINE void prefetch(const Storage* strip) {
    const char* const ahead = reinterpret_cast<const char*>(strip) + kPrefetchBytes;
    for (size_t byte = 0; byte < kStrip * sizeof(Storage); byte += kCacheLine) {
      __builtin_prefetch(ahead + byte, 0, 2);
    }
  }

  FUSED_REG_INLINE void write(const Storage* param, Storage* out) const {
    if constexpr (pass == Pass::kProx) {
      E::map(param, out, [&](Factor w) __attribute__((always_inline)) { return prox(w, threshold, shrinkage); });
      if constexpr (sizeof(Storage) == sizeof(uint16_t)) {
        store(out, with_positive_zero(load<Bits16>(out)));
      }
    } else if constexpr (kWork.reads_out) {
      E::update(param, out,
                [&](Factor w, Factor old) __attribute__((always_inline)) { return old + full_gradient(w); });
    } else {
      E::map(param, out, [&](Factor w) __attribute__((always_inline)) { return full_gradient(w); });
    }
  }

  FUSED_REG_BLOCK void block(int b, const Storage* param, Storage* out, int rows) {
    Lanes l1_lanes, l2_lanes;
    for (int strip = 0; strip < kLanes; strip += kStrip) {
      DoublePair l1_sums[kStrip / kFloats] = {}, l2_sums[kStrip / kFloats] = {};  // kept in registers
      for (int row = 0; row < rows; ++row) {
        prefetch(param + row * kLanes + strip);
        if constexpr (kWork.reads_out) {
          prefetch(out + row * kLanes + strip);
        }
        for (int v = 0; v < kStrip / kFloats; ++v) {
          const int64_t i = row * kLanes + strip + v * kFloats;
          if constexpr (kWork.sums) {
            const DoublePair w = E::widened(param + i);
            for (int h = 0; h < 2; ++h) {
              if constexpr (terms & kL1) {
                l1_sums[v].half[h] = add_l1_term(l1_sums[v].half[h], scaled(w.half[h]));
              }
              if constexpr (terms & kL2) {
                l2_sums[v].half[h] = add_l2_term<MultiplyAdd>(l2_sums[v].half[h], l2_element(w.half[h]));
              }
            }
          }
          if constexpr (kWork.writes) {
            write(param + i, out + i);
          }
        }
      }
      for (int v = 0; v < kStrip / kFloats; ++v) {
        for (int h = 0; h < 2; ++h) {
          l1_lanes.sums[strip / kDoubles + 2 * v + h] = l1_sums[v].half[h];
          l2_lanes.sums[strip / kDoubles + 2 * v + h] = l2_sums[v].half[h];
        }
      }
    }
    if constexpr (kWork.sums && (terms & kL1)) {
      l1_lanes.fold_into(l1[b].lanes);
    }
    if constexpr (kWork.sums && (terms & kL2)) {
      l2_lanes.fold_into(l2[b].lanes);
    }
  }

  // The sums of w * scale; float64 only.
  static ChunkSums run(const ChunkTask& task, double scale) {
    Kernel kernel;
    kernel.c1 = broadcast<Scalar>(task.c1);
    kernel.c2 = broadcast<Scalar>(task.c2);
    kernel.norm_scale = broadcast<Scalar>(task.norm.scale);
    kernel.norm_factor = broadcast<Scalar>(task.norm.factor);
    kernel.threshold = broadcast<Scalar>(task.threshold);
    kernel.shrinkage = broadcast<Scalar>(task.shrinkage);
    kernel.scale = broadcast<double>(scale);
    kernel.sum_threshold = broadcast<double>(task.threshold);
    const auto* param = static_cast<const Storage*>(task.param);
    auto* out = static_cast<Storage*>(task.out);
    int64_t i = 0;
    int b = 0;
    for (; i + kBlock <= task.size; i += kBlock) {
      kernel.block(b++, param + i, out + i, kRows);
    }
    const int count = static_cast<int>(task.size - i);
    const int rows = (count + kLanes - 1) / kLanes;
    if (count % kLanes == 0) {
      if (rows > 0) {
        kernel.block(b++, param + i, out + i, rows);
      }
    } else {  // the last row padded with what adds nothing to a sum: zeros, or where these are counted, other bytes
      constexpr int kPadding = pass == Pass::kZeros ? 1 : 0;
      Storage padded[kBlock], padded_out[kBlock];
      std::memcpy(padded, param + i, count * sizeof(Storage));
      std::memset(padded + count, kPadding, (rows * kLanes - count) * sizeof(Storage));
      if constexpr (kWork.reads_out) {
        std::memcpy(padded_out, out + i, count * sizeof(Storage));
        std::memset(padded_out + count, 0, (rows * kLanes - count) * sizeof(Storage));
      }
      kernel.block(b++, padded, padded_out, rows);
      if constexpr (kWork.writes) {
        std::memcpy(out + i, padded_out, count * sizeof(Storage));
      }
    }
    if constexpr (!kWork.sums) {
      return {};
    }
    return {(terms & kL1) ? total(kernel.l1, b) : 0, (terms & kL2) ? total(kernel.l2, b) : 0};
  }
};

// `norm` is kNorm or 0.
template <Dtype dtype, Pass pass, int norm>
ChunkSums run_with(const ChunkTask& task, double scale) {
  switch (static_cast<Terms>(task.terms & kL1L2)) {
    case kNone:
      return Kernel<dtype, norm, pass>::run(task, scale);
    case kL1:
      return Kernel < dtype, norm | kL1, pass > ::run(task, scale);
    case kL2:
      return Kernel < dtype, norm | kL2, pass > ::run(task, scale);
    case kL1L2:
      return Kernel < dtype, norm | kL1L2, pass > ::run(task, scale);
    case kNorm:
      break;
  }
  return {};
}

template <Dtype dtype, Pass pass>
ChunkSums run_terms(const ChunkTask& task, double scale) {
  if (!(task.terms & kNorm)) {
    return run_with<dtype, pass, 0>(task, scale);
  }
  if constexpr (work_of(pass).sums) {  // the norm comes from the sum of squares
    return {};
  } else {
    return run_with<dtype, pass, kNorm>(task, scale);
  }
}

template <Dtype dtype>
ChunkSums run_pass(const ChunkTask& task, double scale = 1) {
  switch (task.pass) {
    case Pass::kSums:
      return run_terms<dtype, Pass::kSums>(task, scale);
    case Pass::kSumsAndGradient:
      return run_terms<dtype, Pass::kSumsAndGradient>(task, scale);
    case Pass::kSumsAndAccumulate:
      return run_terms<dtype, Pass::kSumsAndAccumulate>(task, scale);
    case Pass::kGradient:
      return run_terms<dtype, Pass::kGradient>(task, scale);
    case Pass::kAccumulate:
      return run_terms<dtype, Pass::kAccumulate>(task, scale);
    case Pass::kProx:
      return Kernel<dtype, kNone, Pass::kProx>::run(task, scale);
    case Pass::kSoftSquares:
      return Kernel<dtype, kL2, Pass::kSoftSquares>::run(task, scale);
    case Pass::kZeros:
      return Kernel<dtype, kL2, Pass::kZeros>::run(task, scale);
  }
  return {};
}

// Where the sums have left the range of float64, they are taken again.
inline ChunkSums run_float64(ChunkTask task) {
  const ChunkSums sums = run_pass<Dtype::kFloat64>(task);
  if (!work_of(task.pass).sums || task.pass == Pass::kZeros) {
    return sums;
  }
  const bool is_soft = task.pass == Pass::kSoftSquares;
  const int exponent = rescue_exponent(sums, is_soft || (task.terms & kL2));
  if (exponent == 0) {
    return sums;
  }
  task.pass = is_soft ? Pass::kSoftSquares : Pass::kSums;
  const ChunkSums again = run_pass<Dtype::kFloat64>(task, std::ldexp(1.0, -exponent));
  return {again.l1, again.l2, exponent};
}

inline ChunkSums run_chunk(const ChunkTask& task) {
  switch (task.dtype) {
    case Dtype::kFloat32:
      return run_pass<Dtype::kFloat32>(task);
    case Dtype::kFloat64:
      return run_float64(task);
    case Dtype::kBFloat16:
      return run_pass<Dtype::kBFloat16>(task);
    case Dtype::kFloat16:
      return run_pass<Dtype::kFloat16>(task);
  }
  return {};
}

}  // namespace fused_reg::FUSED_REG_ISA
