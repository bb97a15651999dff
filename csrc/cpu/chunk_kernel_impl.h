// The kernel of some chunks, their sums in the order of summation.h. chunk_kernel_<isa>.cpp includes it with
// FUSED_REG_ISA and FUSED_REG_VECTOR_BYTES set. Whatever the width of the vectors, every instruction set gives the same
// bits.
#pragma once

#include <algorithm>

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

constexpr int kCacheLine = 64;

#if FUSED_REG_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <Dtype dtype, class P>
struct Kernel {
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using Factor = decltype(broadcast<Scalar>(0));
  static constexpr bool kWide = std::is_same_v<Scalar, double>;
  using MultiplyAdd = std::conditional_t<kWide, TwoRoundings, OneRounding>;
  static constexpr unsigned kRead = P::kReads | (P::kSums ? bit(0) : 0);

  // Lanes that are summed at a time: as many as half of the registers hold. A step of an optimizer, which has many
  // streams and much to do with an element, takes all, and the sums stay in the first-level cache.
  static constexpr int kLine = std::max<int>(kCacheLine / sizeof(Storage), E::kCount);
  static constexpr int kSummed = kRegisters / (P::kSums == kL1L2 || P::kSumFactors != 0 ? 4 : 2) * kDoubles;
  static constexpr int kStrip = P::kSums == 0 ? kLine : P::kHasOptions ? kLanes : std::min(kSummed, kLanes);

  // How far ahead elements are fetched, into the first-level cache: in the order of memory, whatever that of the sums
  // is, so that the prefetchers of the hardware follow. Strips take lines from all over a block, so the next one is
  // fetched.
  static constexpr int64_t kAhead = P::kHasOptions ? 2048 / sizeof(Storage) : kBlock;

  Factor factors[P::kFactors + 1];
  Double sum_factors[P::kSumFactors + 1];
  Double scale;  // of the elements in the sums
  BlockSums sums[kPassSums][kBlocks];
  unsigned options;
  int exponent;
  int64_t ahead;

  // Float64 sums are those of w / 2^exponent.
  Kernel(const StepNumbers& numbers, int exponent, int64_t ahead)
      : options(options_of(numbers)), exponent(exponent), ahead(std::max(ahead, kAhead)) {
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

  // What is read where an optional stream is not there.
  static FUSED_REG_INLINE Factor absent(int s) { return s == kImportance ? Factor{} + 1 : Factor{}; }

  // The factors of the parts may be so many apart.
  template <bool usual>
  FUSED_REG_INLINE void elements(Storage* const* streams, int64_t i, const Factor* factors, int apart = 0) const {
    const unsigned known = usual ? options & P::kUsual : options;
    Factor x[E::kParts][kStreams];
    for (int part = 0; part < E::kParts; ++part) {
      for (int s = 0; s < kStreams; ++s) {
        if (P::kReads & bit(s)) {
          x[part][s] = is_there<usual>(streams, s) ? E::read(streams[s] + i, part) : absent(s);
        } else if (P::kOptional & bit(s)) {
          x[part][s] = Factor{};
        }
      }
      if constexpr (P::kHasOptions) {
        P::element(x[part], factors + part * apart, known);
      } else {
        P::element(x[part], factors + part * apart);
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

  // The same of relative terms. No square is exact then.
  template <int apart>
  FUSED_REG_INLINE void add_relative(Double* sums, Storage* const* streams, int64_t i) const {
    auto d = E::widened(streams[0] + i), importance = d;
    if (streams[kToward] != nullptr) {
      const auto toward = E::widened(streams[kToward] + i);
      for (int v = 0; v < E::kCount / kDoubles; ++v) {
        d.of[v] = d.of[v] - toward.of[v];
      }
    }
    const bool is_weighted = streams[kImportance] != nullptr;
    if (is_weighted) {
      importance = E::widened(streams[kImportance] + i);
    }
    for (int v = 0; v < E::kCount / kDoubles; ++v) {
      Double x[kPassSums] = {};
      P::template add<TwoRoundings>(x, d.of[v], sum_factors,
                                    [&](Double y) __attribute__((always_inline)) { return kWide ? y * scale : y; });
      for (int k = 0; k < kPassSums; ++k) {
        if (P::kSums & bit(k)) {
          sums[k * apart + v] = sums[k * apart + v] + (is_weighted ? x[k] * importance.of[v] : x[k]);
        }
      }
    }
  }

  // Rows, and the sums of their lanes, E::kParts vectors at a time in the order of E; added to those of rows before, or
  // the first. `usual`: no option is rare.
  template <bool usual, bool is_first>
  FUSED_REG_INLINE void rows_of(Double* sums, Storage* const* streams, int64_t begin, int rows) const {
    constexpr int kFetched = std::min(kLine, kStrip), kVectors = kStrip / kDoubles;
    constexpr int kRow = P::kSums == 0 ? kLine : kLanes;  // without sums a line is a row
    Storage* at[kStreams] = {};
    for (int s = 0; s < kStreams; ++s) {
      if ((kRead | P::kWrites) & bit(s)) {
        at[s] = streams[s];
      }
    }
    int64_t next_ahead = begin + ahead;
    for (int strip = 0; strip < kRow; strip += kStrip) {
      Double strip_sums[kPassSums * kVectors];
      const auto each_sum = [&](const auto& body) __attribute__((always_inline)) {
        for (int k = 0; k < kPassSums; ++k) {
          for (int v = 0; v < kVectors; ++v) {
            if (P::kSums & bit(k)) {
              body(strip_sums[k * kVectors + v], sums[(k * kLanes + strip) / kDoubles + v]);
            }
          }
        }
      };
      each_sum([](Double& own, Double& before) { own = is_first ? Double{} : before; });
      for (int row = 0; row < rows * (kLanes / kRow); ++row) {
        int64_t i = begin + row * kRow + strip;
        Double* next = strip_sums;
        for (int line = 0; line < kStrip; line += kFetched) {
          for (int s = 0; s < kStreams; ++s) {
            if ((kRead | P::kWrites) & bit(s) && is_there<usual>(at, s)) {
              __builtin_prefetch(at[s] + next_ahead);
            }
          }
          next_ahead += kFetched;
#pragma GCC unroll 4
          for (int v = 0; v < kFetched; v += E::kCount) {
            if constexpr (P::kIsRelative && P::kSums != 0) {
              add_relative<kVectors>(next, at, i);
            } else {
              add<kVectors>(next, at[0] + i);
            }
            if constexpr (P::kWrites != 0) {
              elements<usual>(at, i, factors);
            }
            next += E::kCount / kDoubles;
            i += E::kCount;
          }
        }
      }
      each_sum([](Double& own, Double& before) { before = own; });
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
    if constexpr (E::kParts == 1) {
      for (int v = 0; v < kLeft / kDoubles; ++v) {
        store(folded + v * kDoubles, sums[v]);
      }
      return;
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

  template <bool is_first>
  FUSED_REG_INLINE void take_rows(Double* lanes, Storage* const* streams, int64_t begin, int rows) const {
    constexpr bool kCanBeUsual = P::kUsual != 0 && FUSED_REG_VECTOR_BYTES > 16;
    kCanBeUsual && (options & ~P::kUsual) == 0 ? rows_of<kCanBeUsual, is_first>(lanes, streams, begin, rows)
                                               : rows_of<false, is_first>(lanes, streams, begin, rows);
  }

  FUSED_REG_INLINE void fold_into(int b, Double* lanes) {
    for (int k = 0; k < kPassSums; ++k) {
      if (P::kSums & bit(k)) {
        fold(lanes + k * kLanes / kDoubles, sums[k][b].lanes);
      }
    }
  }

  FUSED_REG_INLINE void block(int b, Storage* const* streams, int64_t begin) {
    if constexpr (FUSED_REG_VECTOR_BYTES == 16) {  // compiled once, which takes less time
      part_of_block(b, streams, begin, kRows, nullptr);
    } else {
      Double lanes[kPassSums * kLanes / kDoubles];
      take_rows<true>(lanes, streams, begin, kRows);
      fold_into(b, lanes);
    }
  }

  // Some rows of a block, and a last row at `tail`, unless that is null.
  __attribute__((noinline)) void part_of_block(int b, Storage* const* streams, int64_t begin, int rows,
                                               Storage* const* tail) {
    Double lanes[kPassSums * kLanes / kDoubles];
    take_rows<true>(lanes, streams, begin, rows);
    if (tail != nullptr) {
      take_rows<false>(lanes, tail, 0, 1);
    }
    fold_into(b, lanes);
  }

  // A row of so many elements, and then of what changes no sum.
  struct Padded {
    static constexpr int kUsed = streams_in(kRead | P::kWrites);
    Storage elements[kUsed][kLanes];
    Storage* streams[kStreams];

    FUSED_REG_INLINE Padded(const Kernel& kernel, Storage* const* from, int64_t i, int64_t count) : streams{} {
      for (int s = 0; s < kUsed; ++s) {
        if (kernel.template is_there<false>(from, s)) {
          streams[s] = elements[s];
          if (kRead & bit(s)) {
            std::memset(elements[s], P::kPadding, sizeof elements[s]);
            std::memcpy(elements[s], from[s] + i, count * sizeof(Storage));
          }
        }
      }
    }

    FUSED_REG_INLINE void copy_to(Storage* const* to, int64_t i, int64_t count) const {
      for (int s = 0; s < kUsed; ++s) {
        if (P::kWrites & bit(s) && streams[s] != nullptr) {
          std::memcpy(to[s] + i, elements[s], count * sizeof(Storage));
        }
      }
    }
  };

  // The sum of a chunk of one block, of its lanes.
  static FUSED_REG_INLINE double total_of(Double* lanes) {
    typedef double Pair __attribute__((vector_size(16)));
    double folded[kFoldedLanes];
    fold(lanes, folded);
    const auto pair = [&](int lane) { return load<Pair>(folded + lane); };
    const Pair sums = (pair(0) + pair(4)) + (pair(2) + pair(6));
    return sums[0] + sums[1];
  }

  struct Sums {
    double of[kPassSums];

    // Number by number: a copy would wait for the numbers to reach the cache.
    FUSED_REG_INLINE void write_to(ChunkSums* found, int exponent) const {
      for (int k = 0; k < kSums; ++k) {
        found->of[k].sum = k < kPassSums ? of[k] : 0;
        found->of[k].exponent = k < kPassSums ? exponent : 0;
      }
    }
  };

  // The chunk at these streams. Short rows, of which there are many, stay in registers.
  FUSED_REG_INLINE Sums run(Storage* const* streams, int64_t size) {
    constexpr bool kCanBeShort = !P::kHasOptions && FUSED_REG_VECTOR_BYTES > 16;
    if (!kCanBeShort || size > kBlock || size % kLanes != 0) {
      return run_blocks(streams, size);
    }
    Double lanes[kPassSums * kLanes / kDoubles];
    take_rows<true>(lanes, streams, 0, static_cast<int>(size / kLanes));
    Sums found;
    for (int k = 0; k < kPassSums; ++k) {
      found.of[k] = P::kSums & bit(k) ? total_of(lanes + k * kLanes / kDoubles) : 0;
    }
    return found;
  }

  __attribute__((noinline)) Sums run_blocks(Storage* const* streams, int64_t size) {
    int64_t i = 0;
    int b = 0;
    for (; i + kBlock <= size; i += kBlock) {
      block(b++, streams, i);
    }
    const int rows = static_cast<int>(size - i) / kLanes, rest = static_cast<int>(size - i) % kLanes;
    if (rest != 0) {
      Padded tail(*this, streams, size - rest, rest);
      part_of_block(b++, streams, i, rows, tail.streams);
      tail.copy_to(streams, size - rest, rest);
    } else if (rows != 0) {
      part_of_block(b++, streams, i, rows, nullptr);
    }
    Sums found;
    for (int k = 0; k < kPassSums; ++k) {
      found.of[k] = P::kSums & bit(k) ? total(sums[k], b) : 0;
    }
    return found;
  }

  // CHUNKS SIDE BY SIDE: a vector has an element of each of E::kCount chunks, and a lane of the sums is some vectors.
  static constexpr int kAcross = E::kCount / kDoubles;

  // Where the vectors of E have chunk i, if they are of so many numbers.
  template <unsigned vector>
  static constexpr unsigned place(unsigned i) {
    constexpr unsigned kParts = E::kParts;
    return (i / kParts / vector * kParts + i % kParts) * vector + i / kParts % vector;
  }

  struct Lane {
    Double of[kPassSums * kAcross];

    FUSED_REG_INLINE void operator+=(const Lane& other) {
      for (int k = 0; k < kPassSums; ++k) {
        for (int v = k * kAcross; v < (k + 1) * kAcross; ++v) {
          of[v] = P::kSums & bit(k) ? of[v] + other.of[v] : Double{};
        }
      }
    }
  };

  // A part of the tree of halves, over lanes that are so many apart: from at most 2 * `half` to `end` of them. The
  // lanes that there are then.
  static FUSED_REG_INLINE int halve(Lane* lanes, int apart, int count, int half, int end) {
    for (; half >= end; half /= 2) {
      for (int i = 0; i + half < count; ++i) {
        lanes[i * apart] += lanes[(i + half) * apart];
      }
      count = std::min(count, half);
    }
    return count;
  }

  // How many elements of a chunk ahead are fetched. Sums go from lane to lane, each with all its rows.
  static constexpr int64_t kFetchedRows = 16;
  static constexpr int fetched_lanes(int count) { return std::max(2 * kFetchedRows * kLanes / count, int64_t{2}); }

  static FUSED_REG_INLINE void fetch(const Storage* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + line);
    }
  }

  // The elements of a chunk are so many apart; so many bytes of the chunks beside it are fetched, too.
  void sums_across(const Storage* from, int64_t apart, int64_t length, int64_t fetched, Lane* found) const {
    Lane blocks[kBlocks][kFoldedLanes];
    int b = 0, left = 0;
    for (int64_t begin = 0; begin < length; begin += kBlock) {
      Lane lanes[kLanes];
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - begin));
      for (int l = 0; l < std::min(count, kLanes); ++l) {
        Lane lane{};
        for (int i = l; i < count; i += kLanes) {
          const Storage* const at = from + (begin + i) * apart;
          fetch(at + fetched_lanes(count) * apart, fetched);
          add<kAcross>(lane.of, at);
        }
        lanes[l] = lane;
      }
      left = halve(lanes, 1, std::min(count, kLanes), kLanes / 2, kFoldedLanes);
      std::copy_n(lanes, left, blocks[b]);
      std::fill(blocks[b] + left, blocks[b] + (length > kBlock ? kFoldedLanes : left), Lane{});
      ++b;
    }
    for (int lane = 0; lane < (b > 1 ? kFoldedLanes : 0); ++lane) {
      halve(blocks[0] + lane, kFoldedLanes, b, kBlocks / 2, 1);
    }
    halve(blocks[0], 1, b > 1 ? kFoldedLanes : left, kFoldedLanes / 2, 1);
    *found = blocks[0][0];
  }

  // What is written of them; the factors of each are in vectors.
  void write_across(Storage* const* from, const int64_t* apart, int64_t length, int64_t fetched,
                    const Factor* own) const {
    Storage* at[kStreams];
    std::copy_n(from, kStreams, at);
    for (int64_t i = 0; i < length; ++i) {
      for (int s = 0; s < kStreams; ++s) {
        if ((kRead | P::kWrites) & bit(s) && is_there<false>(at, s)) {
          fetch(at[s] + kFetchedRows * apart[s], fetched);
        }
      }
      elements<false>(at, 0, own, P::kFactors + 1);
      for (int s = 0; s < kStreams; ++s) {
        at[s] += (kRead | P::kWrites) & bit(s) && is_there<false>(at, s) ? apart[s] : 0;
      }
    }
  }

  void run_across(const ChunkTask& task, Storage* const* streams, ChunkSums* found) {
    const int64_t chunks = task.size / task.chunk_size;
    StepNumbers numbers = task.numbers;
    for (int64_t first = 0; first < chunks; first += E::kCount) {
      const int count = static_cast<int>(std::min<int64_t>(E::kCount, chunks - first));
      const int64_t fetched = first == 0 && task.ahead == 0 ? chunks * sizeof(Storage) : 0;
      Storage* at[kStreams];
      std::transform(streams, streams + kStreams, at, [&](Storage* s) { return s == nullptr ? s : s + first; });
      if constexpr (P::kWrites == 0) {
        Lane sums;
        sums_across(at[0], task.apart[0], task.chunk_size, fetched, &sums);
        double lanes[kPassSums * E::kCount];
        std::memcpy(lanes, &sums, sizeof lanes);
        for (int i = 0; i < count; ++i) {
          ChunkSums& own = found[first + i] = {};
          for (int k = 0; k < kPassSums; ++k) {
            own.of[k] = {lanes[k * E::kCount + place<kDoubles>(i)], exponent};
          }
        }
      } else {
        constexpr int kScalars = sizeof(Factor) / sizeof(Scalar);
        Factor own[E::kParts][P::kFactors + 1];
        for (int i = 0; i < count; ++i) {
          Scalar scalars[P::kFactors + 1];
          numbers.norm = task.norms == nullptr ? numbers.norm : task.norms[first + i];
          P::factors(numbers, scalars);
          for (int f = 0; f < P::kFactors; ++f) {
            own[place<kScalars>(i) / kScalars][f][place<kScalars>(i) % kScalars] = scalars[f];
          }
        }
        write_across(at, task.apart, task.chunk_size, fetched, own[0]);
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
  Kernel<dtype, P> kernel(task.numbers, 0, task.ahead);
  StepNumbers numbers = task.numbers;
  Storage* streams[kStreams];
  for (int s = 0; s < kStreams; ++s) {
    streams[s] = static_cast<Storage*>(task.streams[s]);
  }
  const double* norms = P::kFactors == 0 ? nullptr : task.norms;
  if (task.apart[0] != 0) {  // of no relative terms
    if constexpr (!P::kHasOptions && !P::kIsRelative && (P::kSums == 0 || P::kWrites == 0)) {
      kernel.run_across(task, streams, sums);
    }
    if constexpr (kIsRescued && !P::kIsRelative && P::kWrites == 0) {
      for (const int exponent : {-kRescueExponent, kRescueExponent}) {
        const auto is_lost = [&](const ChunkSums& found) {
          const auto* of = found.of;
          return of[0].exponent == 0 && rescue_exponent(of[0].sum, of[1].sum, P::kSums & kL2) == exponent;
        };
        ChunkSums* const end = sums + task.size / task.chunk_size;
        if (std::any_of(sums, end, is_lost)) {
          ChunkSums again[kMaxVisit];
          Kernel<dtype, P>(numbers, exponent, 0).run_across(task, streams, again);
          std::transform(sums, end, again, sums, [&](const ChunkSums& found, const ChunkSums& other) {
            return is_lost(found) ? other : found;
          });
        }
      }
    }
    return;
  }
  for (int64_t left = task.size; left > 0; left -= task.chunk_size) {
    if (norms != nullptr) {
      numbers.norm = *norms++;
      kernel.set_factors(numbers);
    }
    const int64_t size = std::min(left, task.chunk_size);
    const auto found = kernel.run(streams, size);
    if (sums != nullptr) {
      const int exponent = kIsRescued ? rescue_exponent(found.of[0], found.of[1], P::kSums & kL2) : 0;
      found.write_to(sums, 0);
      if constexpr (kIsRescued) {
        if (exponent != 0) {
          Kernel<dtype, typename P::Sums>(numbers, exponent, 0).run(streams, size).write_to(sums, exponent);
        }
      }
      ++sums;
    }
    for (int s = 0; s < kStreams; ++s) {
      if ((kernel.kRead | P::kWrites) & bit(s)) {
        streams[s] += streams[s] == nullptr ? 0 : size;
      }
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

// The sum of each further term that a chunk has.
template <Dtype dtype, int relative>
void sum_further(const ChunkTask& task, ChunkSums* sums) {
  FurtherTerms::each([&](auto term) {
    using T = decltype(term);
    if (task.numbers.terms & T::kBit) {
      ChunkSums found[kMaxVisit];
      run_kernel<dtype, typename TermSum<T>::template Pass<relative>>(task, found);
      for (int64_t c = 0; c * task.chunk_size < task.size; ++c) {
        const ScaledSum& sum = found[c].of[1];
        sums[c].of[T::kSum] = {sum.sum, T::result_exponent(task.numbers, sum.exponent)};
      }
    }
  });
}

// A pass of relative terms, each maybe. With further ones, and in a step, first the sums, and then what is written.
template <Dtype dtype, template <int> class P, int known>
void run_relative(const ChunkTask& task, ChunkSums* sums) {
  if constexpr (P<known>::kHasOptions || (P<known>::kSums != 0 && known != kNone)) {
    if constexpr (!P<known>::kHasOptions) {
      if (!(task.numbers.terms & kFurther)) {
        return run_kernel<dtype, P<kL1L2 | kRelative>>(task, sums);
      }
    }
    if (sums != nullptr) {
      run_kernel<dtype, PenaltyPass<kL1L2 | kRelative>>(task, sums);
      sum_further<dtype, kRelative>(task, sums);
    }
    if constexpr (P<known>::kHasOptions) {
      run_kernel<dtype, P<kAllTerms | kRelative>>(task, nullptr);
    } else if constexpr (P<known>::kWrites != 0) {
      run_kernel<dtype, typename P<known>::template Alone<kAnyTerms | kFurther | kRelative>>(task, nullptr);
    }
  } else {
    run_kernel<dtype, P<(known & (kAnyTerms | kFurther)) | kRelative>>(task, sums);
  }
}

// A pass; with further terms in parts, for which the chunks are still in the cache.
template <Dtype dtype, template <int> class P, int known>
void run_terms(const ChunkTask& task, ChunkSums* sums) {
  const bool is_relative = task.streams[kToward] != nullptr || task.streams[kImportance] != nullptr;
  if constexpr (P<known>::kHasOptions) {
    if (task.numbers.terms == kNone) {
      return run_kernel<dtype, P<kNone>>(task, sums);
    }
  }
  if constexpr (P<kRelative>::kIsRelative) {
    if (is_relative) {
      return run_relative<dtype, P, known>(task, sums);
    }
  }
  if constexpr (P<known>::kHasOptions) {
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
      sum_further<dtype, kNone>(task, sums);
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
