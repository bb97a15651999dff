// A list of tensors for the CUDA kernels on the host, its table, and what the CPU's kernels make of it.
#pragma once

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu/chunk_kernel.h"
#include "cuda_kernels.h"
#include "expect.h"

namespace fused_reg::cuda {

inline std::mt19937_64 random_bits(0);

inline size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// An element drawn from a normal distribution, now and then a zero, much smaller than others, a subnormal or the
// largest number.
inline void draw(Dtype dtype, char* to) {
  std::normal_distribution<double> normal;
  const int shift = random_bits() % 100 == 0 ? -static_cast<int>(random_bits() % 140) : 0;
  const double x = random_bits() % 50 == 0 ? 0 : std::ldexp(normal(random_bits), shift);
  const float f = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  switch (dtype) {
    case Dtype::kFloat32:
      std::memcpy(to, &f, 4);
      break;
    case Dtype::kFloat64:
      std::memcpy(to, &x, 8);
      break;
    case Dtype::kBFloat16:
      bits >>= 16;
      std::memcpy(to, &bits, 2);
      break;
    case Dtype::kFloat16:
      bits = __float2half_rn(f).bits;
      if (random_bits() % 50 == 0) {
        bits = random_bits() % 2 == 0 ? 0x7bff : 0x8001;
      }
      std::memcpy(to, &bits, 2);
      break;
  }
}

struct Tensor {
  Dtype dtype;
  int64_t size;
  int param_offset = 0, grad_offset = 0;  // elements from an address aligned to 16 bytes
  double l1 = 0.1, l2 = 0.3;
  bool wants_grad = true;
  bool adds = false;  // its gradient is added to what is there, where a kernel can
};

constexpr unsigned char kUntouched = cuda_on_host::kPoison;        // NaN: no result
constexpr size_t kEntryBytes = sizeof(Entry) + 2 * sizeof(void*);  // of a tensor in a table with two streams
constexpr size_t kGuard = 64;

// Memory of one tensor, with guards of a pattern that no result has.
struct Memory {
  Memory(Dtype dtype, int64_t size, int offset)
      : bytes(size * size_of(dtype)),
        block(bytes + 16 * 8 + 2 * kGuard, kUntouched),
        begin(aligned(block.data() + kGuard) + offset * size_of(dtype)) {}

  static unsigned char* aligned(unsigned char* p) { return p + (16 - reinterpret_cast<uintptr_t>(p) % 16) % 16; }

  bool guards_are_untouched() const {
    const auto untouched = [](unsigned char c) { return c == kUntouched; };
    return std::all_of(block.data(), static_cast<const unsigned char*>(begin), untouched) &&
           std::all_of(static_cast<const unsigned char*>(begin) + bytes, block.data() + block.size(), untouched);
  }

  size_t bytes;
  std::vector<unsigned char> block;
  unsigned char* begin;
};

class List {
 public:
  explicit List(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
    for (const Tensor& t : tensors_) {
      params_.emplace_back(t.dtype, t.size, t.param_offset);
      for (int64_t i = 0; i < t.size; ++i) {
        draw(t.dtype, reinterpret_cast<char*>(params_.back().begin) + i * size_of(t.dtype));
      }
      first_chunk_.push_back(chunks_);
      chunks_ += (t.size + kChunkSize - 1) / kChunkSize;
      per_tensor_ |= t.l1 != tensors_[0].l1 || t.l2 != tensors_[0].l2;
    }
  }

  const std::vector<Tensor>& tensors() const { return tensors_; }
  unsigned char* param(size_t t) const { return params_[t].begin; }
  size_t table_size() const {
    return tensors_.size() * kEntryBytes + (per_tensor_ ? tensors_.size() : 1) * kTermNumbers * sizeof(NumberRef);
  }

  // The penalty, by the CPU's kernel, in the order of summation.h.
  double expected_penalty() const {
    const int64_t group = run_length(chunks_);
    std::vector<double> values;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      for (const ChunkSums& s : expected_sums(t)) {
        values.push_back(SummedTerms::penalty(numbers(t).of, s.of));
      }
    }
    return column_sum<kColumns>((chunks_ + group - 1) / group, [&](int64_t g) {
      CompensatedSum sum{};
      for (int64_t c = g * group; c < std::min((g + 1) * group, chunks_); ++c) {
        sum.add(values[c]);
      }
      return result(sum);
    });
  }

  // In pieces: over millions of elements even long double would lose digits.
  long double exact_penalty() const {
    long double sum = 0, piece = 0;
    int64_t count = 0;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      for (int64_t i = 0; i < tensors_[t].size; ++i) {
        const long double w = element(t, i);
        piece += (tensors_[t].l1 == 0 ? 0 : tensors_[t].l1 * std::abs(w)) +
                 (tensors_[t].l2 == 0 ? 0 : tensors_[t].l2 * w * w);
        if (++count % 1000 == 0) {
          sum += piece;
          piece = 0;
        }
      }
    }
    return sum + piece;
  }

  // Added to what was there before, unless that is null.
  std::vector<unsigned char> expected_grad(size_t t, double upstream, const unsigned char* before) const {
    std::vector<unsigned char> grad = before == nullptr ? std::vector<unsigned char>(params_[t].bytes)
                                                        : std::vector<unsigned char>(before, before + params_[t].bytes);
    for_chunks(t, [&](ChunkTask task, size_t begin) {
      task.pass = before == nullptr ? Pass::kGradient : Pass::kAccumulate;
      task.streams[1] = grad.data() + begin;
      task.numbers.factor = upstream;
      kernel(task);
    });
    return grad;
  }

  std::vector<ChunkSums> expected_sums(size_t t) const {
    std::vector<ChunkSums> sums;
    for_chunks(t, [&](ChunkTask task, size_t) {
      task.pass = Pass::kPenalty;
      sums.push_back(kernel(task));
    });
    return sums;
  }

  // Gradients in guarded memory, and a check of them.
  std::vector<Memory> fresh_grads() const {
    std::vector<Memory> grads;
    for (const Tensor& t : tensors_) {
      grads.emplace_back(t.dtype, t.size, t.grad_offset);
    }
    return grads;
  }

  // Numbers in gradients, for those that are added to.
  void fill_grads(std::vector<Memory>* grads) const {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      for (int64_t i = 0; tensors_[t].adds && tensors_[t].wants_grad && i < tensors_[t].size; ++i) {
        draw(tensors_[t].dtype, reinterpret_cast<char*>((*grads)[t].begin) + i * size_of(tensors_[t].dtype));
      }
    }
  }

  int64_t zeros(size_t t) const {
    int64_t count = 0;
    for (int64_t i = 0; i < tensors_[t].size; ++i) {
      count += element(t, i) == 0;
    }
    return count;
  }

  void expect_grads(const std::vector<Memory>& grads, double upstream, const std::string& what,
                    const std::vector<Memory>* before = nullptr) const {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      EXPECT(grads[t].guards_are_untouched(), what, t, "written outside");
      const std::vector<unsigned char> expected =
          tensors_[t].wants_grad
              ? expected_grad(t, upstream, before != nullptr && tensors_[t].adds ? (*before)[t].begin : nullptr)
              : std::vector<unsigned char>(params_[t].bytes, kUntouched);
      EXPECT(std::equal(expected.begin(), expected.end(), static_cast<const unsigned char*>(grads[t].begin)), what, t,
             tensors_[t].size);
      EXPECT(params_[t].guards_are_untouched(), what, t);
    }
  }

  // The table; strengths are values, or addresses of float64 numbers where `on_device`.
  std::vector<unsigned char> table(std::vector<Memory>* grads, bool on_device, Call* call, bool adds = false,
                                   Rows rows = rows_of(Pass::kPenaltyGradient)) {
    std::vector<Entry> entries;
    std::vector<void*> streams;
    std::vector<NumberRef> strengths;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      Entry e{};
      streams.push_back(params_[t].begin);
      if (rows.streams == 2) {
        streams.push_back(grads != nullptr && tensors_[t].wants_grad ? (*grads)[t].begin : nullptr);
      }
      e.first_chunk = static_cast<uint32_t>(first_chunk_[t]);
      e.tail = static_cast<uint16_t>(tensors_[t].size - (tensors_[t].size - 1) / kChunkSize * kChunkSize);
      e.dtype = tensors_[t].dtype;
      e.adds = adds && tensors_[t].adds && streams.back() != nullptr;
      entries.push_back(e);
      if (per_tensor_ || t == 0) {
        for (int column = 0; column < rows.numbers; ++column) {
          const double* const values[kGroupNumbers] = {&tensors_[t].l1, &tensors_[t].l2, &kZero, &kZero};
          NumberRef ref;
          ref.value = *values[column];
          if (on_device) {
            ref.address = values[column];
          }
          strengths.push_back(ref);
        }
      }
    }
    call->tensors = static_cast<uint32_t>(tensors_.size());
    call->chunks = static_cast<uint32_t>(chunks_);
    call->run_length = static_cast<uint32_t>(run_length(chunks_));
    call->runs = (call->chunks + call->run_length - 1) / call->run_length;
    call->numbers_per_tensor = per_tensor_;
    std::fill_n(call->sources, kNumbers, on_device ? Source::kFloat64 : Source::kValue);
    call->team = random_bits() % 2 == 0 ? 1 : kWarps;
    call->factor.value = 1;
    call->factor_source = Source::kValue;
    std::vector<unsigned char> bytes;
    const auto append = [&](const void* from, size_t size) {
      bytes.insert(bytes.end(), static_cast<const unsigned char*>(from),
                   static_cast<const unsigned char*>(from) + size);
    };
    append(entries.data(), entries.size() * sizeof(Entry));
    append(streams.data(), streams.size() * sizeof(void*));
    append(strengths.data(), strengths.size() * sizeof(NumberRef));
    return bytes;
  }

 private:
  static constexpr double kZero = 0;

  static ChunkSums kernel(const ChunkTask& task) {
    TaskSums sums;
    kernels_baseline.run(task, &sums);
    return sums.of(0);
  }

  ChunkNumbers numbers(size_t t) const {
    ChunkNumbers numbers{{tensors_[t].l1, tensors_[t].l2}, 1, 0, kNone};
    numbers.terms = terms_of(numbers.of);
    return numbers;
  }

  template <class Body>
  void for_chunks(size_t t, const Body& body) const {
    for (int64_t begin = 0; begin < tensors_[t].size; begin += kChunkSize) {
      ChunkTask task{};
      task.dtype = tensors_[t].dtype;
      static_cast<ChunkNumbers&>(task.numbers) = numbers(t);
      task.streams[0] = params_[t].begin + begin * size_of(task.dtype);
      task.size = std::min<int64_t>(kChunkSize, tensors_[t].size - begin);
      body(task, begin * size_of(task.dtype));
    }
  }

  long double element(size_t t, int64_t i) const {
    const unsigned char* const at = params_[t].begin + i * size_of(tensors_[t].dtype);
    double wide;
    float single;
    uint16_t half;
    switch (tensors_[t].dtype) {
      case Dtype::kFloat64:
        std::memcpy(&wide, at, 8);
        return wide;
      case Dtype::kFloat32:
        std::memcpy(&single, at, 4);
        return single;
      case Dtype::kBFloat16:
        std::memcpy(&half, at, 2);
        return __uint_as_float(static_cast<unsigned>(half) << 16);
      case Dtype::kFloat16:
        break;
    }
    std::memcpy(&half, at, 2);
    return __half2float({half});
  }

  std::vector<Tensor> tensors_;
  std::vector<Memory> params_;
  std::vector<int64_t> first_chunk_;
  int64_t chunks_ = 0;
  bool per_tensor_ = false;
};

}  // namespace fused_reg::cuda
