// The kernel of a pass over chunks of at most a block that follow on one another: kDoubles of them share the end of the
// tree, and those of at most a row stay in registers. The sums are in the order of summation.h.
#pragma once

#include "in_turn.h"

namespace fused_reg::FUSED_REG_ISA {

template <class Kernel>
struct Short {
  using P = typename Kernel::Pass;
  using E = typename Kernel::E;
  using Storage = typename Kernel::Storage;
  using Widened = typename Kernel::Widened;
  using Sums = typename Kernel::Sums;
  static constexpr int kAcross = Kernel::kAcross;

  // Whether the end of a row may be read with what follows.
  static constexpr bool kIsMasked = P::kWrites == 0 && !P::kIsRelative && P::kPadding == 0;

  Kernel& kernel;

  explicit Short(Kernel& kernel) : kernel(kernel) {}

  // Of first and second halves, some in a vector: each two added, those of a, then those of b.
  template <int half, size_t... i>
  static FUSED_REG_INLINE Double halved(Double a, Double b, std::index_sequence<i...>) {
    return shuffled<(i / half * 2 * half + i % half)...>(a, b) +
           shuffled<(i / half * 2 * half + i % half + half)...>(a, b);
  }

  // The tree of a chunk of one block, whose other lanes are 0, to a vector; of two parts each is half of it.
  template <int lanes_used>
  static FUSED_REG_INLINE Double folded(Double* lanes) {
    for (int half = lanes_used / kDoubles / 2; half >= E::kParts; half /= 2) {
      for (int v = 0; v < half; ++v) {
        lanes[v] = lanes[v] + lanes[v + half];
      }
    }
    return E::kParts == 1 ? lanes[0] : halved<kDoubles / 2>(lanes[0], lanes[1], std::make_index_sequence<kDoubles>());
  }

  // Its end, for as many chunks as a vector has numbers.
  template <int left = kDoubles / 2>
  static FUSED_REG_INLINE Double totals(Double* folded) {
    if constexpr (left > 0) {
      constexpr int kHalf = std::max(left / E::kParts, 1);
      for (int i = 0; i < left; ++i) {
        folded[i] = halved<kHalf>(folded[2 * i], folded[2 * i + 1], std::make_index_sequence<kDoubles>());
      }
      return totals<left / 2>(folded);
    }
    return folded[0];
  }

  // Of a row that is read as whole vectors, the first elements; 0 for the others.
  template <int lanes_used>
  struct Mask {
    int count;
    Widened bits[lanes_used / E::kCount];

    FUSED_REG_INLINE explicit Mask(int of_row) : count(of_row) {
      for (Widened& of_vector : bits) {
        Storage ones[E::kCount];
        for (int i = 0; i < E::kCount; ++i) {
          ones[i] = i < of_row ? sizeof(Storage) == sizeof(uint16_t) ? 0x3c00 : 1 : 0;
        }
        of_vector = E::widened(ones);
        for (Double& v : of_vector.of) {
          v = (Double)(v != 0);
        }
        of_row -= E::kCount;
      }
    }

    FUSED_REG_INLINE Widened of(int vector, Widened w) const {
      for (int v = 0; v < kAcross; ++v) {
        w.of[v] = (Double)((Bits64)w.of[v] & (Bits64)bits[vector].of[v]);
      }
      return w;
    }
  };

  // Sums of a chunk, the end of whose trees is left.
  struct Ends {
    Double of[kPassSums];

    // Of so many lanes, for each sum.
    template <int lanes_used>
    static FUSED_REG_INLINE Ends folded_from(Double* lanes) {
      Ends ends{};
      for (int i = 0; i < Kernel::kSums; ++i) {
        ends.of[Kernel::kFirstSum + i] = folded<lanes_used>(lanes + i * lanes_used / kDoubles);
      }
      return ends;
    }
  };

  // Chunks of at most a block each, kDoubles of which share the end of the tree. take(chunk, begin, size): its Ends.
  template <class Take>
  FUSED_REG_INLINE void end_together(const ChunkTask& task, TaskSums* found, const Take& take) {
    const int64_t chunks = task.chunks();
    for (int64_t first = 0; first < chunks; first += kDoubles) {
      Double ends[kPassSums][kDoubles];
      const int count = static_cast<int>(std::min<int64_t>(kDoubles, chunks - first));
      for (int i = 0; i < count; ++i) {
        const int64_t begin = (first + i) * task.chunk_size;
        const Ends own = take(first + i, begin, std::min(task.chunk_size, task.size - begin));
        for (int k = 0; k < kPassSums; ++k) {
          ends[k][i] = own.of[k];
        }
      }
      for (auto& end : ends) {
        std::fill(end + count, end + kDoubles, Double{});
      }
      for (int k = 0; k < kPassSums && found != nullptr; ++k) {
        store(found->sum[k] + first, totals(ends[k]));
      }
    }
  }

  // A row of so many lanes, of which the vectors from `first` on, so many apart, are added up in the order of the tree.
  template <int lanes_used, bool has_rest, int apart = 1, int first = 0>
  FUSED_REG_INLINE Sums row_of(const Storage* from, const Mask<lanes_used>& mask) const {
    if constexpr (apart * E::kCount == lanes_used) {
      Sums sums;
      sums.clear();
      const Widened w = E::widened(from + first * E::kCount);
      kernel.template add<kAcross>(sums.of, has_rest ? mask.of(first, w) : w);
      return sums;
    } else {
      Sums sums = row_of<lanes_used, has_rest, 2 * apart, first>(from, mask);
      sums += row_of<lanes_used, has_rest, 2 * apart, first + apart>(from, mask);
      return sums;
    }
  }

  // Chunks of at most a row of so many lanes, which stay in registers.
  template <bool has_rest, int lanes_used>
  void run_rows_of(const ChunkTask& task, const Storage* from, TaskSums* found) {
    const Mask<lanes_used> mask(static_cast<int>(std::min(task.chunk_size, task.size)));
    end_together(task, found, [&](int64_t, int64_t begin, int64_t size) __attribute__((always_inline)) {
      Sums row;
      if (size == mask.count && task.size - begin >= lanes_used) {
        row = row_of<lanes_used, has_rest>(from + begin, mask);
      } else {
        Storage padded[lanes_used]{};
        std::memcpy(padded, from + begin, size * sizeof(Storage));
        row = row_of<lanes_used, false>(padded, mask);
      }
      return Ends::template folded_from<E::kCount>(row.of);
    });
  }

  template <int lanes_used>
  void run_rows(const ChunkTask& task, const Storage* from, TaskSums* found) {
    const bool is_whole = task.chunk_size == lanes_used && task.size % lanes_used == 0;
    is_whole ? run_rows_of<false, lanes_used>(task, from, found) : run_rows_of<true, lanes_used>(task, from, found);
  }

  // The last row, of `count` elements, of a chunk of several: as the mask says, unless the task ends with a shorter
  // one. Of the task's elements there are `left` from there on.
  FUSED_REG_INLINE void take_rest(Double* lanes, Storage* const* streams, int64_t begin, int count, int64_t left,
                                  const Mask<kLanes>& mask) const {
    const int read = (count + E::kCount - 1) / E::kCount * E::kCount;
    if constexpr (kIsMasked) {
      if (count == mask.count && left >= read) {
        for (int i = 0; i < read; i += E::kCount) {
          kernel.template add<kLanes / kDoubles>(lanes + i / kDoubles,
                                                 mask.of(i / E::kCount, E::widened(streams[0] + begin + i)));
        }
        return;
      }
    }
    typename Kernel::Padded tail(kernel, streams, begin, count);
    kernel.template take_rows<false>(lanes, tail.streams, 0, 1);
    tail.copy_to(streams, begin, count);
  }

  // Chunks of at most a block each, whose lanes stay in registers.
  template <bool has_rest>
  void run_blocks_of(const ChunkTask& task, Storage* const* streams, TaskSums* found) {
    const Mask<kLanes> mask(static_cast<int>(std::min(task.chunk_size, task.size) % kLanes));
    end_together(task, found, [&](int64_t chunk, int64_t begin, int64_t size) __attribute__((always_inline)) {
      const int rest = has_rest ? static_cast<int>(size % kLanes) : 0;
      Double lanes[Kernel::kSums * kLanes / kDoubles];
      kernel.set_norm(task, chunk);
      kernel.template take_rows<true>(lanes, streams, begin, static_cast<int>(size / kLanes));
      if (rest != 0) {
        take_rest(lanes, streams, begin + size - rest, rest, task.size - begin - size + rest, mask);
      }
      return Ends::template folded_from<kLanes>(lanes);
    });
  }

  void run(const ChunkTask& task, Storage* const* streams, TaskSums* found) {
    const int64_t size = std::min(task.chunk_size, task.size);
    if constexpr (kIsMasked) {
      constexpr int kHalf = kLanes / 2, kQuarter = std::max(kLanes / 4, E::kCount);
      if (size <= kLanes) {
        return size <= kQuarter ? run_rows<kQuarter>(task, streams[0], found)
               : size <= kHalf  ? run_rows<kHalf>(task, streams[0], found)
                                : run_rows<kLanes>(task, streams[0], found);
      }
    }
    task.size % kLanes == 0 && size % kLanes == 0 ? run_blocks_of<false>(task, streams, found)
                                                  : run_blocks_of<true>(task, streams, found);
  }
};

}  // namespace fused_reg::FUSED_REG_ISA
