// Compensated sums against exact ones, for content that plain float64 sums get wrong; the trees of a chunk; the runs;
// squares of chunks whose exponents differ.
#include <cmath>
#include <limits>
#include <vector>

#include "expect.h"
#include "summation.h"

using namespace fused_reg;

namespace {

double sum(const std::vector<double>& x) {
  CompensatedSum s{};
  for (const double v : x) {
    s.add(v);
  }
  return result(s);
}

template <int columns>
double sum_in_columns(const std::vector<double>& x) {
  return column_sum<columns>(static_cast<int64_t>(x.size()), [&](int64_t i) { return x[i]; });
}

// Every place of a chunk counts once: each in its own bit, which float64 adds without rounding.
void expect_total_counts_each_place_once() {
  for (int count = 0; count <= kBlocks; ++count) {
    for (int lane = 0; lane < kFoldedLanes; ++lane) {
      BlockSums blocks[kBlocks] = {};
      for (int b = 0; b < kBlocks; ++b) {
        blocks[b].lanes[lane] = b < count ? std::ldexp(1.0, b) : std::nan("");  // what is missing is not read
      }
      if (count == 0) {
        blocks[0] = {};
      }
      for (int other = 0; other < kFoldedLanes; ++other) {
        for (int b = 0; b < count; ++b) {
          blocks[b].lanes[other] = other == lane ? blocks[b].lanes[other] : 0;
        }
      }
      EXPECT(total(blocks, count) == std::ldexp(1.0, count) - 1, count, lane);
    }
  }
}

void expect_runs() {
  for (const int64_t chunks :
       {int64_t{0}, int64_t{1}, kMaxRuns, kMaxRuns + 1, 2 * kMaxRuns, 2 * kMaxRuns + 1, int64_t{1} << 40}) {
    const int64_t size = run_length(chunks);
    EXPECT((size & (size - 1)) == 0, chunks, size);
    EXPECT((chunks + size - 1) / size <= kMaxRuns, chunks, size);
    EXPECT(size == 1 || (chunks + size / 2 - 1) / (size / 2) > kMaxRuns, chunks, size);
  }
}

void expect_squares() {
  const auto sums_of = [](double l1, double l2, int exponent) {
    ChunkSums sums{};
    sums.of[L1::kSum] = {l1, exponent};
    sums.of[L2::kSum] = {l2, exponent};
    return sums;
  };
  const ChunkSums one = sums_of(7, 3, kRescueExponent);
  EXPECT(squares_of(&one, 1).sum == 3 && squares_of(&one, 1).exponent == kRescueExponent);
  std::vector<ChunkSums> equal(100, sums_of(7, 0.1, -kRescueExponent));
  EXPECT(squares_of(equal.data(), 100).sum == sum_in_columns<kTensorColumns>(std::vector<double>(100, 0.1)));
  EXPECT(squares_of(equal.data(), 100).exponent == -kRescueExponent);
  std::vector<ChunkSums> mixed(70, sums_of(7, 0x1p-900, 0));
  mixed[5] = sums_of(7, 1, 300);
  mixed[40] = sums_of(7, 0, -kRescueExponent);
  const ScaledSum total = squares_of(mixed.data(), 70);
  EXPECT(total.exponent == 300 && total.sum == 1, total.sum);
  mixed[5] = sums_of(7, 1, -400);  // 2^-800 against 68 of 2^-900
  EXPECT(squares_of(mixed.data(), 70).exponent == 0);
  EXPECT(squares_of(mixed.data(), 70).sum == 0x1p-800 + 68 * 0x1p-900);
  const TermSums sums = unscaled(sums_of(3, 5, -400));
  EXPECT(sums.of[L1::kSum] == 3 * 0x1p-400 && sums.of[L2::kSum] == 5 * 0x1p-800);
}

}  // namespace

int main() {
  for (const int count : {0, 1, 2, 3, 31, 32, 33, 127, 128, 129, 300}) {
    std::vector<double> ones(count, 1);
    EXPECT(sum_in_columns<kColumns>(ones) == count, count);
    EXPECT(sum_in_columns<kTensorColumns>(ones) == count, count);
  }
  std::vector<double> hard(1000, 0.1);
  hard[3] = 1e100;
  hard[950] = -1e100;  // in another column: only the errors know the rest
  EXPECT(std::abs(sum_in_columns<kColumns>(hard) - 99.8) < 1e-13, sum_in_columns<kColumns>(hard));
  EXPECT(sum_in_columns<kColumns>({1, std::numeric_limits<double>::infinity()}) == INFINITY);
  expect_total_counts_each_place_once();
  expect_runs();
  expect_squares();

  EXPECT(sum({}) == 0);
  EXPECT(sum({1e16, 1, 1, 1, 1}) == 1e16 + 4);               // plain: 1e16
  EXPECT(sum({1, 1e100, 1, -1e100}) == 2);                   // plain: 0
  EXPECT(sum({0.1, 0.2, 0.3, -0.6}) == std::ldexp(1, -55));  // plain: 1.1e-16
  EXPECT(sum(std::vector<double>(1000000, 0.1)) == 100000);  // plain: 100000.00000133288

  const double inf = std::numeric_limits<double>::infinity();
  EXPECT(sum({1, inf, 2}) == inf);
  EXPECT(std::isnan(sum({inf, -inf})));
  EXPECT(std::isnan(sum({1, std::nan(""), 2})));
  EXPECT(sum({1e308, 1e308}) == inf);
  return fused_reg::testing::report();
}
