// How a team of warps reads a chunk, in the order of summation.h; what it does with the elements is a Job's.
//
// The warps of a team (team.cuh) take blocks of the chunk: every thread loads 16 bytes of a row, the rows of a block
// one after the other, so that it holds some lanes of the block. Of memory that is not aligned to 16 bytes, and of the
// last part of a chunk, a thread takes two elements of a row: at once where they are aligned, in the same order. A warp
// can also take short chunks that follow on one another, each a block, side by side: again by 16 bytes.
#pragma once

#include "cursor.cuh"
#include "team.cuh"

namespace fused_reg::cuda {

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
    const int thread = team.lane(), of_warp = thread / (kWarp / kAbreast);
    const int whole = is_aligned(sizeof(Vector)) ? size_ / kBlock : 0;
    for (int b = team.warp() * kAbreast; b < whole; b += team.warps() * kAbreast) {
      block<Vector, Part::kWhole>(blocks, b + of_warp, (b + of_warp) * kBlock, size_, thread, b + of_warp < whole);
    }
    const bool has_pairs = is_aligned(sizeof(Pair));
    for (int b = whole + team.warp(); b * kBlock < size_; b += team.warps()) {
      block<Pair, Part::kAny>(blocks, b, b * kBlock, size_, thread, has_pairs);
    }
  }

  // The sums of so many chunks of this size that follow on one another (Cursor::strip), by a warp: each is a block.
  __device__ __forceinline__ void run_strip(Blocks* blocks, int chunks) const {
    static_assert(Job::kWrites == 0 && !Job::kSumsFirst);
    const int thread = threadIdx.x % kWarp, of_warp = thread / (kWarp / kAbreast);
    for (int b = 0; b < chunks; b += kAbreast) {
      const int at = (b + of_warp) * size_;
      block<Vector, Part::kOfVectors>(blocks, b + of_warp, at, at + size_, thread, b + of_warp < chunks);
    }
  }

 private:
  using Vector = typename Job::Vector;
  using Pair =
      std::conditional_t<sizeof(Storage) == 2, unsigned, std::conditional_t<sizeof(Storage) == 4, uint2, uint4>>;
  static constexpr int kVector = sizeof(Vector) / sizeof(Storage);  // elements that a thread loads at a time
  static constexpr int kAbreast = kWarp / (kLanes / kVector);       // blocks that a warp takes side by side
  static constexpr int kUsed = streams_in(Job::kReads | Job::kWrites);
  static constexpr int kRead = streams_in(Job::kReads), kWritten = streams_in(Job::kWrites);

  // What there is of a block: all of it; a part that ends where a vector does; or a part that ends anywhere.
  enum class Part { kWhole, kOfVectors, kAny };

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
  __device__ __forceinline__ Storage element(int i, int end) const {
    return i < end ? load(0, streams_[0] + i) : job_.padding();
  }

  // Elements of stream s from i on, as one vector if `at_once`, else those before the end.
  template <class V>
  __device__ __forceinline__ V read(int s, int i, int end, bool at_once) const {
    if (!reads(s)) {
      return s == kImportance ? filled<V>(E::narrow(1)) : V{};
    }
    if (at_once) {
      return load(s, reinterpret_cast<const V*>(streams_[s] + i));
    }
    Storage x[sizeof(V) / sizeof(Storage)];
#pragma unroll
    for (int k = 0; k < static_cast<int>(sizeof(V) / sizeof(Storage)); ++k) {
      x[k] = i + k < end ? load(s, streams_[s] + i + k) : job_.padding();
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

  // A part of a block, the elements from `at` to `end`, by vectors V, some rows of which are on their way at a time.
  // One that may end anywhere has its vectors read at once if `can`; others there are if `can`.
  template <class V, Part part>
  __device__ __forceinline__ void block(Blocks* blocks, int b, int at, int end, int thread, bool can) const {
    constexpr int kCount = sizeof(V) / sizeof(Storage), kSharers = kLanes / kCount;  // threads that share a row
    constexpr int kAhead = Job::template kAhead<V>;
    static_assert(kRows % kAhead == 0);
    typename Job::Sum first_sums[kCount] = {}, second_sums[kCount] = {};
    constexpr bool kIsWhole = part == Part::kWhole, kIsAny = part == Part::kAny;
    const int sharer = thread % kSharers, begin = at + sharer * kCount;
    const auto at_once = [&](int i) { return !kIsAny || (can && i + kCount <= end); };
    const int left = (end - at + kLanes - 1) / kLanes, most = left < kRows ? left : kRows;
    const int rows = kIsAny ? most : !can ? 0 : kIsWhole ? kRows : most;
    const auto again = [&](int r, int lane) { return element(begin + r * kLanes + lane, end); };
    if constexpr (Job::kSumsFirst) {  // what is read here is in the cache for the rest
      if (rows > 0 && job_.has_terms()) {
        V w[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int i = begin + r * kLanes;
          w[r] = read<V>(0, i, end, at_once(i));
        }
        job_.add_rows(w, first_sums, second_sums, again);
      }
      store(blocks, b, sharer, first_sums, second_sums, kIsAny || can);
      if (!writes()) {
        return;
      }
    }
    const auto read_rows = [&](V(&to)[kRead][kAhead], int first) {
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const int i = begin + (first + r) * kLanes;
#pragma unroll
        for (int s = 0; s < kRead; ++s) {
          const bool is_within = part != Part::kOfVectors || i < end;
          to[s][r] = is_within ? read<V>(s, i, end, at_once(i)) : filled<V>(job_.padding());
        }
      }
    };
    constexpr bool kEarly = !kIsAny && Job::kReadsEarly;
    [[maybe_unused]] V next[kRead][kAhead];
    if (kEarly && rows > 0) {
      read_rows(next, 0);
    }
#pragma unroll 1
    for (int first = 0; first < rows; first += kAhead) {
      V rows_of[kRead][kAhead];
      if constexpr (kEarly) {
        memcpy(rows_of, next, sizeof next);
        if (first + kAhead < rows) {
          read_rows(next, first + kAhead);
        }
      } else {
        read_rows(rows_of, first);
      }
      if constexpr (Job::kSums != 0 && !Job::kSumsFirst) {
        if constexpr (Job::kIsRelative) {
          job_.add_relative_rows(rows_of, first_sums, second_sums);
        } else {
          job_.add_rows(rows_of[0], first_sums, second_sums, again);
        }
      }
      if (writes()) {
        write(rows_of, [&](int r) { return begin + (first + r) * kLanes; }, at_once);
      }
    }
    if constexpr (Job::kSums != 0 && !Job::kSumsFirst) {
      store(blocks, b, sharer, first_sums, second_sums, kIsAny || can);
    }
  }

  // What is written of rows, where element(r) is the first one of row r.
  template <class V, int rows, class Element, class AtOnce>
  __device__ __forceinline__ void write(const V (&of)[kRead][rows], const Element& element,
                                        const AtOnce& at_once) const {
    const auto take = [&](int r, auto& x) {
#pragma unroll
      for (int s = 0; s < kRead; ++s) {
        memcpy(x[s], &of[s][r], sizeof(V));
      }
    };
    const auto put = [&](int r, const auto& x) {
      const int i = element(r);
#pragma unroll
      for (int s = 0; s < kUsed; ++s) {
        if (writes(s)) {
          write<V>(s, i, x[s], at_once(i));
        }
      }
    };
    using Elements = Storage[kUsed][sizeof(V) / sizeof(Storage)];
    if constexpr (Job::kSums != 0) {
#pragma unroll
      for (int r = 0; r < rows; ++r) {
        Elements x;
        take(r, x);
        job_.with_pass([&](auto pass) { job_.template write<decltype(pass)>(x, adds_); });
        put(r, x);
      }
    } else {  // terms are chosen once for all rows; beside sums that would take registers that there are not
      job_.with_pass([&](auto pass) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          Elements x;
          take(r, x);
          job_.template write<decltype(pass)>(x, adds_);
          put(r, x);
        }
      });
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

}  // namespace fused_reg::cuda
