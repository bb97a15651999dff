// Device code. No torch: the tests also run it on the host (tests/cpp/cuda_on_host).
//
// A CTA of 4 warps takes a chunk at a time and sums it in the order of summation.h. A warp takes blocks of it: every
// thread loads 16 bytes of a row, the rows of a block one after the other, so that it holds some lanes of the block;
// shuffles fold 64 lanes to 8; shared memory collects the blocks of the chunk. Tensors that are not aligned to 16
// bytes, and the last part of a tensor, are read an element at a time, coalesced, in the same order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "table.h"

namespace fused_reg::cuda {

constexpr int kWarp = 32;
constexpr int kWarps = 4;
constexpr int kThreads = kWarp * kWarps;
constexpr int kCtasPerSm = 4;  // resident: bounds the registers
constexpr int kBatch = 8;      // rows whose loads are in flight together
constexpr unsigned kAll = 0xffffffff;
static_assert(kThreads == kColumns, "a thread sums a column");

// CTAs that have finished, one count for every launch that may run at a time. atomicInc takes each back to 0.
__device__ unsigned tickets[kMaxTickets];

template <Dtype>
struct Element;

template <>
struct Element<Dtype::kFloat32> {
  using Storage = float;
  using Scalar = float;  // in which the gradient is computed
  static __device__ float widen(float x) { return x; }
  static __device__ float narrow(float x) { return x; }
};

template <>
struct Element<Dtype::kFloat64> {
  using Storage = double;
  using Scalar = double;
  static __device__ double widen(double x) { return x; }
  static __device__ double narrow(double x) { return x; }
};

template <>
struct Element<Dtype::kBFloat16> {
  using Storage = uint16_t;
  using Scalar = float;
  static __device__ float widen(uint16_t x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }
  static __device__ uint16_t narrow(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
};

template <>
struct Element<Dtype::kFloat16> {
  using Storage = uint16_t;
  using Scalar = float;
  static __device__ float widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ uint16_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct OneRounding {
  static __device__ double of(double a, double b, double c) { return fma(a, b, c); }
};

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline __device__ double read(const void* address, Source source) {
  switch (source) {
    case Source::kFloat32:
      return *static_cast<const float*>(address);
    case Source::kFloat64:
      return *static_cast<const double*>(address);
    case Source::kBFloat16:
      return Element<Dtype::kBFloat16>::widen(*static_cast<const uint16_t*>(address));
    default:
      return Element<Dtype::kFloat16>::widen(*static_cast<const uint16_t*>(address));
  }
}

inline __device__ double read(const StrengthRef& strength, Source source) {
  return source == Source::kValue ? strength.value : read(strength.address, source);
}

struct Chunk {
  const void* param;
  void* grad;
  int size;
  Dtype dtype;
  double l1, l2;

  __device__ int blocks() const { return (size + kBlock - 1) / kBlock; }
};

// Finds the chunks of a table, in rising order.
template <class Table>
class Cursor {
 public:
  // At the tensor of chunk c: the last one that starts there or before.
  __device__ Cursor(const Table& table, uint32_t c) : table_(table), t_(0) {
    uint32_t end = table.call.tensors;
    while (end - t_ > 1) {
      const uint32_t middle = t_ + (end - t_) / 2;
      (entry(middle).first_chunk <= c ? t_ : end) = middle;
    }
  }

  __device__ Chunk at(uint32_t c) {
    while (end() <= c) {
      ++t_;
    }
    const Entry& e = entry(t_);
    const StrengthPair& strengths = strength(table_.call.strength_per_tensor ? t_ : 0);
    const int64_t begin = static_cast<int64_t>(c - e.first_chunk) * kChunkSize * bytes_of(e.dtype);
    return {static_cast<const char*>(e.param) + begin, e.grad == nullptr ? nullptr : static_cast<char*>(e.grad) + begin,
            c + 1 == end() ? e.tail : kChunkSize,      e.dtype,
            read(strengths.l1, table_.call.l1_source), read(strengths.l2, table_.call.l2_source)};
  }

 private:
  static __device__ int bytes_of(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kFloat64 ? 8 : 2;
  }

  __device__ const Entry& entry(uint32_t t) const { return reinterpret_cast<const Entry*>(table_.bytes)[t]; }

  __device__ const StrengthPair& strength(uint32_t i) const {
    return reinterpret_cast<const StrengthPair*>(table_.bytes + table_.call.tensors * sizeof(Entry))[i];
  }

  // The first chunk after those of the tensor.
  __device__ uint32_t end() const {
    return t_ + 1 < table_.call.tensors ? entry(t_ + 1).first_chunk : table_.call.chunks;
  }

  const Table& table_;
  uint32_t t_;
};

// The folded lanes of every block of a chunk.
struct Blocks {
  double sums[kBlocks][2][kFoldedLanes];  // of |l1_scale * w|, of (l2_scale * w)^2
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

// What is done with the elements of a chunk.
template <Dtype dtype, bool sums>
class Work {
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  using MultiplyAdd = std::conditional_t<dtype == Dtype::kFloat64, TwoRoundings, OneRounding>;

 public:
  __device__ Work(const Chunk& chunk, double upstream)
      : param_(static_cast<const Storage*>(chunk.param)),
        grad_(static_cast<Storage*>(chunk.grad)),
        size_(chunk.size),
        terms_(terms_of(chunk.l1, chunk.l2)),
        l1_scale_(scaled_strength(chunk.l1, kL1, dtype == Dtype::kFloat64).scale),
        l2_scale_(scaled_strength(chunk.l2, kL2, dtype == Dtype::kFloat64).scale),
        c1_(gradient_factor<Scalar>(upstream, chunk.l1)),
        c2_(gradient_factor<Scalar>(upstream, chunk.l2)) {}

  __device__ __forceinline__ void run(Blocks* blocks, int warp, int thread) const {
    const int whole = is_aligned() ? size_ / kBlock : 0;
    for (int b = warp * kAbreast; b < whole; b += kWarps * kAbreast) {
      whole_blocks(blocks, b + thread / kSharers, whole, thread);
    }
    for (int b = whole + warp; b * kBlock < size_; b += kWarps) {
      any_block(blocks, b, thread);
    }
  }

 private:
  static constexpr int kVector = 16 / sizeof(Storage);  // elements that a thread loads at a time
  static constexpr int kSharers = kLanes / kVector;     // threads that share a row
  static constexpr int kAbreast = kWarp / kSharers;     // blocks that a warp takes side by side

  struct Vector {
    Storage e[kVector];
  };

  __device__ bool is_aligned() const {
    return (reinterpret_cast<uintptr_t>(param_) | reinterpret_cast<uintptr_t>(grad_)) % 16 == 0;
  }

  __device__ __forceinline__ void whole_blocks(Blocks* blocks, int b, int end, int thread) const {
    double l1[kVector] = {}, l2[kVector] = {};
    const int sharer = thread % kSharers;
    if (b < end) {
      const int begin = b * kBlock + sharer * kVector;
#pragma unroll
      for (int first = 0; first < kRows; first += kBatch) {
        Vector rows[kBatch];
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          rows[r] = bits_as<Vector>(__ldg(reinterpret_cast<const uint4*>(param_ + begin + (first + r) * kLanes)));
        }
#pragma unroll
        for (int r = 0; r < kBatch; ++r) {
          add(rows[r].e, l1, l2);
          if (grad_ != nullptr) {
            Vector grad;
            differentiate(rows[r].e, grad.e);
            *reinterpret_cast<uint4*>(grad_ + begin + (first + r) * kLanes) = bits_as<uint4>(grad);
          }
        }
      }
    }
    if constexpr (sums) {
      using ToFolded = Fold<kVector, kSharers / 2, kSharers / 8>;
      const double l1_sum = ToFolded::sum(l1, sharer), l2_sum = ToFolded::sum(l2, sharer);
      if (b < end && ToFolded::is_first(sharer)) {
        store(blocks, b, sharer * kVector + ToFolded::lane(sharer), l1_sum, l2_sum);
      }
    }
  }

  // A block that may end anywhere, at any address: a thread has two lanes.
  __device__ __forceinline__ void any_block(Blocks* blocks, int b, int thread) const {
    double l1[2][1] = {}, l2[2][1] = {};
    const int begin = b * kBlock + thread;
#pragma unroll
    for (int first = 0; first < kRows; first += kBatch) {
      Storage rows[kBatch][2][1];
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        for (int half = 0; half < 2; ++half) {
          const int i = begin + (first + r) * kLanes + half * kWarp;
          rows[r][half][0] = i < size_ ? __ldg(param_ + i) : Storage{};
        }
      }
#pragma unroll
      for (int r = 0; r < kBatch; ++r) {
        for (int half = 0; half < 2; ++half) {
          const int i = begin + (first + r) * kLanes + half * kWarp;
          add(rows[r][half], l1[half], l2[half]);
          if (grad_ != nullptr && i < size_) {
            Storage grad[1];
            differentiate(rows[r][half], grad);
            grad_[i] = grad[0];
          }
        }
      }
    }
    if constexpr (sums) {
      using ToFolded = Fold<1, kWarp / 2, kFoldedLanes>;
      const double l1_sum = ToFolded::sum({l1[0][0] + l1[1][0]}, thread);
      const double l2_sum = ToFolded::sum({l2[0][0] + l2[1][0]}, thread);
      if (ToFolded::is_first(thread)) {
        store(blocks, b, thread, l1_sum, l2_sum);
      }
    }
  }

  static __device__ void store(Blocks* blocks, int b, int lane, double l1_sum, double l2_sum) {
    blocks->sums[b][0][lane % kFoldedLanes] = l1_sum;
    blocks->sums[b][1][lane % kFoldedLanes] = l2_sum;
  }

  template <int count>
  __device__ __forceinline__ void add(const Storage (&w)[count], double (&l1)[count], double (&l2)[count]) const {
    if constexpr (sums) {
      if (terms_ & kL1) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
          l1[i] = add_l1_term(l1[i], scaled(w[i], l1_scale_));
        }
      }
      if (terms_ & kL2) {
#pragma unroll
        for (int i = 0; i < count; ++i) {
          l2[i] = add_l2_term<MultiplyAdd>(l2[i], scaled(w[i], l2_scale_));
        }
      }
    }
  }

  static __device__ __forceinline__ double scaled(Storage w, double scale) {
    const double wide = E::widen(w);
    return dtype == Dtype::kFloat64 ? wide * scale : wide;
  }

  template <int count>
  __device__ __forceinline__ void differentiate(const Storage (&w)[count], Storage (&grad)[count]) const {
    switch (terms_) {
      case kNone:
        return differentiate_terms<kNone>(w, grad);
      case kL1:
        return differentiate_terms<kL1>(w, grad);
      case kL2:
        return differentiate_terms<kL2>(w, grad);
      case kL1L2:
        return differentiate_terms<kL1L2>(w, grad);
    }
  }

  template <Terms terms, int count>
  __device__ __forceinline__ void differentiate_terms(const Storage (&w)[count], Storage (&grad)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      grad[i] = E::narrow(gradient<terms>(E::widen(w[i]), c1_, c2_));
    }
  }

  const Storage* param_;
  Storage* grad_;
  int size_;
  Terms terms_;
  double l1_scale_, l2_scale_;
  Scalar c1_, c2_;
};

template <bool sums>
__device__ __forceinline__ void run_chunk(const Chunk& chunk, double upstream, Blocks* blocks) {
  const int warp = threadIdx.x / kWarp, thread = threadIdx.x % kWarp;
  switch (chunk.dtype) {
    case Dtype::kFloat32:
      return Work<Dtype::kFloat32, sums>(chunk, upstream).run(blocks, warp, thread);
    case Dtype::kFloat64:
      return Work<Dtype::kFloat64, sums>(chunk, upstream).run(blocks, warp, thread);
    case Dtype::kBFloat16:
      return Work<Dtype::kBFloat16, sums>(chunk, upstream).run(blocks, warp, thread);
    case Dtype::kFloat16:
      return Work<Dtype::kFloat16, sums>(chunk, upstream).run(blocks, warp, thread);
  }
}

// The sums of a chunk, in every thread of a warp: the trees over its blocks and then over the folded lanes.
__device__ __forceinline__ ChunkSums total(const Blocks& blocks, int count, int thread) {
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

__device__ __forceinline__ double penalty_of(const Chunk& chunk, const ChunkSums& sums) {
  const bool is_float64 = chunk.dtype == Dtype::kFloat64;
  return penalty_of_sums(terms_of(chunk.l1, chunk.l2), scaled_strength(chunk.l1, kL1, is_float64).factor, sums.l1,
                         scaled_strength(chunk.l2, kL2, is_float64).factor, sums.l2);
}

// True in every thread of the CTA that is the last to arrive here; it sees what all of them have written.
__device__ __forceinline__ bool is_last_cta(unsigned ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(&tickets[ticket], gridDim.x - 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

__device__ __forceinline__ void write_value(const Call& call) {
  __shared__ CompensatedSum columns[kColumns];
  const int column = threadIdx.x;
  CompensatedSum sum{};
#pragma unroll 4
  for (uint32_t g = column; g < call.runs; g += kColumns) {
    sum.add(__ldcg(call.run_sums + g));
  }
  columns[column] = sum;
  for (int half = kColumns / 2; half > 0; half /= 2) {
    __syncthreads();
    if (column < half) {
      columns[column].add(columns[column + half]);
    }
  }
  if (column == 0) {
    const double value = result(columns[0]);
    if (call.value_is_float64) {
      *static_cast<double*>(call.value) = value;
    } else {
      // The conversion would give NaN the form of the device.
      *static_cast<float*>(call.value) = value == value ? static_cast<float>(value) : __uint_as_float(0x7fc00000);
    }
  }
}

// The penalty of the list (or its sums of terms), and the gradients of the entries that have one.
template <class Table>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) penalty_kernel(const __grid_constant__ Table table) {
  __shared__ Blocks blocks[2];  // one is summed while the other is filled
  const Call& call = table.call;
  const int thread = threadIdx.x;
  int filled = 0;
  for (uint32_t g = blockIdx.x; g < call.runs; g += gridDim.x) {
    const uint32_t begin = g * call.run_length;
    const uint32_t end = call.chunks - begin < call.run_length ? call.chunks : begin + call.run_length;
    Cursor<Table> cursor(table, begin);
    CompensatedSum sum{};
    for (uint32_t c = begin; c < end; ++c) {
      const Chunk chunk = cursor.at(c);
      run_chunk<true>(chunk, 1, &blocks[filled]);
      __syncthreads();
      if (thread < kWarp) {
        const ChunkSums sums = total(blocks[filled], chunk.blocks(), thread);
        sum.add(penalty_of(chunk, sums));
        if (call.chunk_sums != nullptr && thread == 0) {
          call.chunk_sums[c] = sums;
        }
      }
      filled = 1 - filled;
    }
    if (call.chunk_sums == nullptr && thread == 0) {
      call.run_sums[g] = result(sum);
    }
  }
  if (call.chunk_sums == nullptr && is_last_cta(call.ticket)) {
    write_value(call);
  }
}

// upstream * gradient, into the entries.
template <class Table>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) gradient_kernel(const __grid_constant__ Table table) {
  const Call& call = table.call;
  const double upstream = read(call.upstream, call.upstream_source);
  if (call.keep_if_one && upstream == 1) {
    return;
  }
  for (uint32_t c = blockIdx.x; c < call.chunks; c += gridDim.x) {
    run_chunk<false>(Cursor<Table>(table, c).at(c), upstream, nullptr);
  }
}

// The sums of terms of every tensor, [tensors], from those of its chunks: a warp a tensor.
static __global__ void __launch_bounds__(kThreads) tensor_sums_kernel(DeviceTable table, ChunkSums* out) {
  __shared__ CompensatedSum columns[kWarps][2][kTensorColumns];
  static_assert(kTensorColumns == kWarp);
  const int warp = threadIdx.x / kWarp, thread = threadIdx.x % kWarp;
  const auto* const entries = reinterpret_cast<const Entry*>(table.bytes);
  for (uint32_t t = blockIdx.x * kWarps + warp; t < table.call.tensors; t += gridDim.x * kWarps) {
    const uint32_t end = t + 1 < table.call.tensors ? entries[t + 1].first_chunk : table.call.chunks;
    CompensatedSum l1{}, l2{};
    for (uint32_t c = entries[t].first_chunk + thread; c < end; c += kWarp) {
      l1.add(table.call.chunk_sums[c].l1);
      l2.add(table.call.chunk_sums[c].l2);
    }
    columns[warp][0][thread] = l1;
    columns[warp][1][thread] = l2;
    for (int half = kWarp / 2; half > 0; half /= 2) {
      __syncwarp();
      if (thread < half) {
        columns[warp][0][thread].add(columns[warp][0][thread + half]);
        columns[warp][1][thread].add(columns[warp][1][thread + half]);
      }
    }
    if (thread == 0) {
      out[t] = {result(columns[warp][0][0]), result(columns[warp][1][0])};
    }
    __syncwarp();
  }
}

// A piece of a table, from the arguments into device memory: unlike a copy from the host, it can be captured in a
// graph.
struct Piece {
  unsigned char bytes[kLargeTable];
};

static __global__ void __launch_bounds__(kThreads)
    upload_kernel(unsigned char* to, unsigned size, const __grid_constant__ Piece piece) {
  for (unsigned i = blockIdx.x * kThreads + threadIdx.x; i < size; i += gridDim.x * kThreads) {
    to[i] = piece.bytes[i];
  }
}

}  // namespace fused_reg::cuda
