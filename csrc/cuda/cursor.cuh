// Where the chunks of a table are.
#pragma once

#include "../passes/pass.h"
#include "element.cuh"

namespace fused_reg::cuda {

// A chunk of a tensor, with the part of each stream.
template <int streams_of_pass>
struct Chunk {
  void* streams[streams_of_pass];
  int size;
  Dtype dtype;
  bool adds;
  uint32_t group;  // in Call.norms
  bool is_group;   // the whole of it

  __device__ int blocks() const { return (size + kBlock - 1) / kBlock; }
};

__device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The last of `count` starts, in rising order from 0 on, that is at most x: where some are equal, the one that holds x.
template <class Start>
__device__ __forceinline__ uint32_t owner(uint32_t count, uint32_t x, const Start& start) {
  uint32_t begin = 0;
  for (uint32_t end = count; end - begin > 1;) {
    const uint32_t middle = begin + (end - begin) / 2;
    (start(middle) <= x ? begin : end) = middle;
  }
  return begin;
}

// A table whose rows have so many streams and numbers.
template <class Table, int streams, int numbers>
class TableView {
 public:
  static constexpr int kStreams = streams, kNumbers = numbers;
  static constexpr bool kHasGroups = numbers != kTermNumbers;

  __device__ explicit TableView(const Table& table) : table_(table) {}

  __device__ const Call& call() const { return table_.call; }
  __device__ const Entry& entry(uint32_t t) const { return reinterpret_cast<const Entry*>(table_.bytes)[t]; }

  __device__ void* stream(uint32_t t, int s) const {
    return reinterpret_cast<void* const*>(table_.bytes + call().tensors * sizeof(Entry))[t * streams + s];
  }

  __device__ double number(uint32_t t, int which) const {
    const uint32_t row = call().numbers_per_tensor ? t : 0;
    return read(rows()[row * numbers + which], call().sources[which]);
  }

  __device__ const GroupInfo& group_info(uint32_t t) const {
    const uint32_t rows_before = call().numbers_per_tensor ? call().tensors : 1;
    return reinterpret_cast<const GroupInfo*>(rows() + rows_before * numbers)[t];
  }

 private:
  __device__ const NumberRef* rows() const {
    const size_t before = call().tensors * (sizeof(Entry) + streams * sizeof(void*));
    return reinterpret_cast<const NumberRef*>(table_.bytes + before);
  }

  const Table& table_;
};

__device__ __forceinline__ uint32_t chunks_in(const GroupInfo& info) {
  return static_cast<uint32_t>((info.size + kChunkSize - 1) / kChunkSize);
}

// A group of several chunks: which of these, and its chunks in the list.
struct LargeGroup {
  uint32_t index, first_chunk, chunks;
};

// Finds the chunks of a table, in rising order.
template <class View>
class Cursor {
 public:
  // At the tensor of chunk c.
  template <class Table>
  __device__ Cursor(const Table& table, uint32_t c)
      : view_(table), t_(owner(view_.call().tensors, c, [&](uint32_t t) { return view_.entry(t).first_chunk; })) {}

  __device__ Chunk<View::kStreams> at(uint32_t c) {
    while (end() <= c) {
      ++t_;
    }
    const Entry& e = view_.entry(t_);
    const uint32_t k = c - e.first_chunk;
    Chunk<View::kStreams> chunk;
    chunk.dtype = e.dtype;
    chunk.adds = e.adds != 0;
    int64_t begin = static_cast<int64_t>(k) * kChunkSize;
    bool is_last = c + 1 == end();
    if constexpr (View::kHasGroups) {
      uint32_t group = 0, within = k;  // its chunk
      uint32_t count = end() - e.first_chunk, first = 0;
      int64_t group_size = 0;
      if (view_.call().norms != nullptr) {
        const GroupInfo& info = view_.group_info(t_);
        count = chunks_in(info);
        group = count == 1 ? k : k / count;
        within = k - group * count;
        group_size = info.size;
        first = info.first;
      }
      begin = group * group_size + static_cast<int64_t>(within) * kChunkSize;
      is_last = within + 1 == count;
      chunk.group = first + group;
      chunk.is_group = count == 1;
    }
    chunk.size = is_last ? e.tail : kChunkSize;
#pragma unroll
    for (int s = 0; s < View::kStreams; ++s) {
      char* const stream = static_cast<char*>(view_.stream(t_, s));
      chunk.streams[s] = stream == nullptr ? nullptr : stream + begin * bytes_of(e.dtype);
    }
    return chunk;
  }

  // A strip: how many chunks from c on, at() which the cursor is, before `end` and of its tensor, a warp can sum side
  // by side. They are groups of one block at most, whose vectors of 16 bytes are whole. One is none.
  __device__ uint32_t strip(const Chunk<View::kStreams>& chunk, uint32_t c, uint32_t end) const {
    const uintptr_t places = reinterpret_cast<uintptr_t>(chunk.streams[0]) | chunk.size * bytes_of(chunk.dtype);
    if (!chunk.is_group || chunk.size > kBlock || chunk.dtype == Dtype::kFloat64 || places % sizeof(uint4) != 0) {
      return 1;
    }
    return smaller(smaller(this->end(), end) - c, kBlocks);
  }

  // That of chunk c, at() which the cursor is.
  __device__ LargeGroup large_group(uint32_t c) const {
    const GroupInfo& info = view_.group_info(t_);
    const uint32_t first_chunk = view_.entry(t_).first_chunk, chunks = chunks_in(info);
    const uint32_t group = (c - first_chunk) / chunks;
    return {info.first_large + group, first_chunk + group * chunks, chunks};
  }

  __device__ const View& view() const { return view_; }
  __device__ uint32_t tensor() const { return t_; }

  // Of the chunk's tensor.
  __device__ double number(int which) const { return view_.number(t_, which); }

  __device__ ChunkNumbers numbers(double factor, double norm) const {
    ChunkNumbers found{};
#pragma unroll
    for (int i = 0; i < View::kNumbers; ++i) {
      found.of[i] = number(i);
    }
    found.factor = factor;
    found.norm = norm;
    found.terms = terms_of(found.of);
    return found;
  }

 private:
  static __device__ int bytes_of(Dtype dtype) {
    switch (dtype) {
      case Dtype::kFloat32:
        return sizeof(Element<Dtype::kFloat32>::Storage);
      case Dtype::kFloat64:
        return sizeof(Element<Dtype::kFloat64>::Storage);
      case Dtype::kBFloat16:
        return sizeof(Element<Dtype::kBFloat16>::Storage);
      case Dtype::kFloat16:
        return sizeof(Element<Dtype::kFloat16>::Storage);
    }
    return 0;
  }

  // The first chunk after those of the tensor.
  __device__ uint32_t end() const {
    return t_ + 1 < view_.call().tensors ? view_.entry(t_ + 1).first_chunk : view_.call().chunks;
  }

  const View view_;
  uint32_t t_;
};

}  // namespace fused_reg::cuda
