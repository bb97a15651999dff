// The CUDA kernels and their launches, on the host (cuda_on_host/): against the CPU's kernels, bit for bit, and against
// long double; every element of a gradient written once, and nothing beside it.
#include <cmath>
#include <limits>
#include <string>

#include "cuda_list.h"
#include "cuda_rows.h"
#include "expect.h"
#include "six_streams.h"

using namespace fused_reg;
using namespace fused_reg::cuda;

namespace {

// Launches, from a copy of a long table in "device memory".
cudaError_t launch_list(Pass pass, const Call& call, const std::vector<unsigned char>& bytes) {
  if (bytes.size() <= kLargeTable) {
    return launch(pass, call, bytes.data(), bytes.size(), nullptr);
  }
  std::vector<unsigned char> memory((bytes.size() + 15) / 16 * 16 + kGuard, kUntouched);
  EXPECT(upload(memory.data(), bytes.data(), bytes.size(), nullptr) == cudaSuccess);
  EXPECT(std::equal(bytes.begin(), bytes.end(), memory.begin()));
  EXPECT(std::all_of(memory.end() - kGuard, memory.end(), [](unsigned char c) { return c == kUntouched; }));
  return launch(pass, call, memory.data(), bytes.size(), nullptr);
}

// With a scale: by the kernel that may add to gradients.
double run_penalty(List& list, std::vector<Memory>* grads, bool on_device, bool as_float64 = true,
                   const double* scale = nullptr) {
  Call call{};
  const std::vector<unsigned char> bytes = list.table(grads, on_device, &call, scale != nullptr);
  std::vector<double> run_sums(call.runs, std::nan(""));
  double value = std::nan("");
  float value32 = 0;
  call.run_sums = run_sums.data();
  call.value = as_float64 ? static_cast<void*>(&value) : &value32;
  call.value_is_float64 = as_float64;
  unsigned arrivals = 0;
  call.arrivals = &arrivals;
  cuda_on_host::launches = 0;
  if (scale != nullptr && on_device) {
    call.factor.address = scale;
    call.factor_source = Source::kFloat64;
  } else if (scale != nullptr) {
    call.factor.value = *scale;
  }
  EXPECT(launch_list(scale == nullptr ? Pass::kPenaltyGradient : Pass::kPenaltyAccumulate, call, bytes) == cudaSuccess);
  const size_t uploads = bytes.size() <= kLargeTable ? 0 : (bytes.size() + sizeof(Piece) - 1) / sizeof(Piece);
  EXPECT(cuda_on_host::launches == 1 + static_cast<int>(uploads));
  EXPECT(arrivals == 0, "the counter is ready for the next launch");
  return as_float64 ? value : value32;
}

void expect_list(std::vector<Tensor> tensors, const std::string& what) {
  List list(std::move(tensors));
  const double expected = list.expected_penalty();
  const long double exact = list.exact_penalty();
  EXPECT(std::abs(expected - exact) <= 3.6e-15L * exact, what, expected,
         static_cast<double>((expected - exact) / exact));
  // Fewer CTAs than runs of chunks, or one for each.
  cuda_on_host::multiprocessors = random_bits() % 4 == 0 ? 100 : 1 + static_cast<int>(random_bits() % 2);

  const double value = run_penalty(list, nullptr, false);
  EXPECT(std::memcmp(&value, &expected, sizeof value) == 0, what, value, expected);
  EXPECT(run_penalty(list, nullptr, true, false) == static_cast<float>(expected), what);

  std::vector<Memory> grads = list.fresh_grads();
  EXPECT(run_penalty(list, &grads, random_bits() % 2 == 0) == expected, what);
  list.expect_grads(grads, 1, what);

  const double scale = random_bits() % 2 == 0 ? 1 : 0.37;
  grads = list.fresh_grads();
  list.fill_grads(&grads);
  std::vector<Memory> before = list.fresh_grads();
  for (size_t t = 0; t < grads.size(); ++t) {
    std::copy_n(grads[t].begin, grads[t].bytes, before[t].begin);
  }
  EXPECT(run_penalty(list, &grads, random_bits() % 2 == 0, true, &scale) == expected, what);
  list.expect_grads(grads, scale, what + ", accumulated", &before);

  for (const bool keep_if_one : {false, true}) {
    for (const double upstream : {1.0, 0.37}) {
      grads = list.fresh_grads();
      Call call{};
      const std::vector<unsigned char> bytes = list.table(&grads, random_bits() % 2 == 0, &call);
      const float upstream32 = static_cast<float>(upstream);
      const bool wide = random_bits() % 2 == 0;
      call.factor.address = wide ? static_cast<const void*>(&upstream) : &upstream32;
      call.factor_source = wide ? Source::kFloat64 : Source::kFloat32;
      call.keep_if_one = keep_if_one;
      EXPECT(launch_list(Pass::kGradient, call, bytes) == cudaSuccess);
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

void expect_tensor_sums(std::vector<Tensor> tensors, const std::string& what) {
  for (Tensor& t : tensors) {
    t.l1 = t.l2 = 1;
  }
  List list(std::move(tensors));
  Call call{};
  const std::vector<unsigned char> bytes = list.table(nullptr, false, &call, false, rows_of(Pass::kPenalty));
  std::vector<TermSums> chunk_sums(call.chunks, TermSums{std::nan(""), std::nan("")});
  std::vector<TermSums> out(call.tensors, TermSums{std::nan(""), std::nan("")});
  std::vector<TermSums> zeros(call.tensors, TermSums{std::nan(""), std::nan("")});
  call.chunk_sums = chunk_sums.data();
  EXPECT(launch_tensor_sums(Pass::kPenalty, call, bytes.data(), out.data(), nullptr) == cudaSuccess);
  EXPECT(launch_tensor_sums(Pass::kZeros, call, bytes.data(), zeros.data(), nullptr) == cudaSuccess);
  for (size_t t = 0; t < list.tensors().size(); ++t) {
    const std::vector<ChunkSums> sums = list.expected_sums(t);
    const auto count = static_cast<int64_t>(sums.size());
    for (int i = 0; i < kSums; ++i) {
      const double sum = column_sum<kTensorColumns>(count, [&](int64_t c) { return unscaled(sums[c]).of[i]; });
      EXPECT(out[t].of[i] == sum, what, t, i);
    }
    EXPECT(zeros[t].of[1] == list.zeros(t), what, t, zeros[t].of[1]);
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
  cuda_on_host::resident_ctas = 1;
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
  cuda_on_host::resident_ctas = 3;
  for (size_t t = 0; t < grads.size(); ++t) {
    for (size_t i = 0; i < grads[t].bytes; i += size_of(tensors[t].dtype)) {
      EXPECT(writes[t][i] == 1, t, i, writes[t][i]);
    }
  }
}

// Runs of several chunks, which end in other tensors than they begin.
void expect_long_runs() {
  std::vector<Tensor> tensors(kMaxRuns + 600, Tensor{Dtype::kFloat32, 2});
  for (size_t t = 0; t < tensors.size(); t += 100) {
    tensors[t].size = t % 400 == 0 ? 0 : 3;
  }
  tensors[501].size = 2 * kChunkSize + 1;
  List list(tensors);
  const double expected = list.expected_penalty();
  for (const int multiprocessors : {1, 1000}) {  // fewer CTAs than runs, and more
    cuda_on_host::multiprocessors = multiprocessors;
    const double value = run_penalty(list, nullptr, false);
    EXPECT(value == expected, multiprocessors, value, expected);
  }
}

// The sums of lanes by integers (exact_sums.cuh): where they say that they are exact they have the bits of float64, and
// they say so where no element is too small beside the others.
template <int limbs>
void expect_exact_sums(int bits_of_element) {
  const int spread = limbs == 1 ? 22 : 45;  // of the exponents, and of the bits
  int exact = 0, others = 0;
  for (int i = 0; i < 20000; ++i) {
    const int highest = i % 300 - 150, most = static_cast<int>(random_bits() % (i % 2 == 0 ? 200 : spread));
    float w[kRows];
    for (float& x : w) {
      const auto fraction = static_cast<double>(random_bits() % (1u << bits_of_element) | 1u << (bits_of_element - 1));
      const int exponent = highest - bits_of_element - static_cast<int>(random_bits() % (most + 1));
      x = random_bits() % 5 == 0 ? 0 : static_cast<float>(std::ldexp(fraction, exponent));
    }
    if (random_bits() % 100 == 0) {
      w[random_bits() % kRows] = random_bits() % 2 == 0 ? NAN : INFINITY;
    }
    double l1 = 0, l2 = 0, exact_l1 = -1, exact_l2 = -1;
    bool is_narrow = highest > -80 && highest < 127;
    for (const float x : w) {
      is_narrow = is_narrow && std::isfinite(x);
      l1 += x;
      l2 = std::fma(static_cast<double>(x), static_cast<double>(x), l2);
    }
    if (exact_sums<limbs, kRows>([&](int r) { return w[r]; }, &exact_l1, &exact_l2)) {
      ++exact;
      EXPECT(exact_l1 == l1 && (limbs == 2 || exact_l2 == l2), highest, most, exact_l1, l1, exact_l2, l2);
    } else {
      ++others;
      EXPECT(!is_narrow || most + bits_of_element > spread, highest, most);
    }
  }
  EXPECT(exact > 5000 && others > 1000, exact, others);
}

void expect_float64_of_bits() {
  for (int i = 0; i < 100000; ++i) {
    const auto bits = static_cast<uint32_t>(random_bits());
    const float x[2] = {bits_as<float>(i % 10 == 0   ? bits & 0x807fffff
                                       : i % 10 == 1 ? bits | 0x7f800000
                                                     : bits),
                        bits_as<float>(bits & 0x80000000)};
    double wide[2];
    widen(x, wide);
    for (int k = 0; k < 2; ++k) {
      EXPECT(bits_as<uint64_t>(wide[k]) == bits_as<uint64_t>(static_cast<double>(x[k])), x[k], wide[k]);
    }
  }
}

void expect_special_values() {
  const double inf = std::numeric_limits<double>::infinity();
  for (const double special : {inf, -inf, std::nan("")}) {
    for (const double l1 : {0.0, 0.5}) {
      List list({{Dtype::kFloat64, 5000, 0, 0, l1, 0.0}, {Dtype::kFloat64, 70, 0, 0, l1, 0.25}});
      std::memcpy(list.param(0), &special, sizeof special);
      const double value = run_penalty(list, nullptr, false);
      EXPECT(l1 == 0               ? std::isfinite(value)
             : std::isnan(special) ? std::isnan(value)
                                   : value == inf,
             special, l1, value);
      List narrow({{Dtype::kFloat32, 5000, 0, 0, l1, 0.25}});  // as float64, which may be made of its bits
      const auto element = static_cast<float>(special);
      std::memcpy(narrow.param(0), &element, sizeof element);
      const double sum = run_penalty(narrow, nullptr, false);
      EXPECT(std::isnan(special) ? std::isnan(sum) : sum == inf, special, l1, sum);
    }
  }
}

// Sums that leave the range of float64 are taken again, in the middle of a run.
void expect_rescue() {
  for (const double scale : {1e200, 1e-200, 1e307}) {
    for (const bool has_l1 : {false, true}) {
      const double l1 = has_l1 ? 1e-5 / scale : 0, l2 = scale > 1e300 ? 0 : scale > 1 ? 1e-300 : 1e300;
      List list({{Dtype::kFloat64, 2 * kChunkSize + 9, 0, 0, l1, l2}, {Dtype::kFloat32, 300}, {Dtype::kFloat64, 70}});
      auto* const elements = reinterpret_cast<double*>(list.param(0));
      for (int i = kChunkSize; i < 2 * kChunkSize; ++i) {
        elements[i] *= scale;
      }
      const double value = run_penalty(list, nullptr, false), expected = list.expected_penalty();
      EXPECT(value == expected && value > 0 && std::isfinite(value), scale, has_l1, value, expected);
      std::vector<Memory> grads = list.fresh_grads();
      EXPECT(run_penalty(list, &grads, true) == expected, scale, has_l1);
      list.expect_grads(grads, 1, "rescue");
    }
  }
}

void expect_errors_come_out() {
  List list({{Dtype::kFloat32, 10}});
  Call call{};
  const std::vector<unsigned char> bytes = list.table(nullptr, false, &call);
  cuda_on_host::launch_error = cudaErrorNoKernelImageForDevice;
  EXPECT(launch(Pass::kPenaltyGradient, call, bytes.data(), bytes.size(), nullptr) == cudaErrorNoKernelImageForDevice);
  EXPECT(upload(nullptr, bytes.data(), bytes.size(), nullptr) == cudaErrorNoKernelImageForDevice);
  EXPECT(launch_tensor_sums(Pass::kPenalty, call, bytes.data(), nullptr, nullptr) == cudaErrorNoKernelImageForDevice);
  cuda_on_host::launch_error = cudaSuccess;
}

void expect_six_streams() {
  for (const int size : {1, 100, 1025, kChunkSize, 2 * kChunkSize + 100}) {
    for (const int offset : {0, 1}) {
      List list({{Dtype::kFloat32, size}});
      constexpr int kOwn = 6;  // streams
      std::vector<float> before[kOwn], after[kOwn];
      Rows rows{1, kGroupNumbers};
      Call call{};
      std::vector<unsigned char> bytes = list.table(nullptr, false, &call, false, rows);
      std::vector<void*> streams;
      for (int s = 0; s < kOwn; ++s) {
        for (int i = 0; i < size + offset + 1; ++i) {
          before[s].push_back(static_cast<float>((i * 7 + s * 13) % 31));
        }
        after[s] = before[s];
        streams.push_back(after[s].data() + offset);
      }
      const auto* const begin = reinterpret_cast<const unsigned char*>(streams.data());
      bytes.erase(bytes.begin() + sizeof(Entry), bytes.begin() + sizeof(Entry) + sizeof(void*));
      bytes.insert(bytes.begin() + sizeof(Entry), begin, begin + kOwn * sizeof(void*));
      const DeviceTable table{call, bytes.data()};
      EXPECT(launch_on(2, nullptr, group_element_kernel<DeviceTable, SixStreamsPass, kNone, kGroupNumbers>, table) ==
             cudaSuccess);
      const auto& [a, b, c, d, e, f] = before;
      for (int i = offset; i < size + offset; ++i) {
        EXPECT(after[0][i] == a[i] && after[1][i] == b[i] && after[2][i] == c[i] + b[i] && after[3][i] == d[i] - c[i] &&
                   after[4][i] == e[i] + d[i] && after[5][i] == a[i] + e[i],
               size, i);
      }
      EXPECT(after[2].back() == c.back() && after[5].back() == f.back(), size, "written outside");
    }
  }
}

constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

}  // namespace

int main(int argc, char**) {
  const bool quick = cuda_on_host::kSanitized || cuda_on_host::kWatched || argc > 1;
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
  cuda_on_host::multiprocessors = 1;  // so that a warp has several rows
  for (const Dtype dtype : kDtypes) {
    for (const int64_t size : {1, 8, 60, 64, 100, 768, 1000, 1024, 1032}) {
      expect_rows(dtype, 50 + random_bits() % 40, size, 0, random_bits() % 2 == 0 ? 0 : 0.1);
      expect_rows(dtype, 1 + random_bits() % 20, size, random_bits() % 9, 0.1);
    }
  }
  expect_rows(Dtype::kBFloat16, kMaxRuns + 600, 8, 0, 0.1);
  for (int i = 0; i < (quick ? 2 : 20); ++i) {
    std::vector<Tensor> tensors(1 + random_bits() % 12);
    for (Tensor& t : tensors) {
      t = {kDtypes[random_bits() % 4],
           static_cast<int64_t>(random_bits() % (random_bits() % 2 == 0 ? 100 : 3 * k)),
           static_cast<int>(random_bits() % 3),
           static_cast<int>(random_bits() % 3),
           0.1 * (random_bits() % 4),
           0.1 * (random_bits() % 4),
           random_bits() % 4 != 0,
           random_bits() % 2 == 0};
    }
    tensors[0].size += 1;
    expect_list(tensors, "random list");
    expect_tensor_sums(tensors, "random list");
  }

  // Around the limits of the tables: 24 bytes a tensor, and 16 its two strengths.
  const size_t small = (kSmallTable - kTermNumbers * sizeof(NumberRef)) / kEntryBytes;
  const size_t medium = (kMediumTable - kTermNumbers * sizeof(NumberRef)) / kEntryBytes;
  const size_t large = (kLargeTable - kTermNumbers * sizeof(NumberRef)) / kEntryBytes;
  const size_t large_with_strengths = kLargeTable / (kEntryBytes + kTermNumbers * sizeof(NumberRef));
  EXPECT(small >= 161 && medium == 507 && large == 1360 && large_with_strengths == 816, small, medium, large);
  for (const size_t limit : {small, medium, large, large_with_strengths}) {
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
  expect_tensor_sums(many, "10,000 tensors");
  expect_tensor_sums(std::vector<Tensor>(80, Tensor{Dtype::kFloat32, k + 1}), "a warp has several tensors");
  expect_tensor_sums({{Dtype::kFloat32, 40 * k + 7}, {Dtype::kFloat32, 0}}, "more chunks than columns");
  expect_list({{Dtype::kBFloat16, (quick ? 3 : 150) * k + 7}}, "more runs than columns");
  expect_six_streams();
  expect_written_once();
  expect_long_runs();
  expect_special_values();
  expect_exact_sums<1>(8);
  expect_exact_sums<1>(11);
  expect_exact_sums<2>(24);
  expect_float64_of_bits();
  expect_rescue();
  expect_errors_come_out();
  EXPECT(architectures() == "7.5 9.0");
  return fused_reg::testing::report();
}
