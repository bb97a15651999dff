// THE PLAN: a list of tensor sizes -> one flat sequence of chunks of at most kChunkSize elements (summation.h).
//
//   sizes:   [ 40000          | 0 | 100 | 16384 ]
//   chunks:  [ 0 | 1 | 2 part |   |  3  |   4   ]        a chunk never crosses two tensors
//
// Chunks depend on the sizes only, never on the number of threads or blocks, so neither do sums taken
// chunk by chunk. Pure host C++.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "summation.h"

namespace fused_reg {

struct Chunk {
  int64_t tensor;
  int64_t begin;  // first element, within the tensor
  int64_t size;
};

class ChunkPlan {
 public:
  ChunkPlan() : ChunkPlan(std::vector<int64_t>{}) {}

  explicit ChunkPlan(const std::vector<int64_t>& sizes)
      : first_element_(sizes.size() + 1), first_chunk_(sizes.size() + 1) {
    for (size_t t = 0; t < sizes.size(); ++t) {
      first_element_[t + 1] = first_element_[t] + sizes[t];
      first_chunk_[t + 1] = first_chunk_[t] + (sizes[t] + kChunkSize - 1) / kChunkSize;
    }
  }

  int64_t tensors() const { return static_cast<int64_t>(first_chunk_.size()) - 1; }
  int64_t elements() const { return first_element_.back(); }
  int64_t chunks() const { return first_chunk_.back(); }

  // The chunks of tensor t are first_chunk(t) <= c < first_chunk(t + 1).
  int64_t first_chunk(int64_t t) const { return first_chunk_[t]; }

  Chunk chunk(int64_t c) const {
    const int64_t t = owner(first_chunk_, c);
    const int64_t begin = (c - first_chunk_[t]) * kChunkSize;
    return {t, begin, std::min<int64_t>(kChunkSize, first_element_[t + 1] - first_element_[t] - begin)};
  }

  // The first chunk whose middle is at or after an element of the flattened list. It turns equal shares of the
  // elements into disjoint ranges of chunks that are as equal as chunks can be.
  int64_t chunk_from(int64_t element) const {
    if (element >= elements()) {
      return chunks();
    }
    const int64_t t = owner(first_element_, element);
    const int64_t c = first_chunk_[t] + (element - first_element_[t]) / kChunkSize;
    const Chunk holder = chunk(c);
    return element - first_element_[t] - holder.begin <= holder.size / 2 ? c : c + 1;
  }

 private:
  // The last t with starts[t] <= x: where empty tensors share a start, the one that holds x.
  static int64_t owner(const std::vector<int64_t>& starts, int64_t x) {
    return std::upper_bound(starts.begin(), starts.end(), x) - starts.begin() - 1;
  }

  std::vector<int64_t> first_element_;  // [tensors + 1]
  std::vector<int64_t> first_chunk_;    // [tensors + 1]
};

}  // namespace fused_reg
