// The kernel of a pass over chunks that follow on one another, their sums in the order of summation.h.
#pragma once

#include <algorithm>
#include <utility>

#include "../summation.h"
#include "simd.h"

namespace fused_reg::FUSED_REG_ISA {

template <class Kernel>
struct Across;

template <class Kernel>
struct Short;

constexpr int kCacheLine = 64;

#if FUSED_REG_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <Dtype dtype, class P>
struct Kernel {
  using Pass = P;
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using Factor = decltype(broadcast<Scalar>(0));
  static constexpr int kAcross = E::kCount / kDoubles;
  using Widened = decltype(E::widened(nullptr));
  static constexpr bool kWide = std::is_same_v<Scalar, double>;
  using MultiplyAdd = std::conditional_t<kWide, TwoRoundings, OneRounding>;
  static constexpr unsigned kRead = P::kReads | (P::kSums ? bit(0) : 0);

  // So many sums, from this one on.
  static constexpr int kSums = P::kSums == kL1L2 ? 2 : P::kSums != 0, kFirstSum = P::kSums == kL2;

  // Whether chunks of at most a block are taken together.
  static constexpr bool kCanBeShort = P::kSums != 0 && !P::kHasOptions && FUSED_REG_VECTOR_BYTES > 16;

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
  int64_t ahead;

  // Float64 sums are those of w / 2^exponent.
  Kernel(const StepNumbers& numbers, int exponent, int64_t ahead)
      : options(options_of(numbers)), ahead(std::max(ahead, kAhead)) {
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

  // Where chunks have norms of their own.
  FUSED_REG_INLINE void set_norm(const ChunkTask& task, int64_t chunk) {
    if (P::kFactors != 0 && task.norms != nullptr) {
      StepNumbers numbers = task.numbers;
      numbers.norm = task.norms[chunk];
      set_factors(numbers);
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

  // Elements as they are written, of every stream.
  struct Written {
    decltype(E::written(Factor{}, Factor{})) of[kStreams];

    Written() = default;
    Written(const Written& other) { *this = other; }
    FUSED_REG_INLINE Written& operator=(const Written& other) {
      for (int s = 0; s < kStreams; ++s) {
        if (P::kWrites & bit(s)) {
          of[s] = other.of[s];
        }
      }
      return *this;
    }

    template <bool usual>
    FUSED_REG_INLINE void write_to(const Kernel& kernel, Storage* const* streams, int64_t i) const {
      for (int s = 0; s < kStreams; ++s) {
        if (P::kWrites & bit(s) && kernel.template is_there<usual>(streams, s)) {
          store(streams[s] + i, of[s]);
        }
      }
    }
  };

  // The factors of the parts may be so many apart.
  template <bool usual>
  FUSED_REG_INLINE Written elements(Storage* const* streams, int64_t i, const Factor* factors, int apart = 0) const {
    const unsigned known = usual ? options & P::kUsual : options;
    Written out;
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
        out.of[s] = E::written(x[0][s], x[E::kParts - 1][s]);
        if constexpr (P::kPositiveZeros && sizeof(Storage) == sizeof(uint16_t)) {
          if (s == 0 && (!P::kHasOptions || known & kProximal)) {
            out.of[s] = with_positive_zero(out.of[s]);
          }
        }
      }
    }
    return out;
  }

  // The sums of the lanes that a vector of elements has.
  struct Sums {
    Double of[std::max(kSums, 1) * kAcross];

    FUSED_REG_INLINE void clear() {
#pragma GCC unroll 8
      for (Double& sum : of) {
        sum = Double{};
      }
    }

    FUSED_REG_INLINE void operator+=(const Sums& other) {
#pragma GCC unroll 8
      for (int v = 0; v < kSums * kAcross; ++v) {
        of[v] = of[v] + other.of[v];
      }
    }
  };

  // Adds elements of the parameter to the sums of their lanes, each of which is so many vectors behind the one before.
  template <int apart>
  FUSED_REG_INLINE void add(Double* sums, Widened w) const {
    if constexpr (P::kSums != 0) {
#pragma GCC unroll 8
      for (int v = 0; v < kAcross; ++v) {
        Double x[kPassSums] = {};
        for (int i = 0; i < kSums; ++i) {
          x[kFirstSum + i] = sums[i * apart + v];
        }
        P::template add<MultiplyAdd>(x, w.of[v], sum_factors,
                                     [&](Double y) __attribute__((always_inline)) { return kWide ? y * scale : y; });
        for (int i = 0; i < kSums; ++i) {
          sums[i * apart + v] = x[kFirstSum + i];
        }
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
    const auto scaled = [&](Double y) __attribute__((always_inline)) { return kWide ? y * scale : y; };
    for (int v = 0; v < kAcross; ++v) {
      Double x[kPassSums] = {};
      for (int i = 0; i < kSums; ++i) {
        x[kFirstSum + i] = sums[i * apart + v];
      }
      if (is_weighted) {
        const Double m = importance.of[v], w = d.of[v];
        P::add_weighted(x, kWide ? without_masked(w, m) : w, m, sum_factors, scaled);
      } else {
        P::template add<TwoRoundings>(x, d.of[v], sum_factors, scaled);
      }
      for (int i = 0; i < kSums; ++i) {
        sums[i * apart + v] = x[kFirstSum + i];
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
      Double strip_sums[std::max(kSums, 1) * kVectors];
      const auto each_sum = [&](const auto& body) __attribute__((always_inline)) {
        for (int i = 0; i < kSums; ++i) {
          for (int v = 0; v < kVectors; ++v) {
            body(strip_sums[i * kVectors + v], sums[(i * kLanes + strip) / kDoubles + v]);
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
              add<kVectors>(next, E::widened(at[0] + i));
            }
            if constexpr (P::kWrites != 0) {
              elements<usual>(at, i, factors).template write_to<usual>(*this, at, i);
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
    for (int i = 0; i < kSums; ++i) {
      fold(lanes + i * kLanes / kDoubles, sums[kFirstSum + i][b].lanes);
    }
  }

  FUSED_REG_INLINE void block(int b, Storage* const* streams, int64_t begin) {
    if constexpr (FUSED_REG_VECTOR_BYTES == 16) {  // compiled once, which takes less time
      part_of_block(b, streams, begin, kRows, nullptr);
    } else {
      Double lanes[std::max(kSums, 1) * kLanes / kDoubles];
      take_rows<true>(lanes, streams, begin, kRows);
      fold_into(b, lanes);
    }
  }

  // Some rows of a block, and a last row at `tail`, unless that is null.
  __attribute__((noinline)) void part_of_block(int b, Storage* const* streams, int64_t begin, int rows,
                                               Storage* const* tail) {
    Double lanes[std::max(kSums, 1) * kLanes / kDoubles];
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

  // A chunk that is written, without sums. The last vector may overlap the one before, so its elements are taken first.
  void write_run(Storage* const* streams, int64_t begin, int64_t size) const {
    const int64_t end = begin + size, last = end - E::kCount;
    const Written of_last = elements<false>(streams, last, factors);
    take_rows<true>(nullptr, streams, begin, static_cast<int>(size / kLanes));
    for (int64_t i = begin + size / kLanes * kLanes; i < last; i += E::kCount) {
      elements<false>(streams, i, factors).template write_to<false>(*this, streams, i);
    }
    of_last.template write_to<false>(*this, streams, last);
  }

  // How many blocks a chunk has; it leaves their sums.
  __attribute__((noinline)) int run_blocks(Storage* const* streams, int64_t begin, int64_t size) {
    int64_t i = begin;
    const int64_t end = begin + size;
    int b = 0;
    for (; i + kBlock <= end; i += kBlock) {
      block(b++, streams, i);
    }
    const int rows = static_cast<int>(end - i) / kLanes, rest = static_cast<int>(end - i) % kLanes;
    if (rest != 0) {
      Padded tail(*this, streams, end - rest, rest);
      part_of_block(b++, streams, i, rows, tail.streams);
      tail.copy_to(streams, end - rest, rest);
    } else if (rows != 0) {
      part_of_block(b++, streams, i, rows, nullptr);
    }
    return b;
  }

  // The chunks of a task, which follow on one another.
  void run_in_turn(const ChunkTask& task, Storage* const* streams, TaskSums* found) {
    for (int64_t c = 0; c * task.chunk_size < task.size; ++c) {
      const int64_t begin = c * task.chunk_size, size = std::min(task.chunk_size, task.size - begin);
      set_norm(task, c);
      if (P::kSums == 0 && !P::kHasOptions && size >= E::kCount) {
        write_run(streams, begin, size);
        continue;
      }
      const int blocks = run_blocks(streams, begin, size);
      for (int k = 0; k < kPassSums && found != nullptr; ++k) {
        found->sum[k][c] = P::kSums & bit(k) ? total(sums[k], blocks) : 0;
      }
    }
  }

  void run(const ChunkTask& task, TaskSums* found) {
    Storage* streams[kStreams];
    std::transform(task.streams, task.streams + kStreams, streams, [](void* s) { return static_cast<Storage*>(s); });
    const bool is_short = kCanBeShort && std::min(task.chunk_size, task.size) <= kBlock;
    if constexpr (!P::kHasOptions && !P::kIsRelative && (P::kSums == 0 || P::kWrites == 0)) {
      if (task.apart[0] != 0) {
        Across<Kernel>(*this, task).run(task, streams, found);
      }
    }
    if constexpr (kCanBeShort) {
      if (task.apart[0] == 0 && is_short) {
        Short<Kernel>(*this).run(task, streams, found);
      }
    }
    if (task.apart[0] == 0 && !is_short) {
      run_in_turn(task, streams, found);
    }
    if (found != nullptr) {
      found->is_scaled = found->has_further = false;
    }
  }
};

}  // namespace fused_reg::FUSED_REG_ISA
