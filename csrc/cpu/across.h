// The kernel of a pass over chunks that lie side by side, as columns: a vector has an element of each of E::kCount
// chunks, or some elements of each of fewer. The sums are in the order of summation.h.
#pragma once

#include "in_turn.h"

namespace fused_reg::FUSED_REG_ISA {

template <class Kernel>
struct Across {
  using P = typename Kernel::Pass;
  using E = typename Kernel::E;
  using Storage = typename Kernel::Storage;
  using Scalar = typename Kernel::Scalar;
  using Factor = typename Kernel::Factor;
  using Written = typename Kernel::Written;
  using Sums = typename Kernel::Sums;  // of a lane, of each chunk of a vector
  static constexpr int kCount = E::kCount, kAcross = Kernel::kAcross;

  // Sums that norms come from. Of others, which are rare, there is one kernel.
  static constexpr bool kIsUsual = (P::kSums & kL2) != 0 && P::kSumFactors == 0;

  // Vectors of a row that are read together, if there are as many: those of some cache lines, or at least of one. Rows
  // that are a power of two apart compete for few places in a cache.
  static constexpr int kInLine = std::max<int>(kCacheLine / sizeof(Storage) / kCount, 1);
  static constexpr int kInRegisters = kIsUsual ? kRegisters / (Kernel::kSums * kAcross) : 1;
  static constexpr int kInLines = kIsUsual ? std::max(std::min(4 * kInLine, kInRegisters), kInLine) : 1;

  // How far ahead elements are fetched: of each stream of a block, so many rows; of short chunks what lies beside them,
  // as so many rows; what is written, so many bytes.
  static constexpr int64_t kAheadInStream = 4, kAheadBeside = 96, kAheadBytes = 1024;

  const Kernel& kernel;
  const int64_t chunks, chunk_size;

  // A row has so many elements of each chunk, a power of two: one, or as many as a vector has room for.
  int per_row;
  int64_t rows;    // the last one may be shorter
  int64_t direct;  // rows from the first on, that vectors of memory hold
  int period;      // the rows from an element of a lane to the next

  Across(const Kernel& kernel, const ChunkTask& task)
      : kernel(kernel), chunks(task.size / task.chunk_size), chunk_size(task.chunk_size), per_row(1) {
    while (2 * per_row * chunks <= kCount && per_row < kFoldedLanes) {
      per_row *= 2;
    }
    const int64_t row_size = per_row * chunks;
    rows = (chunk_size + per_row - 1) / per_row;
    direct = chunks >= kCount ? rows : std::max<int64_t>(task.size - kCount + row_size, 0) / row_size;
    period = kLanes / per_row;
  }

  FUSED_REG_INLINE void add(Sums& sums, const Storage* from) const {
    kernel.template add<kAcross>(sums.of, E::widened(from));
  }

  // Rows of the chunks of a vector; those that no vector of memory holds are in a copy.
  struct Column {
    const Storage* from;
    int64_t apart, direct;
    const Storage* rest;

    FUSED_REG_INLINE const Storage* at(int64_t row) const {
      return row < direct ? from + row * apart : rest + (row - direct) * apart;
    }
  };

  // The lanes of a block, of so many vectors. Its rows are read as streams, one for each element of a lane, which the
  // hardware follows; at the end of each what is needed next is fetched.
  template <int vectors>
  FUSED_REG_INLINE void take_lanes(const Column& column, int64_t begin, int64_t end, const Storage* next,
                                   Sums (*lanes)[kLanes]) const {
    const int64_t in_memory = std::min(end, direct);
    for (int64_t lane = 0; lane < period; ++lane) {
      const int64_t fetched = lane + kAheadInStream;
      const Storage* ahead =
          fetched < period ? column.from + (begin + fetched) * column.apart : next + (fetched - period) * column.apart;
      int64_t row = begin + lane;
      const Storage* from = column.from + row * column.apart;
      Sums sums[vectors];
      const auto each = [&](const auto& body) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
          body(v);
        }
      };
      each([&](int v) __attribute__((always_inline)) { sums[v].clear(); });
      for (; row < in_memory; row += period) {
        __builtin_prefetch(ahead);
        each([&](int v) __attribute__((always_inline)) { add(sums[v], from + v * kCount); });
        from += period * column.apart;
        ahead += period * column.apart;
      }
      for (; row < end; row += period) {
        each([&](int v) __attribute__((always_inline)) { add(sums[v], column.at(row) + v * kCount); });
      }
      each([&](int v) __attribute__((always_inline)) { lanes[v][lane] = sums[v]; });
    }
  }

  // The tree of halves over so many lanes, of which each has a row, those from `end` on none. What lies so far behind a
  // row is fetched.
  template <int lanes, int first = 0, int step = 1>
  FUSED_REG_INLINE void tree(const Storage* from, int64_t apart, int64_t end, int64_t behind, Sums& sums) const {
    if constexpr (step == lanes) {
      __builtin_prefetch(from + first * apart + behind);
      sums.clear();
      add(sums, from + first * apart);
    } else {
      tree<lanes, first, 2 * step>(from, apart, end, behind, sums);
      if (first + step < end) {
        Sums others;
        tree<lanes, first + step, 2 * step>(from, apart, end, behind, others);
        sums += others;
      }
    }
  }

  // A part of it, over lanes that are so many apart: from at most 2 * `half` to `end` of them.
  static FUSED_REG_INLINE void halve(Sums* lanes, int apart, int count, int half, int end) {
    for (; half >= end; half /= 2) {
      for (int i = 0; i < half && i + half < count; ++i) {
        lanes[i * apart] += lanes[(i + half) * apart];
      }
    }
  }

  // The numbers of the vectors of a lane, in the order of elements.
  template <size_t... i>
  static FUSED_REG_INLINE void store_in_order(const Double* lane, double* numbers, std::index_sequence<i...>) {
    for (int v = 0; v < kAcross; v += E::kParts, numbers += E::kParts * kDoubles) {
      if constexpr (E::kParts == 1) {
        store(numbers, lane[v]);
      } else {
        constexpr int kHalf = kDoubles / 2;
        store(numbers, shuffled<(i / 2 + i % 2 * kDoubles)...>(lane[v], lane[v + 1]));
        store(numbers + kDoubles, shuffled<(kHalf + i / 2 + i % 2 * kDoubles)...>(lane[v], lane[v + 1]));
      }
    }
  }

  // The end of the tree, of chunks from `first` on: what is in their rows is still side by side.
  FUSED_REG_INLINE void end(const Sums& lane, int64_t first, TaskSums* found) const {
    for (int k = 0; k < Kernel::kSums; ++k) {
      double numbers[kCount], *const sums = found->sum[Kernel::kFirstSum + k];
      store_in_order(lane.of + k * kAcross, numbers, std::make_index_sequence<kDoubles>());
      if (chunks >= kCount) {
        std::copy_n(numbers, kCount, sums + first);
        continue;
      }
      for (int64_t half = per_row / 2; half > 0; half /= 2) {
        for (int64_t i = 0; i < half * chunks; ++i) {
          numbers[i] += numbers[i + half * chunks];
        }
      }
      std::copy_n(numbers, chunks, sums);
    }
  }

  // The vectors of chunks; the last one begins before the one before it ends.
  int64_t vectors() const { return (chunks + kCount - 1) / kCount; }
  int64_t first_chunk(int64_t vector) const { return std::max<int64_t>(std::min(vector * kCount, chunks - kCount), 0); }

  // Of chunks that have an element in each lane at most. What lies so far behind is fetched.
  void sum_short(const Storage* from, int64_t apart, int64_t behind, TaskSums* found) const {
    constexpr int kTogether = kLanes / kFoldedLanes;
    for (int64_t v = 0; v < vectors(); ++v) {
      const Storage* const column = from + first_chunk(v);
      Sums folded[kFoldedLanes];
      if (rows <= 2 * kFoldedLanes) {
        tree<2 * kFoldedLanes>(column, apart, rows, behind, folded[0]);
      } else {
        for (int lane = 0; lane < kFoldedLanes; ++lane) {
          const int64_t count = (rows - lane + kFoldedLanes - 1) / kFoldedLanes;
          tree<kTogether>(column + lane * apart, kFoldedLanes * apart, count, behind, folded[lane]);
        }
        halve(folded, 1, kFoldedLanes, kFoldedLanes / 2, 1);
      }
      end(folded[0], first_chunk(v), found);
    }
  }

  // Of longer ones, or fewer than a vector has; the columns beside them, or what follows on them, is fetched.
  void sum_long(const Storage* from, int64_t apart, bool is_packed, TaskSums* found) const {
    const int64_t block = kBlock / per_row;
    const int folded = kFoldedLanes / per_row;
    Storage rest[2 * kCount]{};
    if (chunks < kCount) {
      std::copy(from + direct * apart, from + chunks * chunk_size, rest);
    }
    for (int64_t v = 0; v < vectors();) {
      const auto columns = [&](auto together) {
        constexpr int kTogether = together;
        Sums blocks[kTogether][kBlocks][kFoldedLanes], lanes[kTogether][kLanes];
        const Column column{from + first_chunk(v), apart, direct, rest};
        int b = 0;
        for (int64_t begin = 0; begin < rows; begin += block, ++b) {
          const bool is_last = begin + block >= rows && apart > chunks * per_row;
          const Storage* const own = column.from + begin * apart;
          const Storage* const next = is_last ? column.from + kTogether * kCount : own + block * apart;
          take_lanes<kTogether>(column, begin, std::min(begin + block, rows), is_packed ? own : next, lanes);
          for (int i = 0; i < kTogether; ++i) {
            halve(lanes[i], 1, period, period / 2, folded);
            std::copy_n(lanes[i], folded, blocks[i][b]);
          }
        }
        for (int i = 0; i < kTogether; ++i) {
          for (int lane = 0; lane < folded; ++lane) {
            halve(blocks[i][0] + lane, kFoldedLanes, b, kBlocks / 2, 1);
          }
          halve(blocks[i][0], 1, folded, folded / 2, 1);
          end(blocks[i][0][0], first_chunk(v + i), found);
        }
        v += kTogether;
      };
      if constexpr (kIsUsual) {
        if ((v + kInLines) * kCount <= chunks) {
          columns(std::integral_constant<int, kInLines>());
          continue;
        }
        if ((v + kInLine) * kCount <= chunks) {
          columns(std::integral_constant<int, kInLine>());
          continue;
        }
      }
      columns(std::integral_constant<int, 1>());
    }
  }

  void sum(const Storage* from, int64_t apart, bool is_packed, TaskSums* found) const {
    for (int k = 0; k < kPassSums; ++k) {
      if (!(P::kSums & bit(k))) {
        std::fill_n(found->sum[k], chunks, 0.0);
      }
    }
    if constexpr (kIsUsual) {
      if (chunks >= kCount && rows <= kLanes) {
        const int64_t beside = std::max<int64_t>(kAheadBeside / rows, 1) * kInLine * kCount;
        return sum_short(from, apart, is_packed ? 0 : beside, found);
      }
    }
    sum_long(from, per_row * apart, is_packed, found);
  }

  // Where the vectors of E have element i, if they are of so many numbers.
  template <unsigned vector>
  static constexpr unsigned place(unsigned i) {
    constexpr unsigned kParts = E::kParts;
    return (i / kParts / vector * kParts + i % kParts) * vector + i / kParts % vector;
  }

  // The factors of a vector of chunks, part by part.
  static constexpr int kFactors = P::kFactors + 1;
  struct Factors {
    Factor of[E::kParts * kFactors];
  };

  // Of the chunks from `first` on; of fewer than a vector has they repeat.
  FUSED_REG_INLINE void set_factors(const ChunkTask& task, int64_t first, Factors& factors) const {
    constexpr int kScalars = sizeof(Factor) / sizeof(Scalar);
    StepNumbers numbers = task.numbers;
    for (int i = 0; i < kCount; ++i) {
      Scalar own[kFactors];
      if (task.norms != nullptr) {
        numbers.norm = task.norms[first + (chunks < kCount ? i % chunks : i)];
      }
      P::factors(numbers, own);
      for (int f = 0; f < P::kFactors; ++f) {
        char* const part = reinterpret_cast<char*>(factors.of + place<kScalars>(i) / kScalars * kFactors + f);
        std::memcpy(part + place<kScalars>(i) % kScalars * sizeof(Scalar), own + f, sizeof(Scalar));
      }
    }
  }

  FUSED_REG_INLINE bool uses(Storage* const* streams, int s) const {
    return (Kernel::kRead | P::kWrites) & bit(s) && kernel.template is_there<false>(streams, s);
  }

  FUSED_REG_INLINE void fetch(Storage* const* streams, int64_t i, const int64_t* behind) const {
    for (int s = 0; s < kStreams; ++s) {
      if (uses(streams, s)) {
        __builtin_prefetch(streams[s] + i + behind[s]);
      }
    }
  }

  FUSED_REG_INLINE Written taken(Storage* const* streams, int64_t i, const Factors& factors) const {
    return kernel.template elements<false>(streams, i, factors.of, kFactors);
  }

  FUSED_REG_INLINE void put(const Written& written, Storage* const* streams, int64_t i) const {
    written.template write_to<false>(kernel, streams, i);
  }

  // Rows of a vector or more. The last one may begin before the one before it ends, so it is taken first.
  void write_wide(const ChunkTask& task, Storage* const* streams) const {
    const int64_t last = vectors() - 1, last_chunk = first_chunk(last);
    Factors factors[kMaxVisit / kCount];
    for (int64_t v = 0; v <= last; ++v) {
      set_factors(task, first_chunk(v), factors[v]);
    }
    Storage* at[kStreams];
    std::copy_n(streams, kStreams, at);
    int64_t behind[kStreams];
    std::transform(task.apart, task.apart + kStreams, behind, [&](int64_t apart) {
      return (1 + kAheadBytes / (chunks * static_cast<int64_t>(sizeof(Storage)))) * apart;
    });
    for (int64_t row = 0; row < rows; ++row) {
      const Written end = taken(at, last_chunk, factors[last]);
      for (int64_t v = 0; v < last; ++v) {
        fetch(at, v * kCount, behind);
        put(taken(at, v * kCount, factors[v]), at, v * kCount);
      }
      fetch(at, last_chunk, behind);
      put(end, at, last_chunk);
      for (int s = 0; s < kStreams; ++s) {
        at[s] += uses(at, s) ? task.apart[s] : 0;
      }
    }
  }

  // Rows of at most a vector, which follow on one another: each is taken before the one before it is written.
  void write_rows(Storage* const* streams, int64_t count, const Factors& factors) const {
    const int64_t apart = per_row * chunks, size = count * apart;
    int64_t behind[kStreams];
    std::fill_n(behind, kStreams, kAheadBytes / sizeof(Storage));
    if (count == 0) {
      return;
    }
    Written own = taken(streams, 0, factors);
    for (int64_t i = apart; i < size; i += apart) {
      fetch(streams, i, behind);
      const Written next = taken(streams, i, factors);
      put(own, streams, i - apart);
      own = next;
    }
    put(own, streams, size - apart);
  }

  void write_narrow(const ChunkTask& task, Storage* const* streams) const {
    const int64_t in_memory = direct * per_row * chunks;
    Factors factors;
    set_factors(task, 0, factors);
    typename Kernel::Padded rest(kernel, streams, in_memory, task.size - in_memory);
    write_rows(streams, direct, factors);
    write_rows(rest.streams, rows - direct, factors);
    rest.copy_to(streams, in_memory, task.size - in_memory);
  }

  void run(const ChunkTask& task, Storage* const* streams, TaskSums* found) const {
    if constexpr (P::kWrites == 0) {
      sum(streams[0], task.apart[0], task.is_packed, found);
    } else {
      const auto follows = [&](int64_t apart) { return apart == 0 || apart == chunks; };
      const bool is_narrow = chunks <= kCount && std::all_of(task.apart, task.apart + kStreams, follows);
      is_narrow ? write_narrow(task, streams) : write_wide(task, streams);
    }
  }
};

}  // namespace fused_reg::FUSED_REG_ISA
