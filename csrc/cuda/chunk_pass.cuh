// How a team of warps reads a chunk, in the order of summation.h; what it does with the elements is a Job's.
//
// The warps of a team take blocks of the chunk: every thread loads 16 bytes of a row, the rows of a block one after the
// other, so that it holds some lanes of the block; shuffles fold 64 lanes to 8; shared memory collects the blocks of
// the chunk. Of memory that is not aligned to 16 bytes, and of the last part of a chunk, a thread takes two elements of
// a row: at once where they are aligned, in the same order.
#pragma once

#include "../passes/pass.h"
#include "cursor.cuh"

namespace fused_reg::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = kWarp * kWarps;
constexpr int kCtasPerSm = 4;  // resident, at least: bounds the registers
// Where the rows of a block are read for its sums by integers (exact_sums.cuh), and kept for what is written.
constexpr int kSummingCtasPerSm = kFewDoubles ? 3 : kCtasPerSm;
constexpr unsigned kAll = 0xffffffff;

// The folded lanes of every block of a chunk.
struct Blocks {
  double sums[kBlocks][kPassSums][kFoldedLanes];
};

// The warps that take a chunk together: all of a CTA.
struct WholeCta {
  __device__ int warps() const { return kWarps; }
  __device__ int warp() const { return threadIdx.x / kWarp; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
};

// The same, or every warp for itself: where chunks are short, as rows are.
class Team {
 public:
  __device__ explicit Team(int warps) : warps_(warps) {}
  __device__ int warps() const { return warps_; }
  __device__ int warp() const { return threadIdx.x / kWarp % warps_; }
  __device__ int lane() const { return threadIdx.x % kWarp; }
  __device__ bool is_first_thread() const { return warp() == 0 && threadIdx.x % kWarp == 0; }

  // Among those of the grid.
  __device__ uint32_t index() const { return blockIdx.x * (kWarps / warps_) + threadIdx.x / kWarp / warps_; }
  __device__ uint32_t count() const { return gridDim.x * (kWarps / warps_); }

  __device__ void sync() const {
    if (warps_ == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

 private:
  int warps_;
};

// The halving tree over lanes that neighbouring threads hold, `count` each: thread i has the lanes from i * count on.
// Two threads whose indices differ in a bit add their lanes, and each keeps half of the sums; once a thread has one
// sum, both keep the same. The bits go from `mask` down to `last`.
template <int count, int mask, int last>
struct Fold {
  static constexpr int kKept = count > 1 ? count / 2 : 1;
  using Next = Fold<kKept, mask / 2, last>;

  static __device__ __forceinline__ double sum(const double (&x)[count], int thread) {
    double kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const bool upper = count > 1 && (thread & mask) != 0;
      const double mine = upper ? x[i + count - kKept] : x[i];
      const double others = upper ? x[i] : x[i + count - kKept];
      kept[i] = mine + __shfl_xor_sync(kAll, others, mask);
    }
    if constexpr (mask == last) {
      static_assert(kKept == 1);
      return kept[0];
    } else {
      return Next::sum(kept, thread);
    }
  }

  // Which of its lanes a thread ends with, and whether it is the first of those that have it.
  static __device__ __forceinline__ int lane(int thread) {
    const int skipped = count > 1 && (thread & mask) != 0 ? kKept : 0;
    if constexpr (mask == last) {
      return skipped;
    } else {
      return skipped + Next::lane(thread);
    }
  }
  static __device__ __forceinline__ bool is_first(int thread) {
    const bool first = count > 1 || (thread & mask) == 0;
    if constexpr (mask == last) {
      return first;
    } else {
      return first && Next::is_first(thread);
    }
  }
};

// How a chunk is read and written for a Job (jobs.cuh).
template <class Job>
class ChunkPass {
  using E = typename Job::E;
  using Storage = typename E::Storage;

 public:
  template <class AnyChunk>
  __device__ ChunkPass(const AnyChunk& chunk, const Job& job)
      : job_(job), size_(chunk.size), adds_(Job::kAdds && chunk.adds) {
#pragma unroll
    for (int s = 0; s < kUsed; ++s) {
      streams_[s] = static_cast<Storage*>(chunk.streams[s]);
    }
  }

  template <class AnyTeam>
  __device__ __forceinline__ void run(Blocks* blocks, const AnyTeam& team) const {
    constexpr int kAbreast = kWarp / (kLanes / kVector);  // blocks that a warp takes side by side
    const int thread = team.lane(), of_warp = thread / (kWarp / kAbreast);
    const int whole = is_aligned(sizeof(Vector)) ? size_ / kBlock : 0;
    for (int b = team.warp() * kAbreast; b < whole; b += team.warps() * kAbreast) {
      block<Vector, true>(blocks, b + of_warp, thread, b + of_warp < whole);
    }
    const bool has_pairs = is_aligned(sizeof(Pair));
    for (int b = whole + team.warp(); b * kBlock < size_; b += team.warps()) {
      block<Pair, false>(blocks, b, thread, has_pairs);
    }
  }

 private:
  using Vector = typename Job::Vector;
  using Pair =
      std::conditional_t<sizeof(Storage) == 2, unsigned, std::conditional_t<sizeof(Storage) == 4, uint2, uint4>>;
  static constexpr int kVector = sizeof(Vector) / sizeof(Storage);  // elements that a thread loads at a time
  static constexpr int kUsed = streams_in(Job::kReads | Job::kWrites);
  static constexpr int kRead = streams_in(Job::kReads), kWritten = streams_in(Job::kWrites);

  __device__ bool is_aligned(size_t bytes) const {
    uintptr_t addresses = 0;
#pragma unroll
    for (int s = 0; s < kUsed; ++s) {
      addresses |= reinterpret_cast<uintptr_t>(streams_[s]);
    }
    return addresses % bytes == 0;
  }

  // Whether the chunk has the streams to be written: the parameter is one, or the last of them.
  __device__ bool writes() const {
    return (Job::kWrites & bit(0)) != 0 || (Job::kWrites != 0 && streams_[kWritten - 1] != nullptr);
  }

  // Of those that a chunk may lack.
  __device__ bool is_there(int s) const { return (Job::kOptional & bit(s)) == 0 || streams_[s] != nullptr; }

  __device__ bool writes(int s) const { return (Job::kWrites & bit(s)) != 0 && is_there(s) && job_.writes(s); }

  // A stream that is only added to is not read where there is nothing yet.
  __device__ bool reads(int s) const {
    const bool is_added_to = s != 0 && Job::kAdds && (Job::kWrites & bit(s)) != 0;
    return (Job::kReads & bit(s)) != 0 && (!is_added_to || adds_) && is_there(s);
  }

  template <class V>
  static __device__ __forceinline__ V filled(Storage x) {
    Storage all[sizeof(V) / sizeof(Storage)];
#pragma unroll
    for (Storage& each : all) {
      each = x;
    }
    return bits_as<V>(all);
  }

  template <class T>
  static __device__ __forceinline__ T load(int s, const T* p) {
    return Job::kWrites & bit(s) ? *p : __ldg(p);
  }

  // That of the parameter.
  __device__ __forceinline__ Storage element(int i) const {
    return i < size_ ? load(0, streams_[0] + i) : job_.padding();
  }

  // Elements of stream s from i on, as one vector if `at_once`, else as far as the chunk goes.
  template <class V>
  __device__ __forceinline__ V read(int s, int i, bool at_once) const {
    if (!reads(s)) {
      return s == kImportance ? filled<V>(E::narrow(1)) : V{};
    }
    if (at_once) {
      return load(s, reinterpret_cast<const V*>(streams_[s] + i));
    }
    Storage x[sizeof(V) / sizeof(Storage)];
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(V) / sizeof(Storage)); ++k) {
      x[k] = i + k < size_ ? load(s, streams_[s] + i + k) : job_.padding();
    }
    return bits_as<V>(x);
  }

  template <class V, int count>
  __device__ __forceinline__ void write(int s, int i, const Storage (&x)[count], bool at_once) const {
    if (at_once) {
      *reinterpret_cast<V*>(streams_[s] + i) = bits_as<V>(x);
      return;
    }
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (i + k < size_) {
        streams_[s][i + k] = x[k];
      }
    }
  }

  // A block by vectors V, some rows of which are on their way at a time: a whole one, if `can`; or one that may end
  // anywhere, whose vectors are read at once if `can`.
  template <class V, bool is_whole>
  __device__ __forceinline__ void block(Blocks* blocks, int b, int thread, bool can) const {
    constexpr int kCount = sizeof(V) / sizeof(Storage), kSharers = kLanes / kCount;  // threads that share a row
    constexpr int kAhead = Job::template kAhead<V>;
    static_assert(kRows % kAhead == 0);
    typename Job::Sum first_sums[kCount] = {}, second_sums[kCount] = {};
    const int sharer = thread % kSharers, begin = b * kBlock + sharer * kCount;
    const auto at_once = [&](int i) { return is_whole || (can && i + kCount <= size_); };
    const int left = (size_ - b * kBlock + kLanes - 1) / kLanes;
    const int rows = is_whole ? (can ? kRows : 0) : left < kRows ? left : kRows;
    const auto again = [&](int r, int lane) { return element(begin + r * kLanes + lane); };
    if constexpr (Job::kSumsFirst) {  // what is read here is in the cache for the rest
      if (rows > 0 && job_.has_terms()) {
        V w[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int i = begin + r * kLanes;
          w[r] = read<V>(0, i, at_once(i));
        }
        job_.add_rows(w, first_sums, second_sums, again);
      }
      store(blocks, b, sharer, first_sums, second_sums, !is_whole || can);
      if (!writes()) {
        return;
      }
    }
#pragma unroll 1
    for (int first = 0; first < rows; first += kAhead) {
      V rows_of[kRead][kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int i = begin + (first + r) * kLanes;
#pragma unroll
        for (int s = 0; s < kRead; ++s) {
          rows_of[s][r] = read<V>(s, i, at_once(i));
        }
      }
      if constexpr (Job::kSums != 0 && !Job::kSumsFirst) {
        if constexpr (Job::kIsRelative) {
          job_.add_relative_rows(rows_of, first_sums, second_sums);
        } else {
          job_.add_rows(rows_of[0], first_sums, second_sums, again);
        }
      }
      if (!writes()) {
        continue;
      }
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int i = begin + (first + r) * kLanes;
        Storage x[kUsed][kCount];
#pragma unroll
        for (int s = 0; s < kRead; ++s) {
          memcpy(x[s], &rows_of[s][r], sizeof(V));
        }
        job_.write(x, adds_);
#pragma unroll
        for (int s = 0; s < kUsed; ++s) {
          if (writes(s)) {
            write<V>(s, i, x[s], at_once(i));
          }
        }
      }
    }
    if constexpr (Job::kSums != 0 && !Job::kSumsFirst) {
      store(blocks, b, sharer, first_sums, second_sums, !is_whole || can);
    }
  }

  // The folded lanes of a block.
  template <class Sum, int count>
  static __device__ __forceinline__ void store(Blocks* blocks, int b, int sharer, const Sum (&first_sums)[count],
                                               const Sum (&second_sums)[count], bool can) {
    using ToFolded = Fold<count, kLanes / count / 2, kLanes / count / 8>;
    double first[count], second[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      first[i] = first_sums[i];
      second[i] = second_sums[i];
    }
    const double first_sum = ToFolded::sum(first, sharer), second_sum = ToFolded::sum(second, sharer);
    if (can && ToFolded::is_first(sharer)) {
      const int lane = (sharer * count + ToFolded::lane(sharer)) % kFoldedLanes;
      blocks->sums[b][0][lane] = first_sum;
      blocks->sums[b][1][lane] = second_sum;
    }
  }

  const Job job_;
  Storage* streams_[kUsed];
  int size_;
  bool adds_;
};

// The sums of a pass over a chunk.
struct PassSums {
  double of[kPassSums];
};

// These, in every thread of a warp: the trees over its blocks and then over the folded lanes.
__device__ __forceinline__ PassSums total(const Blocks& blocks, int count, int thread) {
  const int lane = thread % kFoldedLanes, term = thread / kFoldedLanes % 2, odd = thread / kFoldedLanes / 2;
  const auto block = [&](int b) { return b < count ? blocks.sums[b][term][lane] : 0.0; };
  const auto pair = [&](int b) { return block(b) + block(b + 8); };
  double x = (pair(odd) + pair(odd + 4)) + (pair(odd + 2) + pair(odd + 6));
  x = x + __shfl_xor_sync(kAll, x, 16);
#pragma unroll
  for (int mask = kFoldedLanes / 2; mask > 0; mask /= 2) {
    x = x + __shfl_xor_sync(kAll, x, mask);
  }
  return {__shfl_sync(kAll, x, 0), __shfl_sync(kAll, x, kFoldedLanes)};
}

}  // namespace fused_reg::cuda
