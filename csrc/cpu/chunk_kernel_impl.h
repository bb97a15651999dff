// The kernel of one chunk. chunk_kernel_<isa>.cpp includes it with FUSED_REG_ISA and FUSED_REG_VECTOR_BYTES set.
//
// A block is kRun rows of kLanes elements. Element i is summed in lane i % kLanes, whatever the width of the
// vectors, so every instruction set gives the same bits:
//
//            lane 0 .............. lane 15
//   row 0  [   0    1    2   ...     15  ]      a vector holds some lanes of a row;
//   row 1  [  16   17   18   ...     31  ]      a lane adds kRun elements in plain float64;
//    ...                                        then lane i takes lane i + 8, and the eight runs
//   row 15 [ 240  241  242   ...    255  ]      go into eight compensated sums
//
// At most 1 + 15 + 1 + 1 + 3 roundings reach any element (its square, its run, two lanes, a compensated sum, the tree
// of eight): the relative error of a chunk is below 21 * 2^-53 = 2.4e-15, whatever its size and content.
#pragma once

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

constexpr int kLanes = 16;
constexpr int kRun = 16;
constexpr int kBlock = kLanes * kRun;
constexpr int kGroups = kLanes / kFloats;  // groups of lanes that a Float covers

// Ahead of the reads, into the second-level cache. The hardware prefetcher alone leaves a third of the
// bandwidth unused, because the arithmetic fills the reorder buffer.
constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kCacheLine = 64;

constexpr int kVectors = 2 * kGroups;  // Doubles that hold the lanes

// The sums of one term over the runs of a block: vector v holds the lanes from v * kLanes / kVectors on.
struct Run {
  Double lanes[kVectors];
};

struct LaneSums {
  CompensatedSum<Double> lanes[kVectors / 2];

  FUSED_REG_INLINE void add(const Run& run) {
    for (int v = 0; v < kVectors / 2; ++v) {
      lanes[v].add(run.lanes[v] + run.lanes[v + kVectors / 2]);
    }
  }

  double total() const {
    constexpr int kSums = kLanes / 2;
    double x[kSums];
    for (int v = 0; v < kVectors / 2; ++v) {
      store(x + v * kSums / (kVectors / 2), result(lanes[v]));
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) {
        x[i] += x[i + half];
      }
    }
    return x[0];
  }
};

template <Dtype dtype, int terms, Pass pass>
struct Kernel {
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using Factor = decltype(broadcast<Scalar>(0));
  using MultiplyAdd = std::conditional_t<dtype == Dtype::kFloat64, TwoRoundings, OneRounding>;

  LaneSums l1, l2;
  Factor c1, c2;
  Double l1_scale, l2_scale;

  static FUSED_REG_INLINE Double scaled(Double w, Double scale) { return dtype == Dtype::kFloat64 ? w * scale : w; }

  FUSED_REG_INLINE void block(const Storage* param, Storage* grad, int rows) {
    Run l1_run, l2_run;
    for (int group = 0; group < kGroups; ++group) {
      DoublePair l1_lanes{}, l2_lanes{};  // kept in registers
#pragma GCC unroll 4
      for (int row = 0; row < rows; ++row) {
        const int64_t i = row * kLanes + group * kFloats;
        if constexpr (pass != Pass::kGradient) {
          const DoublePair w = E::widened(param + i);
          for (int h = 0; h < 2; ++h) {
            if constexpr (terms & kL1) {
              l1_lanes.half[h] = add_l1_term(l1_lanes.half[h], scaled(w.half[h], l1_scale));
            }
            if constexpr (terms & kL2) {
              l2_lanes.half[h] = add_l2_term<MultiplyAdd>(l2_lanes.half[h], scaled(w.half[h], l2_scale));
            }
          }
        }
        if constexpr (pass != Pass::kSums) {
          E::map(param + i, grad + i,
                 [&](auto w) __attribute__((always_inline)) { return gradient<terms>(w, c1, c2); });
        }
      }
      for (int h = 0; h < 2; ++h) {
        l1_run.lanes[2 * group + h] = l1_lanes.half[h];
        l2_run.lanes[2 * group + h] = l2_lanes.half[h];
      }
    }
    if constexpr (pass != Pass::kGradient && (terms & kL1)) {
      l1.add(l1_run);
    }
    if constexpr (pass != Pass::kGradient && (terms & kL2)) {
      l2.add(l2_run);
    }
  }

  static ChunkSums run(const ChunkTask& task) {
    Kernel kernel{{},
                  {},
                  broadcast<Scalar>(task.c1),
                  broadcast<Scalar>(task.c2),
                  broadcast<double>(task.l1_scale),
                  broadcast<double>(task.l2_scale)};
    const auto* param = static_cast<const Storage*>(task.param);
    auto* grad = static_cast<Storage*>(task.grad);
    int64_t i = 0;
    for (; i + kBlock <= task.size; i += kBlock) {
      const char* ahead = reinterpret_cast<const char*>(param + i) + kPrefetchBytes;
      for (int64_t byte = 0; byte < kBlock * static_cast<int64_t>(sizeof(Storage)); byte += kCacheLine) {
        __builtin_prefetch(ahead + byte, 0, 2);
      }
      kernel.block(param + i, grad + i, kRun);
    }
    if (i < task.size) {  // the tail, padded with zeros: they add nothing to a sum
      const int64_t count = task.size - i;
      Storage padded[kBlock] = {}, padded_grad[kBlock];
      std::memcpy(padded, param + i, count * sizeof(Storage));
      kernel.block(padded, padded_grad, static_cast<int>((count + kLanes - 1) / kLanes));
      if constexpr (pass != Pass::kSums) {
        std::memcpy(grad + i, padded_grad, count * sizeof(Storage));
      }
    }
    return {kernel.l1.total(), kernel.l2.total()};
  }
};

template <Dtype dtype, int terms>
ChunkSums run_pass(const ChunkTask& task) {
  switch (task.pass) {
    case Pass::kSums:
      return Kernel<dtype, terms, Pass::kSums>::run(task);
    case Pass::kSumsAndGradient:
      return Kernel<dtype, terms, Pass::kSumsAndGradient>::run(task);
    case Pass::kGradient:
      break;
  }
  return Kernel<dtype, terms, Pass::kGradient>::run(task);
}

template <Dtype dtype>
ChunkSums run_terms(const ChunkTask& task) {
  switch (task.terms) {
    case kNone:
      return run_pass<dtype, kNone>(task);
    case kL1:
      return run_pass<dtype, kL1>(task);
    case kL2:
      return run_pass<dtype, kL2>(task);
    case kL1L2:
      break;
  }
  return run_pass<dtype, kL1L2>(task);
}

inline ChunkSums run_chunk(const ChunkTask& task) {
  switch (task.dtype) {
    case Dtype::kFloat32:
      return run_terms<Dtype::kFloat32>(task);
    case Dtype::kFloat64:
      return run_terms<Dtype::kFloat64>(task);
    case Dtype::kBFloat16:
      return run_terms<Dtype::kBFloat16>(task);
    case Dtype::kFloat16:
      break;
  }
  return run_terms<Dtype::kFloat16>(task);
}

}  // namespace fused_reg::FUSED_REG_ISA
