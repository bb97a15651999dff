// The kernel of some chunks, their sums in the order of summation.h. chunk_kernel_<isa>.cpp includes it with
// FUSED_REG_ISA and FUSED_REG_VECTOR_BYTES set. Whatever the width of the vectors, every instruction set gives the same
// bits.
#pragma once

#include <algorithm>

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

// Ahead of the reads, into the second-level cache. The hardware prefetcher alone leaves a third of the
// bandwidth unused, because the arithmetic fills the reorder buffer.
constexpr int64_t kPrefetchBytes = 4096;
constexpr size_t kCacheLine = 64;

// Of an optimizer's step, whose streams are read in their order, into the first level.
constexpr int64_t kPrefetchSteps = 2048;

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

template <Dtype dtype, class P>
struct Kernel {
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using Factor = decltype(broadcast<Scalar>(0));
  static constexpr bool kWide = std::is_same_v<Scalar, double>;
  using MultiplyAdd = std::conditional_t<kWide, TwoRoundings, OneRounding>;
  static constexpr unsigned kRead = P::kReads | (P::kSums ? bit(0) : 0);

  Factor factors[P::kFactors + 1];
  Double sum_factors[P::kSumFactors + 1];
  Double scale;  // of the elements in the sums
  BlockSums sums[kPassSums][kBlocks];
  unsigned options;
  int exponent;

  // Float64 sums are those of w / 2^exponent.
  Kernel(const StepNumbers& numbers, int exponent) : options(options_of(numbers)), exponent(exponent) {
    set_factors(numbers);
    double doubles[P::kSumFactors + 1];
    P::template sum_factors<Scalar>(numbers, exponent, doubles);
    for (int f = 0; f < P::kSumFactors; ++f) {
      sum_factors[f] = broadcast<double>(doubles[f]);
    }
    scale = broadcast<double>(exponent == 0 ? 1 : std::ldexp(1.0, -exponent));
  }

  FUSED_REG_INLINE void set_factors(const StepNumbers& numbers) {
    Scalar scalars[P::kFactors + 1];
    P::factors(numbers, scalars);
    for (int f = 0; f < P::kFactors; ++f) {
      factors[f] = broadcast<Scalar>(scalars[f]);
    }
  }

  // What a strip of a row will be, some rows later.
  static FUSED_REG_INLINE void prefetch(const Storage* strip) {
    const char* const ahead = reinterpret_cast<const char*>(strip) + kPrefetchBytes;
    for (size_t byte = 0; byte < kStrip * sizeof(Storage); byte += kCacheLine) {
      __builtin_prefetch(ahead + byte, 0, 2);
    }
  }

  static FUSED_REG_INLINE bool is_there(Storage* const* streams, int s) {
    return !(P::kOptional & bit(s)) || streams[s] != nullptr;
  }

  // `usual`: what may be there and is rare is not.
  template <bool usual = false>
  FUSED_REG_INLINE void elements(Storage* const* streams, int64_t i) const {
    const unsigned known = usual ? options & P::kUsual : options;
    const auto is_there = [&](Storage* const* all, int s) {
      if constexpr (usual) {
        return !(P::kOptional & bit(s)) || (P::states(known) & bit(s)) != 0;
      }
      return Kernel::is_there(all, s);
    };
    for (int part = 0; part < E::kParts; ++part) {
      Factor x[kStreams];
      for (int s = 0; s < kStreams; ++s) {
        if (P::kReads & bit(s)) {
          x[s] = is_there(streams, s) ? E::read(streams[s] + i, part) : Factor{};
        } else if (P::kOptional & bit(s)) {
          x[s] = Factor{};
        }
      }
      if constexpr (P::kHasOptions) {
        P::element(x, factors, known);
      } else {
        P::element(x, factors);
      }
      for (int s = 0; s < kStreams; ++s) {
        if (P::kWrites & bit(s) && is_there(streams, s)) {
          E::write(streams[s] + i, part, x[s]);
        }
      }
      if constexpr (P::kPositiveZeros && sizeof(Storage) == sizeof(uint16_t)) {
        if (!P::kHasOptions || known & kProximal) {
          store(streams[0] + i, with_positive_zero(load<Bits16>(streams[0] + i)));
        }
      }
    }
  }

  // Adds elements of the parameter to the two sums of their lanes, which are so many vectors apart.
  template <int apart>
  FUSED_REG_INLINE void add(Double* sums, const Storage* elements) const {
    if constexpr (P::kSums != 0) {
      const DoublePair w = E::widened(elements);
      for (int h = 0; h < 2; ++h) {
        Double x[2] = {sums[h], sums[apart + h]};
        P::template add<MultiplyAdd>(x, w.half[h], sum_factors,
                                     [&](Double y) __attribute__((always_inline)) { return kWide ? y * scale : y; });
        sums[h] = x[0];
        sums[apart + h] = x[1];
      }
    }
  }

  // A block of an optimizer's step, which has so many streams and so much to do with an element that they are read in
  // the order of memory, into the first-level cache, and the sums stay there. `usual`: no option is rare.
  template <bool usual>
  FUSED_REG_INLINE void step(Double* sums, Storage* const* streams, int64_t begin, int rows) const {
    constexpr int kLine = std::max<int>(kCacheLine / sizeof(Storage), kFloats);
    int64_t i = begin;
    for (int row = 0; row < rows; ++row) {
      Double* next = sums;
      for (int line = 0; line < kLanes; line += kLine) {
        for (int s = 0; s < kStreams; ++s) {
          if (kRead & bit(s) && is_there(streams, s)) {
            __builtin_prefetch(reinterpret_cast<const char*>(streams[s] + i) + kPrefetchSteps, 0, 3);
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < kLine; v += kFloats) {
          add<kLanes / kDoubles>(next, streams[0] + i);
          elements<usual>(streams, i);
          next += kFloats / kDoubles;
          i += kFloats;
        }
      }
    }
  }

  FUSED_REG_BLOCK void block(int b, Storage* const* streams, int64_t begin, int rows) {
    Lanes lanes[kPassSums];
    if constexpr (P::kHasOptions) {
      if constexpr (P::kSums != 0) {
        std::memset(lanes, 0, sizeof lanes);
      }
      constexpr bool kCanBeUsual = P::kUsual != 0 && FUSED_REG_VECTOR_BYTES > 16;
      kCanBeUsual && (options & ~P::kUsual) == 0 ? step<kCanBeUsual>(lanes[0].sums, streams, begin, rows)
                                                 : step<false>(lanes[0].sums, streams, begin, rows);
    }
    for (int strip = 0; strip < kLanes && !P::kHasOptions; strip += kStrip) {
      constexpr int kVectors = kStrip / kDoubles;
      Double strip_sums[kPassSums * kVectors] = {};  // kept in registers
      for (int row = 0; row < rows; ++row) {
        const int64_t at = begin + row * kLanes + strip;
        for (int s = 0; s < kStreams; ++s) {
          if (kRead & bit(s) && is_there(streams, s)) {
            prefetch(streams[s] + at);
          }
        }
        for (int v = 0; v < kStrip / kFloats; ++v) {
          const int64_t i = at + v * kFloats;
          add<kVectors>(strip_sums + 2 * v, streams[0] + i);
          if constexpr (P::kWrites != 0) {
            elements(streams, i);
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        lanes[0].sums[strip / kDoubles + v] = strip_sums[v];
        lanes[1].sums[strip / kDoubles + v] = strip_sums[kVectors + v];
      }
    }
    for (int k = 0; k < kPassSums; ++k) {
      if (P::kSums & bit(k)) {
        lanes[k].fold_into(sums[k][b].lanes);
      }
    }
  }

  // The chunk at these streams.
  ChunkSums run(Storage* const* streams, int64_t size) {
    int64_t i = 0;
    int b = 0;
    for (; i + kBlock <= size; i += kBlock) {
      block(b++, streams, i, kRows);
    }
    const int count = static_cast<int>(size - i);
    const int rows = (count + kLanes - 1) / kLanes;
    if (count % kLanes == 0) {
      if (rows > 0) {
        block(b++, streams, i, rows);
      }
    } else {  // the last row padded with what changes no sum
      constexpr int kUsed = streams_in(kRead | P::kWrites);
      Storage padded[kUsed][kBlock];
      Storage* ends[kStreams] = {};
      for (int s = 0; s < kUsed; ++s) {
        if (!is_there(streams, s)) {
          continue;
        }
        ends[s] = padded[s];
        if (kRead & bit(s)) {
          std::memcpy(padded[s], streams[s] + i, count * sizeof(Storage));
          std::memset(padded[s] + count, P::kPadding, (rows * kLanes - count) * sizeof(Storage));
        }
      }
      block(b++, ends, 0, rows);
      for (int s = 0; s < kUsed; ++s) {
        if (P::kWrites & bit(s) && is_there(streams, s)) {
          std::memcpy(streams[s] + i, padded[s], count * sizeof(Storage));
        }
      }
    }
    ChunkSums found{};
    for (int k = 0; k < kPassSums; ++k) {
      found.of[k] = {P::kSums & bit(k) ? total(sums[k], b) : 0, exponent};
    }
    return found;
  }

  // Chunks of less than a row, as many as begin within so many elements at once: what an element adds to its lane, then
  // the trees; and for each element the factors of its chunk.
  static constexpr int kShort = 512;

  void run_short(Storage* const* streams, int64_t size, int64_t chunk, const double* norms, StepNumbers* numbers,
                 ChunkSums* found) {
    alignas(64) double shares[kPassSums][kShort];
    alignas(64) Scalar spread[P::kFactors + 1][kShort];
    for (int64_t c = 0; P::kWrites != 0 && norms != nullptr && c * chunk < size; ++c) {
      Scalar scalars[P::kFactors + 1];
      numbers->norm = norms[c];
      P::factors(*numbers, scalars);
      for (int f = 0; f < P::kFactors; ++f) {
        std::fill_n(&spread[f][c * chunk], std::min(chunk, size - c * chunk), scalars[f]);
      }
    }
    for (int64_t i = 0; i < size; i += kFloats) {
      constexpr int kUsed = streams_in(kRead | P::kWrites);
      Storage padded[kUsed][kFloats];
      Storage* at[kStreams] = {};
      const bool is_whole = i + kFloats <= size;
      for (int s = 0; s < kUsed; ++s) {
        at[s] = is_whole ? streams[s] + i : padded[s];
        if (!is_whole && kRead & bit(s)) {
          std::memset(padded[s], 0, sizeof padded[s]);
          std::memcpy(padded[s], streams[s] + i, (size - i) * sizeof(Storage));
        }
      }
      if constexpr (P::kSums != 0) {
        Double lanes[2 * kPassSums] = {};
        add<2>(lanes, at[0]);
        for (int k = 0; k < kPassSums; ++k) {
          store(&shares[k][i], lanes[2 * k]);
          store(&shares[k][i + kDoubles], lanes[2 * k + 1]);
        }
      }
      if constexpr (P::kWrites != 0) {
        for (int f = 0; norms != nullptr && f < P::kFactors; ++f) {
          factors[f] = load<Factor>(&spread[f][i]);
        }
        elements(at, 0);
        for (int s = 0; s < kUsed; ++s) {
          if (!is_whole && P::kWrites & bit(s)) {
            std::memcpy(streams[s] + i, padded[s], (size - i) * sizeof(Storage));
          }
        }
      }
    }
    for (int64_t c = 0; found != nullptr && c * chunk < size; ++c) {
      found[c] = ChunkSums{};
      for (int k = 0; k < kPassSums; ++k) {
        if (P::kSums & bit(k)) {
          double* const lanes = &shares[k][c * chunk];
          int64_t count = std::min(chunk, size - c * chunk);
          for (int half = kLanes / 2; half > 0; half /= 2) {
            for (int64_t lane = 0; lane + half < count; ++lane) {
              lanes[lane] += lanes[lane + half];
            }
            count = std::min<int64_t>(count, half);
          }
          found[c].of[k].sum = lanes[0];
        }
      }
    }
  }
};

// Where sums have left the range of float64, they are taken again.
template <Dtype dtype, class P>
void run_kernel(const ChunkTask& task, ChunkSums* sums) {
  using Storage = typename Element<dtype>::Storage;
  constexpr bool kIsRescued = !std::is_void_v<typename P::Sums> && (dtype == Dtype::kFloat64 || P::kOfAnyDtype);
  if constexpr (kIsRescued && (P::kWrites & bit(0))) {
    if (sums != nullptr) {
      run_kernel<dtype, typename P::Sums>(task, sums);  // of what is written over
      sums = nullptr;
    }
  }
  Kernel<dtype, P> kernel(task.numbers, 0);
  StepNumbers numbers = task.numbers;
  Storage* streams[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    streams[s] = static_cast<Storage*>(task.streams[s]);
  }
  const double* norms = P::kFactors == 0 ? nullptr : task.norms;
  if constexpr (Element<dtype>::kParts == 1 && !P::kHasOptions && !kIsRescued) {
    const int64_t chunk = std::min(task.size, task.chunk_size);
    if (chunk < kLanes) {
      const int64_t step = kernel.kShort / chunk * chunk;
      for (int64_t i = 0; i < task.size; i += step) {
        Storage* at[kStreams];
        std::transform(streams, streams + kStreams, at, [&](Storage* s) { return s == nullptr ? s : s + i; });
        kernel.run_short(at, std::min(step, task.size - i), chunk, norms == nullptr ? norms : norms + i / chunk,
                         &numbers, sums == nullptr ? sums : sums + i / chunk);
      }
      return;
    }
  }
  for (int64_t left = task.size; left > 0; left -= task.chunk_size) {
    if (norms != nullptr) {
      numbers.norm = *norms++;
      kernel.set_factors(numbers);
    }
    const int64_t size = std::min(left, task.chunk_size);
    ChunkSums found = kernel.run(streams, size);
    if constexpr (kIsRescued) {
      const int exponent = sums == nullptr ? 0 : rescue_exponent(found.of[0].sum, found.of[1].sum, P::kSums & kL2);
      if (exponent != 0) {
        found = Kernel<dtype, typename P::Sums>(numbers, exponent).run(streams, size);
      }
    }
    if (sums != nullptr) {
      *sums++ = found;
    }
    for (int s = 0; s < kStreams; ++s) {
      streams[s] += streams[s] == nullptr ? 0 : size;
    }
  }
}

// What a pass that knows some terms is compiled for (passes/terms.h), where a chunk has these of them.
constexpr int compiled(int terms, int known) {
  return terms & kFurther ? known & (kAnyTerms | kFurther) : terms == (kNorm | kL1) ? kNorm | kL1L2 : terms;
}

template <Dtype dtype, template <int> class P, int known, int terms = 0>
void run_compiled(const ChunkTask& task, ChunkSums* sums) {
  if constexpr ((terms & ~known) == 0 && compiled(terms, known) == terms) {
    if (compiled(task.numbers.terms & known, known) == terms) {
      return run_kernel<dtype, P<terms>>(task, sums);
    }
  }
  if constexpr (terms < known) {
    run_compiled<dtype, P, known, terms + 1>(task, sums);
  }
}

// A pass; with further terms in parts, for which the chunks are still in the cache.
template <Dtype dtype, template <int> class P, int known>
void run_terms(const ChunkTask& task, ChunkSums* sums) {
  if constexpr (P<known>::kHasOptions) {
    if (task.numbers.terms == kNone) {
      return run_kernel<dtype, P<kNone>>(task, sums);
    }
    if ((task.numbers.terms & ~known) == 0) {
      return run_kernel<dtype, P<known>>(task, sums);
    }
    if (sums != nullptr) {
      run_terms<dtype, PenaltyPass, known>(task, sums);
    }
    return run_kernel<dtype, P<kAllTerms>>(task, nullptr);
  } else if constexpr (P<known>::kSums != 0 && known != kNone) {
    if (task.numbers.terms & kFurther) {
      run_compiled<dtype, PenaltyPass, kL1L2>(task, sums);
      FurtherTerms::each([&](auto term) {
        using T = decltype(term);
        if (task.numbers.terms & T::kBit) {
          ChunkSums found[kMaxVisit];
          run_kernel<dtype, typename TermSum<T>::template Pass<0>>(task, found);
          for (int64_t c = 0; c * task.chunk_size < task.size; ++c) {
            const ScaledSum& sum = found[c].of[1];
            sums[c].of[T::kSum] = {sum.sum, T::result_exponent(task.numbers, sum.exponent)};
          }
        }
      });
      if constexpr (P<known>::kWrites != 0) {
        run_compiled<dtype, P<known>::template Alone, kAllTerms>(task, nullptr);
      }
      return;
    }
  }
  run_compiled<dtype, P, known>(task, sums);
}

template <Dtype dtype>
void run_pass_of(const ChunkTask& task, ChunkSums* sums) {
  switch (task.pass) {
#define FUSED_REG_RUN(name, terms, numbers) \
  case Pass::k##name:                       \
    return run_terms<dtype, name##Pass, terms>(task, sums);
    FUSED_REG_PASSES(FUSED_REG_RUN)
    FUSED_REG_STEPS(FUSED_REG_RUN)
#undef FUSED_REG_RUN
    case Pass::kCount:
      break;
  }
}

inline void run_pass(const ChunkTask& task, ChunkSums* sums) {
  switch (task.dtype) {
    case Dtype::kFloat32:
      return run_pass_of<Dtype::kFloat32>(task, sums);
    case Dtype::kFloat64:
      return run_pass_of<Dtype::kFloat64>(task, sums);
    case Dtype::kBFloat16:
      return run_pass_of<Dtype::kBFloat16>(task, sums);
    case Dtype::kFloat16:
      return run_pass_of<Dtype::kFloat16>(task, sums);
  }
}

}  // namespace fused_reg::FUSED_REG_ISA
