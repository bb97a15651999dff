// The CUDA kernels and their launches, on the host (cuda_on_host/): against the CPU's kernels, bit for bit, and against
// long double; every element of a gradient written once, and nothing beside it.
#include <cmath>
#include <limits>
#include <string>

#include "cpu/chunk_kernel.h"
#include "cuda/kernels.h"
#include "cuda/penalty_kernels.cu"
#include "expect.h"

namespace fused_reg {

std::vector<int> architectures;

void set_cuda_architectures(const int* begin, size_t count) { architectures.assign(begin, begin + count); }

}  // namespace fused_reg

using namespace fused_reg;
using namespace fused_reg::cuda;

namespace {

std::mt19937_64 random_bits(0);

size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// An element drawn from a normal distribution, now and then a zero, a subnormal or the largest number.
void draw(Dtype dtype, char* to) {
  std::normal_distribution<double> normal;
  const double x = random_bits() % 50 == 0 ? 0 : normal(random_bits);
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
};

constexpr unsigned char kUntouched = 0xa5;
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
  size_t table_size() const {
    return tensors_.size() * sizeof(Entry) + (per_tensor_ ? tensors_.size() : 1) * sizeof(StrengthPair);
  }

  // The penalty, by the CPU's kernel, in the order of summation.h.
  double expected_penalty() const {
    const int64_t group = run_length(chunks_);
    std::vector<double> values;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      for (const ChunkSums& s : expected_sums(t)) {
        values.push_back(penalty_of_sums(terms(t), scaled(t, kL1).factor, s.l1, scaled(t, kL2).factor, s.l2));
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

  std::vector<unsigned char> expected_grad(size_t t, double upstream) const {
    const auto factor = [&](double strength) -> double {
      return tensors_[t].dtype == Dtype::kFloat64 ? gradient_factor<double>(upstream, strength)
                                                  : gradient_factor<float>(upstream, strength);
    };
    std::vector<unsigned char> grad(params_[t].bytes);
    for_chunks(t, [&](ChunkTask task, size_t begin) {
      task.pass = Pass::kGradient;
      task.grad = grad.data() + begin;
      task.c1 = factor(tensors_[t].l1);
      task.c2 = factor(tensors_[t].l2);
      kernel(task);
    });
    return grad;
  }

  std::vector<ChunkSums> expected_sums(size_t t) const {
    std::vector<ChunkSums> sums;
    for_chunks(t, [&](ChunkTask task, size_t) {
      task.pass = Pass::kSums;
      task.l1_scale = scaled(t, kL1).scale;
      task.l2_scale = scaled(t, kL2).scale;
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

  void expect_grads(const std::vector<Memory>& grads, double upstream, const std::string& what) const {
    for (size_t t = 0; t < tensors_.size(); ++t) {
      EXPECT(grads[t].guards_are_untouched(), what, t, "written outside");
      const std::vector<unsigned char> expected = tensors_[t].wants_grad
                                                      ? expected_grad(t, upstream)
                                                      : std::vector<unsigned char>(params_[t].bytes, kUntouched);
      EXPECT(std::equal(expected.begin(), expected.end(), static_cast<const unsigned char*>(grads[t].begin)), what, t,
             tensors_[t].size);
      EXPECT(params_[t].guards_are_untouched(), what, t);
    }
  }

  // The table; strengths are values, or addresses of float64 numbers where `on_device`.
  std::vector<unsigned char> table(std::vector<Memory>* grads, bool on_device, Call* call) {
    std::vector<Entry> entries;
    std::vector<StrengthPair> strengths;
    for (size_t t = 0; t < tensors_.size(); ++t) {
      Entry e{};
      e.param = params_[t].begin;
      e.grad = grads != nullptr && tensors_[t].wants_grad ? (*grads)[t].begin : nullptr;
      e.first_chunk = static_cast<uint32_t>(first_chunk_[t]);
      e.tail = static_cast<uint16_t>(tensors_[t].size - (tensors_[t].size - 1) / kChunkSize * kChunkSize);
      e.dtype = tensors_[t].dtype;
      entries.push_back(e);
      if (per_tensor_ || t == 0) {
        StrengthPair pair;
        pair.l1.value = tensors_[t].l1;
        pair.l2.value = tensors_[t].l2;
        if (on_device) {
          pair.l1.address = &tensors_[t].l1;
          pair.l2.address = &tensors_[t].l2;
        }
        strengths.push_back(pair);
      }
    }
    call->tensors = static_cast<uint32_t>(tensors_.size());
    call->chunks = static_cast<uint32_t>(chunks_);
    call->run_length = static_cast<uint32_t>(run_length(chunks_));
    call->runs = (call->chunks + call->run_length - 1) / call->run_length;
    call->strength_per_tensor = per_tensor_;
    call->l1_source = call->l2_source = on_device ? Source::kFloat64 : Source::kValue;
    std::vector<unsigned char> bytes(entries.size() * sizeof(Entry) + strengths.size() * sizeof(StrengthPair));
    std::memcpy(bytes.data(), entries.data(), entries.size() * sizeof(Entry));
    std::memcpy(bytes.data() + entries.size() * sizeof(Entry), strengths.data(),
                strengths.size() * sizeof(StrengthPair));
    return bytes;
  }

 private:
  static ChunkSums kernel(const ChunkTask& task) { return chunk_kernel_baseline(task); }

  Terms terms(size_t t) const { return terms_of(tensors_[t].l1, tensors_[t].l2); }

  ScaledStrength scaled(size_t t, Terms term) const {
    return scaled_strength(term == kL1 ? tensors_[t].l1 : tensors_[t].l2, term, tensors_[t].dtype == Dtype::kFloat64);
  }

  template <class Body>
  void for_chunks(size_t t, const Body& body) const {
    for (int64_t begin = 0; begin < tensors_[t].size; begin += kChunkSize) {
      ChunkTask task{};
      task.dtype = tensors_[t].dtype;
      task.terms = terms(t);
      task.param = params_[t].begin + begin * size_of(task.dtype);
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

// Launches, from a copy of a long table in "device memory".
cudaError_t launch_list(Kernel kernel, const Call& call, const std::vector<unsigned char>& bytes) {
  if (bytes.size() <= kLargeTable) {
    return launch(kernel, call, bytes.data(), bytes.size(), nullptr);
  }
  std::vector<unsigned char> memory(bytes.size() + kGuard, kUntouched);
  EXPECT(upload(memory.data(), bytes.data(), bytes.size(), nullptr) == cudaSuccess);
  EXPECT(std::all_of(memory.end() - kGuard, memory.end(), [](unsigned char c) { return c == kUntouched; }));
  return launch(kernel, call, memory.data(), bytes.size(), nullptr);
}

double run_penalty(List& list, std::vector<Memory>* grads, bool on_device, bool as_float64 = true) {
  Call call{};
  const std::vector<unsigned char> bytes = list.table(grads, on_device, &call);
  std::vector<double> run_sums(call.runs, std::nan(""));
  double value = std::nan("");
  float value32 = 0;
  call.run_sums = run_sums.data();
  call.value = as_float64 ? static_cast<void*>(&value) : &value32;
  call.value_is_float64 = as_float64;
  call.ticket = static_cast<uint32_t>(random_bits() % kMaxTickets);
  cuda_on_host::launches = 0;
  EXPECT(launch_list(Kernel::kPenalty, call, bytes) == cudaSuccess);
  const size_t uploads = bytes.size() <= kLargeTable ? 0 : (bytes.size() + sizeof(Piece) - 1) / sizeof(Piece);
  EXPECT(cuda_on_host::launches == 1 + static_cast<int>(uploads));
  EXPECT(tickets[call.ticket] == 0, "the ticket is ready for the next launch");
  return as_float64 ? value : value32;
}

void expect_list(std::vector<Tensor> tensors, const std::string& what) {
  List list(std::move(tensors));
  const double expected = list.expected_penalty();
  const long double exact = list.exact_penalty();
  EXPECT(std::abs(expected - exact) <= 3.6e-15L * exact, what, expected,
         static_cast<double>((expected - exact) / exact));
  cuda_on_host::multiprocessors = 1 + static_cast<int>(random_bits() % 5);

  const double value = run_penalty(list, nullptr, false);
  EXPECT(std::memcmp(&value, &expected, sizeof value) == 0, what, value, expected);
  EXPECT(run_penalty(list, nullptr, true, false) == static_cast<float>(expected), what);

  std::vector<Memory> grads = list.fresh_grads();
  EXPECT(run_penalty(list, &grads, random_bits() % 2 == 0) == expected, what);
  list.expect_grads(grads, 1, what);

  for (const bool keep_if_one : {false, true}) {
    for (const double upstream : {1.0, 0.37}) {
      grads = list.fresh_grads();
      Call call{};
      const std::vector<unsigned char> bytes = list.table(&grads, random_bits() % 2 == 0, &call);
      const float upstream32 = static_cast<float>(upstream);
      const bool wide = random_bits() % 2 == 0;
      call.upstream = wide ? static_cast<const void*>(&upstream) : &upstream32;
      call.upstream_source = wide ? Source::kFloat64 : Source::kFloat32;
      call.keep_if_one = keep_if_one;
      EXPECT(launch_list(Kernel::kGradient, call, bytes) == cudaSuccess);
      if (keep_if_one && upstream == 1) {
        for (const Memory& grad : grads) {
          EXPECT(std::all_of(grad.block.begin(), grad.block.end(), [](unsigned char c) { return c == kUntouched; }),
                 what);
        }
      } else {
        list.expect_grads(grads, wide ? upstream : upstream32, what);
      }
    }
  }
}

void expect_term_sums(std::vector<Tensor> tensors, const std::string& what) {
  for (Tensor& t : tensors) {
    t.l1 = t.l2 = 1;
  }
  List list(std::move(tensors));
  Call call{};
  const std::vector<unsigned char> bytes = list.table(nullptr, false, &call);
  std::vector<ChunkSums> chunk_sums(call.chunks, {std::nan(""), std::nan("")});
  std::vector<ChunkSums> out(call.tensors, {std::nan(""), std::nan("")});
  call.chunk_sums = chunk_sums.data();
  EXPECT(launch_term_sums(call, bytes.data(), out.data(), nullptr) == cudaSuccess);
  for (size_t t = 0; t < list.tensors().size(); ++t) {
    const std::vector<ChunkSums> sums = list.expected_sums(t);
    const auto count = static_cast<int64_t>(sums.size());
    EXPECT(out[t].l1 == column_sum<kTensorColumns>(count, [&](int64_t c) { return sums[c].l1; }), what, t);
    EXPECT(out[t].l2 == column_sum<kTensorColumns>(count, [&](int64_t c) { return sums[c].l2; }), what, t);
  }
}

// Every element of a gradient is written by one CTA, once.
void expect_written_once() {
  std::vector<Tensor> tensors = {{Dtype::kFloat32, 3 * kChunkSize + 5},
                                 {Dtype::kBFloat16, 0},
                                 {Dtype::kFloat64, 1025, 1},
                                 {Dtype::kFloat16, kChunkSize - 1}};
  List list(tensors);
  std::vector<Memory> grads = list.fresh_grads();
  std::vector<std::vector<int>> writes;
  for (const Memory& grad : grads) {
    writes.emplace_back(grad.bytes);
  }
  cuda_on_host::multiprocessors = 100;
  cuda_on_host::after_cta = [&] {
    for (size_t t = 0; t < grads.size(); ++t) {
      for (size_t i = 0; i < grads[t].bytes; i += size_of(tensors[t].dtype)) {
        unsigned char* const element = grads[t].begin + i;
        if (std::any_of(element, element + size_of(tensors[t].dtype),
                        [](unsigned char c) { return c != kUntouched; })) {
          ++writes[t][i];
          std::fill(element, element + size_of(tensors[t].dtype), kUntouched);
        }
      }
    }
  };
  run_penalty(list, &grads, false);
  cuda_on_host::after_cta = [] {};
  for (size_t t = 0; t < grads.size(); ++t) {
    for (size_t i = 0; i < grads[t].bytes; i += size_of(tensors[t].dtype)) {
      EXPECT(writes[t][i] == 1, t, i, writes[t][i]);
    }
  }
}

void expect_special_values() {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double special : {inf, -inf, std::nan("")}) {
    for (const double l1 : {0.0, 0.5}) {
      List list({{Dtype::kFloat64, 5000, 0, 0, l1, 0.0}, {Dtype::kFloat64, 70, 0, 0, l1, 0.25}});
      Call call{};
      std::vector<unsigned char> bytes = list.table(nullptr, false, &call);
      auto* const entries = reinterpret_cast<Entry*>(bytes.data());
      std::memcpy(const_cast<void*>(entries[0].param), &special, sizeof special);
      const double value = run_penalty(list, nullptr, false);
      EXPECT(l1 == 0               ? std::isfinite(value)
             : std::isnan(special) ? std::isnan(value)
                                   : value == inf,
             special, l1, value);
    }
  }
}

void expect_errors_come_out() {
  List list({{Dtype::kFloat32, 10}});
  Call call{};
  const std::vector<unsigned char> bytes = list.table(nullptr, false, &call);
  cuda_on_host::launch_error = cudaErrorNoKernelImageForDevice;
  EXPECT(launch(Kernel::kPenalty, call, bytes.data(), bytes.size(), nullptr) == cudaErrorNoKernelImageForDevice);
  EXPECT(upload(nullptr, bytes.data(), bytes.size(), nullptr) == cudaErrorNoKernelImageForDevice);
  EXPECT(launch_term_sums(call, bytes.data(), nullptr, nullptr) == cudaErrorNoKernelImageForDevice);
  cuda_on_host::launch_error = cudaSuccess;
}

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

}  // namespace

int main(int argc, char**) {
  const bool quick = argc > 1;  // under a sanitizer
  const int k = kChunkSize;
  for (const Dtype dtype : kDtypes) {
    for (const int64_t size :
         {1, 2, 15, 17, 63, 64, 65, 1023, 1024, 1025, 4095, 4097, 16 * 1023, k - 1, k, k + 1, 2 * k + 1}) {
      expect_list({{dtype, size}}, "one tensor of " + std::to_string(size));
    }
    for (int offset = 0; offset < 16; offset += quick ? 5 : 1) {
      expect_list({{dtype, 2500, offset, 0}, {dtype, 2500, 0, offset}, {dtype, k + 9, offset, offset}}, "misaligned");
    }
    for (const auto& [l1, l2] : {std::pair{0.1, 0.0}, {0.0, 0.1}, {0.0, 0.0}, {1e-50, 1e-50}, {1e30, 1e-30}}) {
      expect_list({{dtype, 3000, 0, 0, l1, l2}, {dtype, 3000, 1, 0, l1, l2}}, "terms");
    }
    expect_list({{dtype, 0}, {dtype, 100}, {dtype, 0}, {dtype, k}, {dtype, 0}, {dtype, 0}}, "empty tensors");
    expect_list({{dtype, 100, 0, 0, 0.1, 0.2, false}, {dtype, k + 1}, {dtype, 300, 0, 0, 0.1, 0.2, false}},
                "no gradient");
  }
  for (int i = 0; i < (quick ? 2 : 20); ++i) {
    std::vector<Tensor> tensors(1 + random_bits() % 12);
    for (Tensor& t : tensors) {
      t = {kDtypes[random_bits() % 4],
           static_cast<int64_t>(random_bits() % (random_bits() % 2 == 0 ? 100 : 3 * k)),
           static_cast<int>(random_bits() % 3),
           static_cast<int>(random_bits() % 3),
           0.1 * (random_bits() % 4),
           0.1 * (random_bits() % 4),
           random_bits() % 4 != 0};
    }
    tensors[0].size += 1;
    expect_list(tensors, "random list");
    expect_term_sums(tensors, "random list");
  }

  // Around the limits of the tables: 24 bytes a tensor, and 16 a pair of strengths.
  const size_t small = (kSmallTable - sizeof(StrengthPair)) / sizeof(Entry);
  const size_t large = (kLargeTable - sizeof(StrengthPair)) / sizeof(Entry);
  const size_t large_with_strengths = kLargeTable / (sizeof(Entry) + sizeof(StrengthPair));
  EXPECT(small >= 161 && large >= 1000 && large_with_strengths >= 800, small, large);
  for (const size_t limit : {small, large, large_with_strengths}) {
    for (const size_t count : {limit, limit + 1}) {
      std::vector<Tensor> tensors(count, Tensor{Dtype::kFloat32, 64});
      for (Tensor& t : tensors) {
        t.size = static_cast<int64_t>(random_bits() % 4 == 0 ? 0 : random_bits() % 130);
      }
      if (limit == large_with_strengths) {
        for (Tensor& t : tensors) {
          t.l1 = 0.1 * (random_bits() % 4);
        }
      }
      expect_list(tensors, std::to_string(count) + " tensors");
    }
  }
  std::vector<Tensor> many(quick ? 3000 : 10000, Tensor{Dtype::kBFloat16, 3});
  many.back().size = 0;
  many.front().l2 = 0.7;
  expect_list(many, "10,000 tensors");
  expect_term_sums(many, "10,000 tensors");
  expect_term_sums(std::vector<Tensor>(80, Tensor{Dtype::kFloat32, k + 1}), "a warp has several tensors");
  expect_term_sums({{Dtype::kFloat32, 40 * k + 7}, {Dtype::kFloat32, 0}}, "more chunks than columns");
  expect_list({{Dtype::kBFloat16, (quick ? 3 : 150) * k + 7}}, "more groups than columns");
  expect_written_once();
  expect_special_values();
  expect_errors_come_out();
  EXPECT((architectures == std::vector<int>{750, 900}));
  return fused_reg::testing::report();
}
