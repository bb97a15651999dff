// THE PLAN: a list of tensor sizes -> one flat sequence of chunks of at most kChunkSize elements (summation.h).
//
//   sizes:   [ 40000          | 0 | 100 | 16384 ]
//   chunks:  [ 0 | 1 | 2 part |   |  3  |   4   ]        a chunk never crosses two tensors
//
// A tensor may be cut into groups of equal size first, as its rows; then a chunk never crosses two groups either.
//
// A thread goes from VISIT to visit: a chunk; a whole group of several chunks that fits its cache, so that what depends
// on the group's norm finds the group there; or some short groups, as each alone would cost more than its elements.
// Where the elements of neighbouring groups lie between one another, as those of columns, a visit is a STRIP: the same
// chunk of each of these, side by side, or packed, in parts that are visits as above. Groups of less than a row are
// packed side by side.
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
  int64_t group;  // of the list
};

// Consecutive chunks of a tensor, of one size, but the last, which may be shorter. Of a strip those of groups in turn.
struct Visit {
  Chunk first;
  int64_t number;  // of the first chunk
  int64_t chunks;
  int64_t size;  // elements in all
};

// A group of at most so many elements is one visit: with its gradient it fits a second-level cache.
constexpr int64_t kVisitedGroup = 4 * kChunkSize;

// Short groups are visited together, up to so many elements: with their gradients they fit a second-level cache.
constexpr int64_t kVisitedTogether = kChunkSize;
constexpr int kMaxVisit = 256;  // chunks

// A strip has about so many elements, or the least width that set_strips() is given.
constexpr int64_t kStripElements = 4 * kChunkSize;

class ChunkPlan {
 public:
  ChunkPlan() : ChunkPlan(std::vector<int64_t>{}) {}

  // Tensors of these sizes, not cut.
  explicit ChunkPlan(const std::vector<int64_t>& sizes) : ChunkPlan(sizes, std::vector<int64_t>(sizes.size(), 1)) {
    visited_group_ = 0;
  }

  // Tensors of these sizes, each cut into a number of groups. One that is cut into none must be empty.
  ChunkPlan(const std::vector<int64_t>& sizes, const std::vector<int64_t>& groups)
      : first_element_(sizes.size() + 1),
        first_chunk_(sizes.size() + 1),
        first_group_(sizes.size() + 1),
        group_size_(sizes.size()) {
    for (size_t t = 0; t < sizes.size(); ++t) {
      group_size_[t] = groups[t] == 0 ? 0 : sizes[t] / groups[t];
      first_element_[t + 1] = first_element_[t] + sizes[t];
      first_chunk_[t + 1] = first_chunk_[t] + groups[t] * chunks_per_group(t);
      first_group_[t + 1] = first_group_[t] + groups[t];
    }
  }

  int64_t tensors() const { return static_cast<int64_t>(first_chunk_.size()) - 1; }
  int64_t elements() const { return first_element_.back(); }
  int64_t chunks() const { return first_chunk_.back(); }
  int64_t groups() const { return first_group_.back(); }

  // The chunks of tensor t are first_chunk(t) <= c < first_chunk(t + 1), each group's chunks_per_group(t) in turn; its
  // groups are first_group(t) <= g < first_group(t + 1).
  int64_t first_chunk(int64_t t) const { return first_chunk_[t]; }
  int64_t first_group(int64_t t) const { return first_group_[t]; }
  int64_t group_size(int64_t t) const { return group_size_[t]; }
  int64_t chunks_per_group(int64_t t) const { return (group_size_[t] + kChunkSize - 1) / kChunkSize; }

  Chunk chunk(int64_t c) const {
    int64_t t = owner(first_chunk_, c);
    return chunk(c, &t);
  }

  // The same, from the tensor of an earlier chunk on, which becomes this one's.
  Chunk chunk(int64_t c, int64_t* of_earlier) const {
    int64_t& t = *of_earlier;
    while (c >= first_chunk_[t + 1]) {
      ++t;
    }
    const int64_t group = (c - first_chunk_[t]) / chunks_per_group(t);
    const int64_t begin = (c - first_chunk_[t]) % chunks_per_group(t) * kChunkSize;  // within the group
    return {t, group * group_size_[t] + begin, std::min<int64_t>(kChunkSize, group_size_[t] - begin),
            first_group_[t] + group};
  }

  // The groups of tensor t are visited in strips, whose width is a multiple of this, at most so many.
  void set_strips(int64_t t, int64_t line, int64_t most) {
    const int64_t length = std::clamp<int64_t>(group_size_[t], 1, kChunkSize);
    strips_.resize(tensors());
    strips_[t] = std::max<int64_t>(std::min(kStripElements / length, most) / line, 1) * line;
  }
  void set_strips_as(const ChunkPlan& other) { strips_ = other.strips_; }
  bool has_strips(int64_t t) const { return !strips_.empty() && strips_[t] != 0; }

  // Whether the groups of tensor t are visited whole.
  bool visits_groups(int64_t t) const {
    return group_size_[t] <= (has_strips(t) ? std::min<int64_t>(visited_group_, kChunkSize) : visited_group_);
  }

  // The visit that begins with chunk c and ends before another; from the tensor of an earlier chunk on. Chunks that are
  // visited in strips are counted in this order.
  Visit visit(int64_t c, int64_t end, int64_t* of_earlier) const {
    const Chunk first = chunk(c, of_earlier);
    const int64_t t = first.tensor;
    if (has_strips(t)) {
      return strip(c, end, t);
    }
    if (!visits_groups(t)) {
      return {first, c, 1, first.size};
    }
    if (chunks_per_group(t) > 1) {
      return {first, c, chunks_per_group(t), group_size_[t]};
    }
    return short_groups(first, c, std::min(first_chunk_[t + 1], end) - c);
  }

  // The part of a strip that begins with its chunk i.
  Visit part(const Visit& strip, int64_t i) const {
    int64_t t = strip.first.tensor;
    const int64_t c = strip.number + i * chunks_per_group(t);
    return short_groups(chunk(c, &t), c, visits_groups(t) ? strip.chunks - i : 1);
  }

  // The first chunk, or group that is visited whole, whose middle is at or after an element of the flattened list. It
  // turns equal shares of the elements into disjoint ranges of chunks that are as equal as these can be.
  int64_t chunk_from(int64_t element) const {
    if (element >= elements()) {
      return chunks();
    }
    const int64_t t = owner(first_element_, element);
    const int64_t within = element - first_element_[t];
    const int64_t of_group = chunks_per_group(t), in_group = within % group_size_[t];
    const int64_t first = first_chunk_[t] + within / group_size_[t] * of_group;
    if (visits_groups(t)) {
      return in_group <= group_size_[t] / 2 ? first : first + of_group;
    }
    const int64_t c = first + in_group / kChunkSize;
    const Chunk holder = chunk(c);
    return within - holder.begin <= holder.size / 2 ? c : c + 1;
  }

 private:
  // As many groups of one chunk as are visited together, at most `count`.
  static Visit short_groups(const Chunk& first, int64_t c, int64_t count) {
    const int64_t chunks = std::min(count, std::clamp<int64_t>(kVisitedTogether / first.size, 1, kMaxVisit));
    return {first, c, chunks, chunks * first.size};
  }

  Visit strip(int64_t c, int64_t end, int64_t t) const {
    const int64_t count = chunks_per_group(t), place = c - first_chunk_[t];
    const int64_t group = place / (strips_[t] * count) * strips_[t];  // the first of the strip
    const int64_t width = std::min(strips_[t], first_group_[t + 1] - first_group_[t] - group);
    const int64_t within = place - group * count, before = within % width;
    const int64_t number = first_chunk_[t] + (group + before) * count + within / width;
    const Chunk first = chunk(number, &t);
    const int64_t chunks = std::min(width - before, end - c);
    return {first, number, chunks, chunks * first.size};
  }

  // The last t with starts[t] <= x: where empty tensors share a start, the one that holds x.
  static int64_t owner(const std::vector<int64_t>& starts, int64_t x) {
    return std::upper_bound(starts.begin(), starts.end(), x) - starts.begin() - 1;
  }

  std::vector<int64_t> first_element_;  // [tensors + 1]
  std::vector<int64_t> first_chunk_;    // [tensors + 1]
  std::vector<int64_t> first_group_;    // [tensors + 1]
  std::vector<int64_t> group_size_;     // [tensors], elements
  std::vector<int64_t> strips_;         // [tensors], groups; 0: none; or empty
  int64_t visited_group_ = kVisitedGroup;
};

}  // namespace fused_reg
