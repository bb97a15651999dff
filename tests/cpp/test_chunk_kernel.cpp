// The chunk kernel of every instruction set that this CPU has: sums against long double, the same bits from all
// of them, and nothing written outside the gradient.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define FUSED_REG_ISA six_streams
#define FUSED_REG_VECTOR_BYTES 16
#include "cpu/chunk_kernel_impl.h"
#include "expect.h"
#include "six_streams.h"

using namespace fused_reg;

namespace {

struct Variant {
  std::string name;
  Kernels kernels;

  // Of a task that is one chunk.
  ChunkSums sums(const ChunkTask& task) const {
    TaskSums sums{};
    kernels.run(task, &sums);
    return sums.of(0);
  }
};

std::vector<Variant> variants() {
  std::vector<Variant> out = {{"baseline", kernels_baseline}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.push_back({"avx2", kernels_avx2});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    out.push_back({"avx512", kernels_avx512});
  }
#endif
  return out;
}

size_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Random bits are random numbers of every size: subnormals, infinities and NaN among them.
std::vector<char> random_bits(Dtype dtype, int64_t size, bool any_bits, std::mt19937_64& random) {
  std::vector<char> out(size * bytes_of(dtype));
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < size; ++i) {
    const double x = normal(random);
    const float f = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint64_t word = random();
    if (!any_bits) {
      word = dtype == Dtype::kBFloat16 ? bits >> 16 : word & 0xbfff;  // float16: below 2 in size
    }
    if (dtype == Dtype::kFloat64 && !any_bits) {
      std::memcpy(&out[8 * i], &x, 8);
    } else if (dtype == Dtype::kFloat32 && !any_bits) {
      std::memcpy(&out[4 * i], &f, 4);
    } else {
      std::memcpy(&out[i * bytes_of(dtype)], &word, bytes_of(dtype));
    }
  }
  return out;
}

long double element(Dtype dtype, const char* p) {
  if (dtype == Dtype::kFloat64) {
    double x;
    std::memcpy(&x, p, 8);
    return x;
  }
  if (dtype == Dtype::kFloat32) {
    float x;
    std::memcpy(&x, p, 4);
    return x;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  if (dtype == Dtype::kBFloat16) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const long double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -size : size;
}

struct Output {
  ChunkSums sums;
  std::vector<char> grad;
};

constexpr char kGuard = 0x5a;
constexpr size_t kGuardBytes = 64;

bool writes(Pass pass) { return pass != Pass::kPenalty && pass != Pass::kSoftSquares && pass != Pass::kZeros; }
bool accumulates(Pass pass) { return pass == Pass::kPenaltyAccumulate || pass == Pass::kAccumulate; }

// `before`: what a pass that accumulates finds.
Output run(const Variant& variant, ChunkTask task, const std::vector<char>& param, const std::vector<char>& before,
           size_t offset) {
  const size_t bytes = task.size * bytes_of(task.dtype);
  std::vector<char> memory(offset + bytes), grad(bytes + 2 * kGuardBytes + offset, kGuard);
  std::memcpy(memory.data() + offset, param.data(), bytes);
  char* const written = grad.data() + kGuardBytes + offset;
  task.streams[0] = task.pass == Pass::kProx ? written : memory.data() + offset;
  task.streams[1] = written;
  if (accumulates(task.pass) || task.pass == Pass::kProx) {
    std::memcpy(written, accumulates(task.pass) ? before.data() : param.data(), bytes);
  }
  Output out{variant.sums(task), {}};
  const char* begin = written;
  out.grad.assign(begin, begin + bytes);
  for (size_t i = 0; i < kGuardBytes; ++i) {
    EXPECT(*(begin - 1 - i) == kGuard && *(begin + bytes + i) == kGuard, "written outside", i);
  }
  if (!writes(task.pass)) {
    EXPECT(out.grad == std::vector<char>(bytes, kGuard), "a pass without gradient wrote one");
  }
  return out;
}

bool same_bits(double a, double b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0; }

bool same(const ScaledSum& a, const ScaledSum& b) { return same_bits(a.sum, b.sum) && a.exponent == b.exponent; }

// The sums of a pass, element by element.
void expect_sums(const Variant& variant, const ChunkTask& task, const std::vector<char>& param, const ChunkSums& sums) {
  const double wide = task.numbers.of[kStep] * task.numbers.of[kL1Strength];
  const double threshold = task.dtype == Dtype::kFloat64 ? wide : static_cast<float>(wide);
  long double l1 = 0, l2 = 0;
  for (int64_t i = 0; i < task.size; ++i) {
    const long double w = element(task.dtype, &param[i * bytes_of(task.dtype)]);
    const long double soft = std::max(std::abs(w) - threshold, 0.0L);
    l1 += std::abs(w);
    l2 += task.pass == Pass::kZeros ? w == 0 : task.pass == Pass::kSoftSquares ? soft * soft : w * w;
  }
  long double smooth = 0;
  for (int64_t i = 0; i < task.size; ++i) {
    const long double w = element(task.dtype, &param[i * bytes_of(task.dtype)]), beta = task.numbers.of[kBeta];
    smooth += std::abs(w) < beta ? w * w / (2 * beta) : std::abs(w) - beta / 2;
  }
  const auto concave = [&](double strength, double shape, double knee) {
    long double sum = 0;
    for (int64_t i = 0; i < task.size; ++i) {
      const long double w = element(task.dtype, &param[i * bytes_of(task.dtype)]);
      const long double m = std::min(std::abs(w), static_cast<long double>(strength * shape));
      sum += m - std::pow(std::max(m - knee, 0.0L), 2) / (2 * (strength * shape - knee));
    }
    return sum;
  };
  const bool has_l1 = task.pass <= Pass::kPenaltyAccumulate && (task.numbers.terms & kL1);
  const bool has_l2 = task.pass <= Pass::kPenaltyAccumulate ? task.numbers.terms & kL2 : true;
  // A threshold is subtracted in the compute type, float32 for all but float64.
  const long double bound = task.pass == Pass::kSoftSquares && task.dtype != Dtype::kFloat64 ? 1e-6L : 3e-15L;
  const auto close = [&](double x, long double expected) { return std::abs(x - expected) <= bound * expected; };
  const auto scaled = [&](long double x, int degree) { return std::ldexp(x, -degree * sums.of[1].exponent); };
  EXPECT(!has_l1 || close(sums.of[0].sum, scaled(l1, 1)), variant.name, task.size, sums.of[0].sum,
         static_cast<double>(l1));
  const bool has_smooth = task.pass <= Pass::kPenaltyAccumulate && (task.numbers.terms & kSmoothL1);
  const ScaledSum& of_smooth = sums.of[SmoothL1::kSum];
  EXPECT(!has_smooth || close(of_smooth.sum, std::ldexp(smooth, -of_smooth.exponent)), variant.name, task.size);
  const auto expect_concave = [&](Terms bit, const ScaledSum& of, Number strength, Number shape, int knee) {
    const double height = task.numbers.of[strength];
    const long double sum = concave(height, task.numbers.of[shape], knee * height);
    EXPECT(!(task.pass <= Pass::kPenaltyAccumulate && (task.numbers.terms & bit)) ||
               close(of.sum, std::ldexp(sum, -of.exponent)),
           variant.name, task.size, of.sum, static_cast<double>(sum));
  };
  expect_concave(kMcp, sums.of[Mcp::kSum], kMcpStrength, kMcpGamma, 0);
  expect_concave(kScad, sums.of[Scad::kSum], kScadStrength, kScadA, 1);
  EXPECT(!has_l2 || close(sums.of[1].sum, scaled(l2, 2)), variant.name, task.size, sums.of[1].sum,
         static_cast<double>(l2));
}

// Every pass of every variant on one chunk.
void check(const std::vector<Variant>& all, ChunkTask task, bool any_bits, std::mt19937_64& random) {
  std::vector<char> param = random_bits(task.dtype, task.size, any_bits, random);
  const std::vector<char> before = random_bits(task.dtype, task.size, any_bits, random);
  std::fill_n(param.begin() + task.size / 2 * bytes_of(task.dtype), bytes_of(task.dtype), 0);  // a zero among them
  for (const Pass pass : {Pass::kPenalty, Pass::kPenaltyGradient, Pass::kPenaltyAccumulate, Pass::kGradient,
                          Pass::kAccumulate, Pass::kProx, Pass::kSoftSquares, Pass::kZeros}) {
    for (int terms = 0; terms <= kAllTerms; ++terms) {
      if ((terms & kNorm) && pass != Pass::kGradient && pass != Pass::kAccumulate) {
        continue;  // the gradient of a norm needs the norm first
      }
      if ((terms & kRelative) || ((terms & kFurther) != kNone && (terms & kFurther) != kFurther)) {
        continue;  // further terms: all or none
      }
      task.pass = pass;
      task.numbers.terms = terms;
      const Output first = run(all[0], task, param, before, 0);
      const bool sums = pass != Pass::kGradient && pass != Pass::kAccumulate && pass != Pass::kProx;
      if (!any_bits && sums) {
        expect_sums(all[0], task, param, first.sums);
      }
      for (const Variant& variant : all) {
        const size_t offset = (random() % 16) * bytes_of(task.dtype);
        const Output out = run(variant, task, param, before, offset);
        for (int k = 0; k < kSums; ++k) {
          EXPECT(same_bits(out.sums.of[k].sum, first.sums.of[k].sum) &&
                     out.sums.of[k].exponent == first.sums.of[k].exponent,
                 variant.name, task.size, k);
        }
        if (!any_bits) {  // a NaN may have any bits
          EXPECT(out.grad == first.grad, variant.name, task.size, static_cast<int>(task.dtype), terms,
                 static_cast<int>(pass));
        }
      }
    }
  }
}

// Relative terms: the same bits from every variant; those of plain terms, but for sums, from differences from 0 and
// importances of 1, also where a stream is not there; and sums element by element.
void check_relative(const std::vector<Variant>& all, ChunkTask task, std::mt19937_64& random) {
  const std::vector<char> param = random_bits(task.dtype, task.size, false, random);
  const std::vector<char> before = random_bits(task.dtype, task.size, false, random);
  std::vector<char> toward = random_bits(task.dtype, task.size, false, random);
  std::vector<char> importance = random_bits(task.dtype, task.size, false, random), zeros(param.size()), ones = zeros;
  for (int64_t i = 0; i < task.size; ++i) {
    const size_t bytes = bytes_of(task.dtype), end = (i + 1) * bytes;
    importance[end - 1] &= 0x7f;
    const double one = 1;
    const float narrow = 1;
    const uint16_t half = task.dtype == Dtype::kBFloat16 ? 0x3f80 : 0x3c00;
    std::memcpy(&ones[end - bytes], &half, std::min(bytes, sizeof half));
    std::memcpy(&ones[end - bytes], bytes == 4 ? static_cast<const void*>(&narrow) : &one, bytes > 2 ? bytes : 0);
  }
  for (const Pass pass : {Pass::kPenalty, Pass::kPenaltyGradient, Pass::kPenaltyAccumulate, Pass::kGradient,
                          Pass::kAccumulate, Pass::kProx, Pass::kSoftSquares}) {
    for (const int terms : {int{kL1}, int{kL2}, int{kL1L2}, kL1L2 | kFurther}) {
      task.pass = pass;
      task.numbers.terms = terms;
      if (pass == Pass::kProx) {  // whose terms are those of its numbers
        task.numbers.of[kSmoothL1Strength] = 0;
      }
      const Output plain = run(all[0], task, param, before, 0);
      for (const auto& [first, second] : {std::pair{&zeros, &ones},
                                          {static_cast<std::vector<char>*>(nullptr), &ones},
                                          {&zeros, static_cast<std::vector<char>*>(nullptr)},
                                          {&toward, &importance}}) {
        task.streams[kToward] = first == nullptr ? nullptr : first->data();
        task.streams[kImportance] = second == nullptr ? nullptr : second->data();
        const Output own = run(all[0], task, param, before, 0);
        EXPECT(first == &toward || pass == Pass::kProx || own.grad == plain.grad, task.size,
               static_cast<int>(task.dtype), terms, static_cast<int>(pass));
        for (const Variant& variant : all) {
          const Output out = run(variant, task, param, before, (random() % 16) * bytes_of(task.dtype));
          EXPECT(out.grad == own.grad, variant.name, task.size, static_cast<int>(task.dtype), terms,
                 static_cast<int>(pass));
          for (int k = 0; k < kSums; ++k) {
            EXPECT(
                same_bits(out.sums.of[k].sum, own.sums.of[k].sum) && out.sums.of[k].exponent == own.sums.of[k].exponent,
                variant.name, task.size, k);
          }
        }
      }
      if (pass <= Pass::kPenaltyAccumulate) {
        const ChunkSums sums = run(all[0], task, param, before, 0).sums;
        long double l1 = 0, l2 = 0;
        for (int64_t i = 0; i < task.size; ++i) {
          const auto at = [&](const std::vector<char>& x) { return element(task.dtype, &x[i * bytes_of(task.dtype)]); };
          const long double d = at(param) - at(toward);
          l1 += at(importance) * std::abs(d);
          l2 += at(importance) * d * d;
        }
        const ScaledSum &of_l1 = sums.of[0], &of_l2 = sums.of[1];
        EXPECT(std::abs(std::ldexp(static_cast<long double>(of_l1.sum), of_l1.exponent) - l1) <= 3e-15L * l1,
               task.size);
        EXPECT(std::abs(std::ldexp(static_cast<long double>(of_l2.sum), 2 * of_l2.exponent) - l2) <= 3e-15L * l2,
               task.size);
      }
      task.streams[kToward] = task.streams[kImportance] = nullptr;
    }
  }
}

// Sums that a double does not hold are taken again of scaled elements, in every pass that sums; others never.
void expect_rescue(const Variant& variant) {
  for (const int exponent : {1020, 800, 500, 0, -500, -800, -1070}) {
    const double w = std::ldexp(1.0, exponent);
    std::vector<double> param(4099, w), out(4099);
    ChunkTask task{};
    task.dtype = Dtype::kFloat64;
    task.size = 4099;
    task.streams[0] = param.data();
    task.streams[1] = out.data();
    for (const Pass pass : {Pass::kPenalty, Pass::kPenaltyGradient, Pass::kPenaltyAccumulate, Pass::kSoftSquares}) {
      for (const Terms terms : {kL1, kL2, kL1L2}) {
        task.pass = pass;
        task.numbers.terms = terms;
        const ChunkSums sums = variant.sums(task);
        const bool has_l2 = pass == Pass::kSoftSquares || (terms & kL2);
        const int expected =
            !has_l2 ? (exponent > 990) * kRescueExponent : ((exponent >= 500) - (exponent <= -500)) * kRescueExponent;
        EXPECT(sums.of[1].exponent == expected, variant.name, exponent, static_cast<int>(pass),
               static_cast<int>(terms));
        EXPECT(pass == Pass::kSoftSquares || !(terms & kL1) || sums.of[0].sum == 4099 * std::ldexp(w, -expected),
               exponent);
        EXPECT(!has_l2 || sums.of[1].sum == 4099 * std::pow(std::ldexp(w, -expected), 2), variant.name, exponent,
               sums.of[1].sum);
      }
    }
    for (const Pass pass : {Pass::kZeros, Pass::kGradient, Pass::kProx}) {
      task.pass = pass;
      EXPECT(variant.sums(task).of[1].exponent == 0, exponent);
    }
  }
}

// What rounds to a zero of a half type, or is one, is +0 after the proximal operator.
void expect_positive_zeros(const Variant& variant) {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat16}) {
    std::vector<uint16_t> out = {0x8000, 0, 0x8001, 1, 0x8003, 0x8400};
    ChunkTask task{};
    task.dtype = dtype;
    task.pass = Pass::kProx;
    task.size = static_cast<int64_t>(out.size());
    task.streams[0] = out.data();
    task.numbers.of[kL2Strength] = 0.75;  // shrinks to 0.4
    task.numbers.of[kStep] = 1;
    variant.kernels.run(task, nullptr);
    EXPECT((out == std::vector<uint16_t>{0, 0, 0, 0, 0x8001, static_cast<uint16_t>(out[5])}), variant.name, out[2]);
    EXPECT(out[5] > 0x8000, variant.name);
  }
}

// Some chunks at once, each with its norm, are what they are one by one.
void expect_together(const Variant& variant, std::mt19937_64& random) {
  constexpr int64_t kChunks = 19;
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const int64_t chunk : {5, 8, 16, 23, 32, 33, 63, 64, 65, 100, 448, 1023, 1500}) {
      for (const Pass pass : {Pass::kPenalty, Pass::kPenaltyGradient, Pass::kGradient, Pass::kAccumulate, Pass::kProx,
                              Pass::kSoftSquares}) {
        ChunkTask task{};
        task.dtype = dtype;
        task.pass = pass;
        const int64_t last = random() % 2 == 0 ? 5 : std::min<int64_t>(chunk, 16);
        task.size = (kChunks - 1) * chunk + last;
        task.chunk_size = chunk;
        task.numbers = {{0.2, 0.3, 0.35, 3, 0.4, 0.6, 0.3, 4, 0.25, 3.7, -0.9, 1.1}, 0.7, 2, kL1L2 | kFurther};
        task.numbers.terms |= pass == Pass::kGradient || pass == Pass::kAccumulate ? kNorm : kNone;
        std::vector<double> norms(kChunks);
        std::generate(norms.begin(), norms.end(), [&] { return 1 + static_cast<double>(random() % 8); });
        task.norms = norms.data();
        std::vector<char> streams[2], expected[2];
        for (int s = 0; s < 2; ++s) {
          streams[s] = random_bits(dtype, task.size, false, random);
          if (dtype == Dtype::kFloat64) {  // sums that leave the range of float64, to either side
            const double extremes[] = {1e200, 1e-200};
            std::fill_n(reinterpret_cast<double*>(streams[s].data()) + 3 * chunk, chunk, extremes[0]);
            std::fill_n(reinterpret_cast<double*>(streams[s].data()) + 11 * chunk, chunk, extremes[1]);
          }
          expected[s] = streams[s];
          task.streams[s] = streams[s].data();
        }
        TaskSums sums{};
        variant.kernels.run(task, &sums);
        for (int64_t c = 0; c < kChunks; ++c) {
          ChunkTask one = task;
          one.size = c == kChunks - 1 ? last : chunk;
          one.chunk_size = kChunkSize;
          one.norms = nullptr;
          one.numbers.norm = norms[c];
          for (int s = 0; s < 2; ++s) {
            one.streams[s] = expected[s].data() + c * chunk * bytes_of(dtype);
          }
          const ChunkSums of_one = variant.sums(one);
          for (int k = 0; k < kSums; ++k) {
            EXPECT(same(of_one.of[k], sums.of(k, c)), variant.name, static_cast<int>(pass), chunk, c, k);
          }
        }
        EXPECT(streams[0] == expected[0] && streams[1] == expected[1], variant.name, static_cast<int>(pass), chunk);
      }
    }
  }
}

// What follows on the sums of chunks is the maths of penalty.h and summation.h, number by number.
void expect_finished(const Variant& variant, std::mt19937_64& random) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
  std::uniform_real_distribution<double> uniform;
  for (const int kind : {0, 1, 2, 3}) {
    for (const double l1 : {0.0, 0.3}) {
      const double numbers[kNumbers] = {l1, 0.2, 0.7, 0, 0.4, 0.6, 0.3, 4, 0.25, 3.7, -0.9, 1.1};
      TaskSums sums{};
      sums.is_scaled = (kind & 1) != 0;
      sums.has_further = (kind & 2) != 0;
      ChunkSums of_chunks[kMaxVisit]{};
      for (int k = 0; k < kSums; ++k) {
        for (int c = 0; c < kMaxVisit; ++c) {
          sums.sum[k][c] = c == 5 ? kNan : c == 6 ? kInfinity : c == 7 ? 0 : uniform(random);
          sums.exponent[k][c] = c % 3 == 0 ? 0 : c % 3 == 1 ? kRescueExponent : -kRescueExponent;
          if (k < kPassSums || sums.has_further) {
            of_chunks[c].of[k] = {sums.sum[k][c], sums.is_scaled ? sums.exponent[k][c] : 0};
          }
        }
      }
      for (const int count : {1, 13, kMaxVisit}) {
        double norms[2][kMaxVisit]{}, penalties[kMaxVisit]{};
        variant.kernels.finish(numbers, count, sums, norms[0], penalties);
        variant.kernels.finish(numbers, count, sums, norms[1], nullptr);
        for (int c = 0; c < count; ++c) {
          const ScaledSum* const own = of_chunks[c].of;
          const double penalty =
              SummedTerms::penalty(numbers, own) + norm_penalty(numbers[kNormStrength], own[L2::kSum]);
          for (const auto& of : norms) {
            EXPECT(same_bits(of[c], norm_of(own[L2::kSum])), variant.name, kind, c);
          }
          EXPECT(same_bits(penalties[c], penalty) || (c == 5 && std::isnan(penalties[c])), variant.name, kind, c);
        }
      }
    }
  }
  for (const double last : {0.5, kInfinity, kNan}) {
    for (const int64_t length : {1, 4, 7}) {
      for (const int64_t runs : {1, 5, 8, 300}) {
        std::vector<double> penalties(length * runs), sums(runs), expected(runs);
        std::generate(penalties.begin(), penalties.end(), [&] { return std::ldexp(uniform(random), random() % 40); });
        penalties.back() = last;
        for (int64_t r = 0; r < runs; ++r) {
          CompensatedSum sum{};
          for (int64_t i = 0; i < length; ++i) {
            sum.add(penalties[r * length + i]);
          }
          expected[r] = result(sum);
        }
        variant.kernels.sum_runs(penalties.data(), length, runs, sums.data());
        EXPECT(std::equal(sums.begin(), sums.end(), expected.begin(), same_bits), variant.name, length, runs, last);
        const double sum = column_sum<kColumns>(runs, [&](int64_t i) { return expected[i]; });
        EXPECT(same_bits(variant.kernels.sum_columns(sums.data(), runs), sum), variant.name, runs, last);
      }
    }
  }
}

// So many chunks side by side are what they are one by one, and what is between their elements stays as it is.
void expect_across(const Variant& variant, int64_t chunks, int64_t apart, std::mt19937_64& random) {
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    const size_t bytes = bytes_of(dtype);
    for (const int64_t chunk : {1, 5, 8, 15, 16, 63, 64, 200, 1024, 2500}) {
      for (const Pass pass : {Pass::kPenalty, Pass::kGradient, Pass::kAccumulate, Pass::kProx, Pass::kSoftSquares}) {
        ChunkTask task{};
        task.dtype = dtype;
        task.pass = pass;
        task.size = chunks * chunk;
        task.chunk_size = chunk;
        task.numbers = {{0.2, 0.3, 0.35, 3, 0.4, 0.6, 0.3, 4, 0.25, 3.7, -0.9, 1.1}, 0.7, 2, kL1L2 | kFurther};
        task.numbers.terms |= pass == Pass::kGradient || pass == Pass::kAccumulate ? kNorm : kNone;
        std::vector<double> norms(chunks);
        std::generate(norms.begin(), norms.end(), [&] { return 1 + static_cast<double>(random() % 8); });
        task.norms = norms.data();
        std::vector<char> streams[2];
        for (int s = 0; s < 2; ++s) {
          streams[s] = random_bits(dtype, apart * (chunk - 1) + chunks, false, random);
          task.streams[s] = streams[s].data();
          task.apart[s] = apart;
        }
        const auto at = [&](int64_t i, int64_t c) { return (i * apart + c) * bytes; };
        if (dtype == Dtype::kFloat64 && chunks > 2) {  // sums that leave the range of float64, to either side
          const double extremes[] = {1e200, 1e-200};
          for (int64_t i = 0; i < chunk; ++i) {
            std::memcpy(streams[0].data() + at(i, 1), &extremes[0], bytes);
            std::memcpy(streams[0].data() + at(i, chunks - 1), &extremes[1], bytes);
          }
        }
        std::vector<char> expected[] = {streams[0], streams[1]};
        TaskSums sums{};
        const bool has_sums = pass == Pass::kPenalty || pass == Pass::kSoftSquares;
        variant.kernels.run(task, has_sums ? &sums : nullptr);
        for (int64_t c = 0; c < chunks; ++c) {
          ChunkTask one = task;
          one.size = chunk;
          one.chunk_size = kChunkSize;
          one.norms = nullptr;
          one.numbers.norm = norms[c];
          std::vector<char> run[2];
          for (int s = 0; s < 2; ++s) {
            run[s].resize(chunk * bytes);
            one.apart[s] = 0;
            for (int64_t i = 0; i < chunk; ++i) {
              std::memcpy(run[s].data() + i * bytes, expected[s].data() + at(i, c), bytes);
            }
            one.streams[s] = run[s].data();
          }
          TaskSums of_one{};
          variant.kernels.run(one, has_sums ? &of_one : nullptr);
          for (int k = 0; k < kSums; ++k) {
            EXPECT(same(of_one.of(k, 0), sums.of(k, c)), variant.name, static_cast<int>(pass), chunk, c, k);
          }
          for (int s = 0; s < 2; ++s) {
            for (int64_t i = 0; i < chunk; ++i) {
              std::memcpy(expected[s].data() + at(i, c), run[s].data() + i * bytes, bytes);
            }
          }
        }
        for (int s = 0; s < 2; ++s) {
          EXPECT(expected[s] == streams[s], variant.name, static_cast<int>(pass), chunks, apart, chunk, s);
        }
      }
    }
  }
}

void expect_six_streams() {
  for (const int size : {1, 16, 63, 64, 100, 1024, 1025, 16384}) {
    std::vector<float> streams[kStreams];
    ChunkTask task{};
    task.size = size;
    for (int s = 0; s < kStreams; ++s) {
      for (int i = 0; i < size + 1; ++i) {  // one more, which stays
        streams[s].push_back(static_cast<float>((i * 7 + s * 13) % 31));
      }
      task.streams[s] = streams[s].data();
    }
    const auto [a, b, c, d, e, f, g, h] = streams;
    six_streams::run_kernel<Dtype::kFloat32, SixStreamsPass<0>>(task, nullptr);
    for (int i = 0; i < size; ++i) {
      EXPECT(streams[0][i] == a[i] && streams[1][i] == b[i] && streams[2][i] == c[i] + b[i] &&
                 streams[3][i] == d[i] - c[i] && streams[4][i] == e[i] + d[i] && streams[5][i] == a[i] + e[i],
             size, i);
    }
    EXPECT(streams[2][size] == c[size] && streams[5][size] == f[size], size, "written outside");
    EXPECT(streams[6] == g && streams[7] == h, size, "another stream");
  }
}

}  // namespace

int main() {
  expect_six_streams();
  const std::vector<Variant> all = variants();
  std::mt19937_64 random(0);
  for (const Variant& variant : all) {
    std::printf("%s\n", variant.name.c_str());
    expect_rescue(variant);
    expect_positive_zeros(variant);
    for (const int64_t chunks : {2, 3, 4, 5, 8, 12, 16, 31, 37, 70}) {
      expect_across(variant, chunks, chunks, random);
    }
    expect_across(variant, 37, 64, random);
    expect_together(variant, random);
    expect_finished(variant, random);
  }
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const int64_t size : {1,   2,   3,   15,  16,   17,   31,   33,   63,   64,    65,    127,
                               128, 129, 255, 257, 1023, 1024, 1025, 2048, 4099, 16320, 16383, 16384}) {
      ChunkTask task{};
      task.dtype = dtype;
      task.size = size;
      task.numbers = {{0.2, 0.3, 0.35, 3, 0.4, 0.6, 0.3, 4, 0.25, 3.7, -0.9, 1.1}, 0.7, 2, kNone};
      check(all, task, /*any_bits=*/false, random);
      check(all, task, /*any_bits=*/true, random);
      check_relative(all, task, random);
    }
  }
  return fused_reg::testing::report();
}
