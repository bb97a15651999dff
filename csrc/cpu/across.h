// The kernel of a pass over chunks that lie side by side, as columns: a vector has an element of each of E::kCount
// chunks, and a lane of the sums is kAcross vectors. The sums are in the order of summation.h.
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
  using Lane = typename Kernel::Lane;
  static constexpr int kAcross = Kernel::kAcross;

  const Kernel& kernel;

  explicit Across(const Kernel& kernel) : kernel(kernel) {}

  // Where the vectors of E have chunk i, if they are of so many numbers.
  template <unsigned vector>
  static constexpr unsigned place(unsigned i) {
    constexpr unsigned kParts = E::kParts;
    return (i / kParts / vector * kParts + i % kParts) * vector + i / kParts % vector;
  }

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

  // So many elements of a chunk ahead are fetched.
  static constexpr int64_t kFetchedRows = 16;

  static FUSED_REG_INLINE void fetch(const Storage* from, int64_t bytes) {
    for (int64_t line = 0; line < bytes; line += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(from) + line);
    }
  }

  // The lanes of a block, which begins at `from`, halved to at most `end`: how many there are.
  FUSED_REG_INLINE int take_block(const Storage* from, int64_t apart, int count, int64_t fetched, int end,
                                  Lane* lanes) const {
    const int used = std::min(count, kLanes);
    std::fill_n(lanes, used, Lane{});
    for (int i = 0; i < count; ++i) {
      fetch(from + kFetchedRows * apart, fetched);
      kernel.template add<kAcross>(lanes[i % kLanes].of, E::widened(from));
      from += apart;
    }
    return halve(lanes, 1, used, kLanes / 2, end);
  }

  // The elements of a chunk are so many apart; so many bytes of the chunks beside it are fetched, too.
  FUSED_REG_INLINE Lane sums_of(const Storage* from, int64_t apart, int64_t length, int64_t fetched) const {
    Lane lanes[kLanes];
    if (length == 1) {
      Lane lane{};
      kernel.template add<kAcross>(lane.of, E::widened(from));
      return lane;
    }
    if (length <= kBlock) {
      take_block(from, apart, static_cast<int>(length), fetched, 1, lanes);
      return lanes[0];
    }
    Lane blocks[kBlocks][kFoldedLanes];
    int b = 0;
    for (int64_t begin = 0; begin < length; begin += kBlock) {
      const int count = static_cast<int>(std::min<int64_t>(kBlock, length - begin));
      const int left = take_block(from + begin * apart, apart, count, fetched, kFoldedLanes, lanes);
      std::copy_n(lanes, left, blocks[b]);
      std::fill(blocks[b] + left, blocks[b] + kFoldedLanes, Lane{});
      ++b;
    }
    for (int lane = 0; lane < kFoldedLanes; ++lane) {
      halve(blocks[0] + lane, kFoldedLanes, b, kBlocks / 2, 1);
    }
    halve(blocks[0], 1, kFoldedLanes, kFoldedLanes / 2, 1);
    return blocks[0][0];
  }

  // What is written of them; the factors of each are in vectors.
  void write(Storage* const* from, const int64_t* apart, int64_t length, int64_t fetched, const Factor* own) const {
    Storage* at[kStreams];
    std::copy_n(from, kStreams, at);
    for (int64_t i = 0; i < length; ++i) {
      for (int s = 0; s < kStreams; ++s) {
        if ((Kernel::kRead | P::kWrites) & bit(s) && kernel.template is_there<false>(at, s)) {
          fetch(at[s] + kFetchedRows * apart[s], fetched);
        }
      }
      kernel.template elements<false>(at, 0, own, P::kFactors + 1).template write_to<false>(kernel, at, 0);
      for (int s = 0; s < kStreams; ++s) {
        at[s] += (Kernel::kRead | P::kWrites) & bit(s) && kernel.template is_there<false>(at, s) ? apart[s] : 0;
      }
    }
  }

  void run(const ChunkTask& task, Storage* const* streams, TaskSums* found) const {
    const int64_t chunks = task.size / task.chunk_size;
    StepNumbers numbers = task.numbers;
    for (int64_t first = 0; first < chunks; first += E::kCount) {
      const int count = static_cast<int>(std::min<int64_t>(E::kCount, chunks - first));
      const int64_t fetched = first == 0 && task.ahead == 0 ? chunks * sizeof(Storage) : 0;
      Storage* at[kStreams];
      std::transform(streams, streams + kStreams, at, [&](Storage* s) { return s == nullptr ? s : s + first; });
      if constexpr (P::kWrites == 0) {
        const Lane sums = sums_of(at[0], task.apart[0], task.chunk_size, fetched);
        double lanes[kPassSums * E::kCount];
        std::memcpy(lanes, &sums, sizeof lanes);
        const auto copy = [&](int of) __attribute__((always_inline)) {
          for (int k = 0; k < kPassSums; ++k) {
            for (int i = 0; i < of; ++i) {
              found->sum[k][first + i] = lanes[k * E::kCount + place<kDoubles>(i)];
            }
          }
        };
        count == E::kCount ? copy(E::kCount) : copy(count);
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
        write(at, task.apart, task.chunk_size, fetched, own[0]);
      }
    }
  }
};

}  // namespace fused_reg::FUSED_REG_ISA
