// Where the chunks of a table are.
#pragma once

#include "element.cuh"

namespace fused_reg::cuda {

struct Chunk {
  const void* param;
  void* out;
  int size;
  Dtype dtype;
  bool adds;
  double l1, l2;

  __device__ int blocks() const { return (size + kBlock - 1) / kBlock; }
};

struct GroupChunk : Chunk {
  uint32_t group;  // in Call.norms
  bool is_group;   // the whole of it
};

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

// A table whose rows of strengths have this length.
template <class Table, int strengths>
class TableView {
 public:
  __device__ explicit TableView(const Table& table) : table_(table) {}

  __device__ const Call& call() const { return table_.call; }
  __device__ const Entry& entry(uint32_t t) const { return reinterpret_cast<const Entry*>(table_.bytes)[t]; }

  __device__ double strength(uint32_t t, StrengthColumn column) const {
    const uint32_t row = call().strength_per_tensor ? t : 0;
    return read(rows()[row * strengths + column], call().sources[column]);
  }

  __device__ const GroupInfo& group_info(uint32_t t) const {
    const uint32_t rows_before = call().strength_per_tensor ? call().tensors : 1;
    return reinterpret_cast<const GroupInfo*>(rows() + rows_before * strengths)[t];
  }

 private:
  __device__ const NumberRef* rows() const {
    return reinterpret_cast<const NumberRef*>(table_.bytes + call().tensors * sizeof(Entry));
  }

  const Table& table_;
};

__device__ __forceinline__ uint32_t chunks_in(const GroupInfo& info) {
  return static_cast<uint32_t>((info.size + kChunkSize - 1) / kChunkSize);
}

// Finds the chunks of a table, in rising order.
template <class Table, int strengths>
class Cursor {
 public:
  // At the tensor of chunk c.
  __device__ Cursor(const Table& table, uint32_t c)
      : view_(table), t_(owner(view_.call().tensors, c, [&](uint32_t t) { return view_.entry(t).first_chunk; })) {}

  __device__ auto at(uint32_t c) {
    while (end() <= c) {
      ++t_;
    }
    const Entry& e = view_.entry(t_);
    const uint32_t k = c - e.first_chunk;
    if constexpr (strengths == kTermStrengths) {
      return part<Chunk>(e, static_cast<int64_t>(k) * kChunkSize, c + 1 == end());
    } else {
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
      const int64_t begin = group * group_size + static_cast<int64_t>(within) * kChunkSize;
      GroupChunk chunk = part<GroupChunk>(e, begin, within + 1 == count);
      chunk.group = first + group;
      chunk.is_group = count == 1;
      return chunk;
    }
  }

  // Of the chunk's tensor.
  __device__ double strength(StrengthColumn column) const { return view_.strength(t_, column); }

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

  template <class AnyChunk>
  __device__ AnyChunk part(const Entry& e, int64_t begin, bool is_last) const {
    const int64_t bytes = begin * bytes_of(e.dtype);
    AnyChunk chunk;
    chunk.param = static_cast<const char*>(e.param) + bytes;
    chunk.out = e.out == nullptr ? nullptr : static_cast<char*>(e.out) + bytes;
    chunk.size = is_last ? e.tail : kChunkSize;
    chunk.dtype = e.dtype;
    chunk.adds = e.adds != 0;
    chunk.l1 = strength(kColumnL1);
    chunk.l2 = strength(kColumnL2);
    return chunk;
  }

  // The first chunk after those of the tensor.
  __device__ uint32_t end() const {
    return t_ + 1 < view_.call().tensors ? view_.entry(t_ + 1).first_chunk : view_.call().chunks;
  }

  const TableView<Table, strengths> view_;
  uint32_t t_;
};

}  // namespace fused_reg::cuda
