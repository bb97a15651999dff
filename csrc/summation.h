// THE ORDER of every sum, the same on every device, so that the bits are the same too. It depends on sizes only.
//
//   chunk     kBlocks blocks, a block kRows rows of kLanes elements:
//
//                        lane 0 ............ lane 63
//               row 0  [   0     1    2  ...    63  ]     a lane adds its kRows elements in plain float64, from
//               row 1  [  64    65   66  ...   127  ]     row 0 on; then trees of halves (x[i] += x[i + half])
//                ...                                      take the lanes from 64 to 8, the blocks of the chunk
//               row 15 [ 960   961  962  ...  1023  ]     from 16 to 1, and the lanes from 8 to 1
//
//   run       consecutive chunks, their penalties in one compensated sum: the longer the list, the longer the run
//   list      run r in the compensated sum of column r % kColumns, then a tree of halves over the columns
//
// With l2_norm, chunks start where groups of elements do (chunks.h), and the penalty of a chunk that is a whole group
// has the norm in it. The norm of a group of several chunks comes from their sums of squares, chunk c of the group in
// column c % kTensorColumns; such groups follow on the runs, as if they were further ones.
//
// At most 1 + 15 + 3 + 4 + 3 roundings reach an element within a chunk (its square, its lane, three trees), the
// strength and the sum of two terms make 2 more, and the compensated sums 1 each: below 31 * 2^-53 = 3.5e-15 relative,
// whatever the size and content. What is missing of a row, a block or a chunk counts as zeros, which change no bit.
#pragma once

#include <cstdint>

#include "penalty.h"

namespace fused_reg {

constexpr int kLanes = 64;
constexpr int kRows = 16;
constexpr int kBlocks = 16;
constexpr int kBlock = kLanes * kRows;
constexpr int kChunkSize = kBlocks * kBlock;
constexpr int kFoldedLanes = 8;
constexpr int64_t kMaxRuns = 16384;
constexpr int kColumns = 128;
constexpr int kTensorColumns = 32;  // where the chunks of one tensor are summed, term by term

// A sum of one term over a block.
struct BlockSums {
  double lanes[kFoldedLanes];
};

// The sums of a tensor's terms.
struct TermSums {
  double of[kSums];
};

FUSED_REG_INLINE TermSums unscaled(const ChunkSums& sums) {
  TermSums unscaled;
  SummedTerms::each([&](auto term) {
    using T = decltype(term);
    unscaled.of[T::kSum] = std::ldexp(sums.of[T::kSum].sum, T::kDegree * sums.of[T::kSum].exponent);
  });
  return unscaled;
}

// A sum whose error does not grow with its length: the error of every addition is kept and added at the end (Knuth's
// TwoSum; Ogita, Rump and Oishi 2005, "Accurate sum and dot product"). V is a double, or a vector of them.
template <class V>
struct CompensatedSums {
  V sum;
  V error;

  FUSED_REG_INLINE void add(V x) {
    const V total = sum + x;
    const V x_part = total - sum;
    error = error + ((sum - (total - x_part)) + (x - x_part));
    sum = total;
  }

  FUSED_REG_INLINE void add(const CompensatedSums& other) {
    add(other.sum);
    error = error + other.error;
  }
};
using CompensatedSum = CompensatedSums<double>;

// An infinite or NaN sum has a NaN error, which says nothing: the sum alone is the result. NaN has one form.
template <class V>
FUSED_REG_INLINE V result(const CompensatedSums<V>& s) {
  const V nan = V{} + static_cast<double>(NAN);
  return s.sum - s.sum == 0 ? s.sum + s.error : (s.sum == s.sum ? s.sum : nan);
}

// The sum of a chunk of `count` blocks, which are used up.
inline double total(BlockSums* blocks, int count) {
  for (int half = kBlocks / 2; half > 0; half /= 2) {
    for (int b = 0; b + half < count; ++b) {
      for (int lane = 0; lane < kFoldedLanes; ++lane) {
        blocks[b].lanes[lane] += blocks[b + half].lanes[lane];
      }
    }
    count = count < half ? count : half;
  }
  double* const lanes = blocks[0].lanes;
  for (int half = kFoldedLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) {
      lanes[lane] += lanes[lane + half];
    }
  }
  return lanes[0];
}

// Chunks in a run: the smallest power of two that leaves at most kMaxRuns runs.
inline int64_t run_length(int64_t chunks) {
  int64_t size = 1;
  while (chunks > size * kMaxRuns) {
    size *= 2;
  }
  return size;
}

// The sum of `count` numbers, in columns. value(i) is number i, or a vector V from it on, with 0 behind the last one.
template <int columns, class V = double, class Value>
double column_sum(int64_t count, const Value& value) {
  constexpr int kWidth = sizeof(V) / sizeof(double), kVectors = columns / kWidth;
  CompensatedSums<V> sums[kVectors]{};
  for (int64_t i = 0; i < count; i += kWidth) {
    sums[i / kWidth % kVectors].add(value(i));
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int i = 0; i < half && (i + half) * kWidth < count; ++i) {
      sums[i].add(sums[i + half]);
    }
  }
  double of[2][kWidth];  // the sum of each column that is left, and its error
  std::memcpy(of, sums, sizeof of);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      CompensatedSum column{of[0][i], of[1][i]};
      column.add(CompensatedSum{of[0][i + half], of[1][i + half]});
      of[0][i] = column.sum;
      of[1][i] = column.error;
    }
  }
  return result(CompensatedSum{of[0][0], of[1][0]});
}

// The sum of squares of a group, from those of its chunks.
inline ScaledSum squares_of(const ChunkSums* chunks, int64_t count) {
  const auto squares = [&](int64_t c) -> const ScaledSum& { return chunks[c].of[L2::kSum]; };
  if (count == 1) {
    return squares(0);
  }
  int exponent = squares(0).exponent;
  for (int64_t c = 1; c < count; ++c) {
    exponent = squares(c).exponent > exponent ? squares(c).exponent : exponent;
  }
  const auto square = [&](int64_t c) { return std::ldexp(squares(c).sum, 2 * (squares(c).exponent - exponent)); };
  return {column_sum<kTensorColumns>(count, square), exponent};
}

}  // namespace fused_reg
