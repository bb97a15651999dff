// Groups that are rows of a tensor, for the CUDA kernels on the host: their norms, and the penalty.
#pragma once

#include "cuda_list.h"

namespace fused_reg::cuda {

// Rows of one tensor, by warps, against those of the CPU's kernel one by one.
inline void expect_rows(Dtype dtype, int64_t rows, int64_t size, int offset, double l1) {
  List list({{dtype, rows * size, offset, 0, l1, 0.25}});
  const double norm_strength = 0.5;
  Call call{};
  std::vector<unsigned char> bytes = list.table(nullptr, false, &call, false, {1, kGroupNumbers});
  Entry entry;
  std::memcpy(&entry, bytes.data(), sizeof entry);
  entry.tail = static_cast<uint16_t>(size);
  std::memcpy(bytes.data(), &entry, sizeof entry);
  NumberRef strength;
  strength.value = norm_strength;
  std::memcpy(bytes.data() + bytes.size() - (kGroupNumbers - kNormStrength) * sizeof strength, &strength,
              sizeof strength);
  const GroupInfo info{size, 0, 0};
  const auto* const begin = reinterpret_cast<const unsigned char*>(&info);
  bytes.insert(bytes.end(), begin, begin + sizeof info);
  call.chunks = static_cast<uint32_t>(rows);
  call.run_length = static_cast<uint32_t>(run_length(rows));
  call.runs = (call.chunks + call.run_length - 1) / call.run_length;
  call.team = 1;
  std::vector<double> norms(rows + 1, std::nan("")), run_sums(call.runs, std::nan(""));
  double value = std::nan("");
  unsigned arrivals = 0;
  call.norms = norms.data();
  call.run_sums = run_sums.data();
  call.value = &value;
  call.value_is_float64 = true;
  call.arrivals = &arrivals;
  EXPECT(launch(Pass::kPenalty, call, bytes.data(), bytes.size(), nullptr) == cudaSuccess);

  std::vector<double> penalties;
  for (int64_t row = 0; row < rows; ++row) {
    ChunkTask task{};
    task.dtype = dtype;
    task.pass = Pass::kPenalty;
    task.streams[0] = list.param(0) + row * size * size_of(dtype);
    task.size = size;
    task.numbers.of[kL1Strength] = l1;
    task.numbers.of[kL2Strength] = 0.25;
    task.numbers.terms = terms_of(task.numbers.of);
    TaskSums sums;
    kernels_baseline.run(task, &sums);
    const ChunkSums of_row = sums.of(0);
    const ScaledSum& squares = of_row.of[L2::kSum];
    EXPECT(norms[row] == norm_of(squares), size, row, norms[row], norm_of(squares));
    penalties.push_back(SummedTerms::penalty(task.numbers.of, of_row.of) + norm_penalty(norm_strength, squares));
  }
  EXPECT(std::isnan(norms.back()), size, "written outside");
  const double expected = column_sum<kColumns>(call.runs, [&](int64_t r) {
    CompensatedSum sum{};
    for (int64_t row = r * call.run_length; row < std::min<int64_t>((r + 1) * call.run_length, rows); ++row) {
      sum.add(penalties[row]);
    }
    return result(sum);
  });
  EXPECT(value == expected, size, value, expected);
}

}  // namespace fused_reg::cuda
