// The kernel of some chunks, their sums in the order of summation.h. chunk_kernel_<isa>.cpp includes it with
// FUSED_REG_ISA and FUSED_REG_VECTOR_BYTES set. Whatever the width of the vectors, every instruction set gives the same
// bits.
#pragma once

#include <algorithm>

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

constexpr int kCacheLine = 64;

// A block is compiled for each of its calls, whose numbers of rows differ; in the baseline once, which takes less time.
#if FUSED_REG_VECTOR_BYTES == 16
#define FUSED_REG_BLOCK __attribute__((noinline))
#else
#define FUSED_REG_BLOCK FUSED_REG_INLINE
#endif

template <class E, class P>
struct Kernel {
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using Factor = decltype(broadcast<Scalar>(0));
  static constexpr bool kWide = std::is_same_v<Scalar, double>;
  using MultiplyAdd = std::conditional_t<kWide, TwoRoundings, OneRounding>;
  static constexpr unsigned kRead = P::kReads | (P::kSums ? bit(0) : 0);

  // Lanes that are summed at a time: as many as the registers hold for two terms. A step of an optimizer, which has
  // many streams and much to do with an element, takes all, and the sums stay in the first-level cache.
  static constexpr int kStrip = P::kSums == 0 || P::kHasOptions || FUSED_REG_VECTOR_BYTES == 64 ? kLanes : 2 * kFloats;

  // Elements ahead, fetched into the first-level cache: in the order of memory, whatever that of the sums is, so that
  // the prefetchers of the hardware follow. Strips take lines from all over a block, so the next one is fetched.
  static constexpr int64_t kAhead = P::kHasOptions ? 2048 / sizeof(Storage) : kBlock;

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

  // `usual`: what may be there and is rare is not.
  template <bool usual>
  FUSED_REG_INLINE bool is_there(Storage* const* streams, int s) const {
    if constexpr (usual) {
      return !(P::kOptional & bit(s)) || (P::states(options & P::kUsual) & bit(s)) != 0;
    }
    return !(P::kOptional & bit(s)) || streams[s] != nullptr;
  }

  template <bool usual>
  FUSED_REG_INLINE void elements(Storage* const* streams, int64_t i) const {
    const unsigned known = usual ? options & P::kUsual : options;
    Factor x[E::kParts][kStreams];
    for (int part = 0; part < E::kParts; ++part) {
      for (int s = 0; s < kStreams; ++s) {
        if (P::kReads & bit(s)) {
          x[part][s] = is_there<usual>(streams, s) ? E::read(streams[s] + i, part) : Factor{};
        } else if (P::kOptional & bit(s)) {
          x[part][s] = Factor{};
        }
      }
      if constexpr (P::kHasOptions) {
        P::element(x[part], factors, known);
      } else {
        P::element(x[part], factors);
      }
    }
    for (int s = 0; s < kStreams; ++s) {
      if (P::kWrites & bit(s) && is_there<usual>(streams, s)) {
        auto written = E::written(x[0][s], x[E::kParts - 1][s]);
        if constexpr (P::kPositiveZeros && sizeof(Storage) == sizeof(uint16_t)) {
          if (s == 0 && (!P::kHasOptions || known & kProximal)) {
            written = with_positive_zero(written);
          }
        }
        store(streams[s] + i, written);
      }
    }
  }

  // Adds elements of the parameter to the two sums of their lanes, which are so many vectors apart.
  template <int apart>
  FUSED_REG_INLINE void add(Double* sums, const Storage* elements) const {
    if constexpr (P::kSums != 0) {
      const auto w = E::widened(elements);
      for (int v = 0; v < E::kCount / kDoubles; ++v) {
        Double x[2] = {sums[v], sums[apart + v]};
        P::template add<MultiplyAdd>(x, w.of[v], sum_factors,
                                     [&](Double y) __attribute__((always_inline)) { return kWide ? y * scale : y; });
        sums[v] = x[0];
        sums[apart + v] = x[1];
      }
    }
  }

  // The rows of a block, and the sums of their lanes, E::kParts vectors at a time in the order of E. `usual`: no option
  // is rare.
  template <bool usual>
  FUSED_REG_INLINE void take_rows(Double* sums, Storage* const* streams, int64_t begin, int rows) const {
    constexpr int kLine = std::min(std::max<int>(kCacheLine / sizeof(Storage), E::kCount), kStrip);
    constexpr int kVectors = kStrip / kDoubles;
    int64_t ahead = begin + kAhead;
    for (int strip = 0; strip < kLanes; strip += kStrip) {
      Double strip_sums[kPassSums * kVectors] = {};
      for (int row = 0; row < rows; ++row) {
        int64_t i = begin + row * kLanes + strip;
        Double* next = strip_sums;
        for (int line = 0; line < kStrip; line += kLine) {
          for (int s = 0; s < kStreams; ++s) {
            if ((kRead | P::kWrites) & bit(s) && is_there<usual>(streams, s)) {
              __builtin_prefetch(streams[s] + ahead);
            }
          }
          ahead += kLine;
#pragma GCC unroll 4
          for (int v = 0; v < kLine; v += E::kCount) {
            add<kVectors>(next, streams[0] + i);
            if constexpr (P::kWrites != 0) {
              elements<usual>(streams, i);
            }
            next += E::kCount / kDoubles;
            i += E::kCount;
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        sums[strip / kDoubles + v] = strip_sums[v];
        sums[(kLanes + strip) / kDoubles + v] = strip_sums[kVectors + v];
      }
    }
  }

  // The halving tree from kLanes to kFoldedLanes.
  static FUSED_REG_INLINE void fold(Double* sums, double* folded) {
    constexpr int kLeft = std::max(E::kParts * kDoubles, kFoldedLanes);
    for (int half = kLanes / kDoubles / 2; half >= kLeft / kDoubles; half /= 2) {
      for (int v = 0; v < half; ++v) {
        sums[v] = sums[v] + sums[v + half];
      }
    }
    double lanes[kLeft];
    for (int v = 0; v < kLeft / kDoubles; ++v) {
      for (int i = 0; i < kDoubles; ++i) {
        lanes[(v / E::kParts * kDoubles + i) * E::kParts + v % E::kParts] = sums[v][i];
      }
    }
    for (int lane = 0; lane < kFoldedLanes; ++lane) {
      folded[lane] = kLeft > kFoldedLanes ? lanes[lane] + lanes[lane + kLeft / 2] : lanes[lane];
    }
  }

  FUSED_REG_BLOCK void block(int b, Storage* const* streams, int64_t begin, int rows) {
    Double lanes[kPassSums * kLanes / kDoubles];
    constexpr bool kCanBeUsual = P::kUsual != 0 && FUSED_REG_VECTOR_BYTES > 16;
    kCanBeUsual && (options & ~P::kUsual) == 0 ? take_rows<kCanBeUsual>(lanes, streams, begin, rows)
                                               : take_rows<false>(lanes, streams, begin, rows);
    for (int k = 0; k < kPassSums; ++k) {
      if (P::kSums & bit(k)) {
        fold(lanes + k * kLanes / kDoubles, sums[k][b].lanes);
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
        if (!is_there<false>(streams, s)) {
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
        if (P::kWrites & bit(s) && is_there<false>(streams, s)) {
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
    for (int64_t i = 0; i < size; i += E::kCount) {
      constexpr int kUsed = streams_in(kRead | P::kWrites);
      Storage padded[kUsed][E::kCount];
      Storage* at[kStreams] = {};
      const bool is_whole = i + E::kCount <= size;
      for (int s = 0; s < kUsed; ++s) {
        at[s] = is_whole ? streams[s] + i : padded[s];
        if (!is_whole && kRead & bit(s)) {
          std::memset(padded[s], 0, sizeof padded[s]);
          std::memcpy(padded[s], streams[s] + i, (size - i) * sizeof(Storage));
        }
      }
      if constexpr (P::kSums != 0) {
        Double lanes[kPassSums][E::kCount / kDoubles] = {};
        add<E::kCount / kDoubles>(lanes[0], at[0]);
        for (int k = 0; k < kPassSums; ++k) {
          std::memcpy(&shares[k][i], lanes[k], sizeof lanes[k]);
        }
      }
      if constexpr (P::kWrites != 0) {
        for (int f = 0; norms != nullptr && f < P::kFactors; ++f) {
          factors[f] = load<Factor>(&spread[f][i]);
        }
        elements<false>(at, 0);
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
  StepNumbers numbers = task.numbers;
  Storage* streams[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    streams[s] = static_cast<Storage*>(task.streams[s]);
  }
  const double* norms = P::kFactors == 0 ? nullptr : task.norms;
  if constexpr (!P::kHasOptions && !kIsRescued) {
    const int64_t chunk = std::min(task.size, task.chunk_size);
    if (chunk < kLanes) {
      Kernel<OrderedElement<dtype>, P> kernel(numbers, 0);
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
  Kernel<Element<dtype>, P> kernel(numbers, 0);
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
        found = Kernel<Element<dtype>, typename P::Sums>(numbers, exponent).run(streams, size);
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
