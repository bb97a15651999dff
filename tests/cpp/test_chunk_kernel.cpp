// The chunk kernel of every instruction set that this CPU has: sums against long double, the same bits from all
// of them, and nothing written outside the gradient.
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/chunk_kernel.h"
#include "expect.h"

using namespace fused_reg;

namespace {

struct Variant {
  std::string name;
  ChunkKernel kernel;
};

std::vector<Variant> variants() {
  std::vector<Variant> out = {{"baseline", chunk_kernel_baseline}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    out.push_back({"avx2", chunk_kernel_avx2});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    out.push_back({"avx512", chunk_kernel_avx512});
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

Output run(ChunkKernel kernel, ChunkTask task, const std::vector<char>& param, size_t offset) {
  const size_t bytes = task.size * bytes_of(task.dtype);
  std::vector<char> memory(offset + bytes), grad(bytes + 2 * kGuardBytes + offset, kGuard);
  std::memcpy(memory.data() + offset, param.data(), bytes);
  task.param = memory.data() + offset;
  task.out = grad.data() + kGuardBytes + offset;
  Output out{kernel(task), {}};
  const char* begin = grad.data() + kGuardBytes + offset;
  out.grad.assign(begin, begin + bytes);
  for (size_t i = 0; i < kGuardBytes; ++i) {
    EXPECT(*(begin - 1 - i) == kGuard && *(begin + bytes + i) == kGuard, "written outside", i);
  }
  if (task.pass == Pass::kSums) {
    EXPECT(out.grad == std::vector<char>(bytes, kGuard), "a pass without gradient wrote one");
  }
  return out;
}

bool same_bits(double a, double b) { return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0; }

void expect_sums(const Variant& variant, const ChunkTask& task, const std::vector<char>& param, const ChunkSums& sums) {
  long double l1 = 0, l2 = 0;
  for (int64_t i = 0; i < task.size; ++i) {
    const long double w = element(task.dtype, &param[i * bytes_of(task.dtype)]);
    l1 += std::abs(w * task.l1_scale);
    l2 += w * task.l2_scale * w * task.l2_scale;
  }
  const auto close = [](double x, long double expected) { return std::abs(x - expected) <= 3e-15L * expected; };
  EXPECT(!(task.terms & kL1) || close(sums.l1, l1), variant.name, task.size, sums.l1, static_cast<double>(l1));
  EXPECT(!(task.terms & kL2) || close(sums.l2, l2), variant.name, task.size, sums.l2, static_cast<double>(l2));
}

}  // namespace

int main() {
  const std::vector<Variant> all = variants();
  for (const Variant& variant : all) {
    std::printf("%s\n", variant.name.c_str());
  }
  std::mt19937_64 random(0);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const int64_t size : {1,   2,   3,   15,  16,   17,   31,   33,   63,   64,    65,    127,
                               128, 129, 255, 257, 1023, 1024, 1025, 2048, 4099, 16320, 16383, 16384}) {
      for (const bool any_bits : {false, true}) {
        const std::vector<char> param = random_bits(dtype, size, any_bits, random);
        for (const Terms terms : {kNone, kL1, kL2, kL1L2}) {
          for (const Pass pass : {Pass::kSums, Pass::kSumsAndGradient, Pass::kGradient}) {
            ChunkTask task{};
            task.dtype = dtype;
            task.terms = terms;
            task.pass = pass;
            task.size = size;
            task.l1_scale = dtype == Dtype::kFloat64 ? 0.25 : 1;
            task.l2_scale = dtype == Dtype::kFloat64 ? 2 : 1;
            task.c1 = 0.1f;
            task.c2 = 0.3f;
            const Output first = run(all[0].kernel, task, param, 0);
            if (!any_bits && pass != Pass::kGradient) {
              expect_sums(all[0], task, param, first.sums);
            }
            for (const Variant& variant : all) {
              const size_t offset = (random() % 16) * bytes_of(dtype);
              const Output out = run(variant.kernel, task, param, offset);
              EXPECT(same_bits(out.sums.l1, first.sums.l1) && same_bits(out.sums.l2, first.sums.l2), variant.name,
                     size);
              if (!any_bits) {  // a NaN may have any bits
                EXPECT(out.grad == first.grad, variant.name, size, static_cast<int>(dtype), static_cast<int>(terms));
              }
            }
          }
        }
      }
    }
  }
  return fused_reg::testing::report();
}
