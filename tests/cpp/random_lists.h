// Random lists of tensors, and the numbers that go with them.
#pragma once

#include <ATen/ATen.h>

#include <random>
#include <vector>

#include "numbers.h"
#include "summation.h"

namespace fused_reg {

using Tensors = std::vector<at::Tensor>;

inline std::mt19937_64 random_bits(0);

inline int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % n); }
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}
inline at::ScalarType any_dtype() {
  constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};
  return kDtypes[below(4)];
}

// A NaN may have any bits, except where its form is promised.
inline bool same_bits(const at::Tensor& a, const at::Tensor& b, bool nan_too = false) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes() || a.strides() != b.strides()) {
    return false;
  }
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  if (nan_too || !x.is_floating_point()) {
    return x.numel() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
  }
  const at::ScalarType bits = x.element_size() == 8 ? at::kLong : x.element_size() == 4 ? at::kInt : at::kShort;
  return (x.view(bits).eq(y.view(bits)) | (x.isnan() & y.isnan())).all().item<bool>();
}

// How the elements of a list are drawn.
enum class Content { kNormal, kSparse, kExtreme, kAnyBits };

inline at::Tensor draw(at::IntArrayRef shape, at::ScalarType dtype, Content content) {
  const int64_t offset = below(3) == 0 ? below(16) : 0;  // from an address aligned to 64 bytes
  int64_t size = 1;
  for (const int64_t n : shape) {
    size *= n;
  }
  at::Tensor memory = at::empty({size + offset}, dtype);
  if (content == Content::kAnyBits) {
    auto* const bytes = static_cast<unsigned char*>(memory.mutable_data_ptr());
    std::generate_n(bytes, memory.nbytes(), [] { return static_cast<unsigned char>(random_bits()); });
  } else {
    memory.normal_();
    if (content == Content::kSparse) {
      memory.mul_(at::empty_like(memory).uniform_().gt(0.7));
    }
    if (content == Content::kExtreme) {
      memory.mul_(std::pow(10.0, dtype == at::kDouble  ? uniform(-320, 307)
                                 : dtype == at::kFloat ? uniform(-40, 37)
                                                       : uniform(-6, 3)));
    }
  }
  at::Tensor t = memory.narrow(0, offset, size).view(shape);
  return t.dim() == 2 && below(4) == 0 ? t.t() : t;
}

inline std::vector<int64_t> any_shape() {
  constexpr int64_t k = kChunkSize;
  constexpr int64_t kBorders[] = {1, 2, 63, 64, 65, 1023, 1024, 1025, k - 1, k, k + 1, 2 * k + 1};
  switch (below(8)) {
    case 0:
      return {};
    case 1:
      return {0, 3};
    case 2:
      return {kBorders[below(12)]};
    case 3:
      return {1 + below(3), kBorders[below(12)]};
    case 4:
      return {kBorders[below(6)], 1 + below(4)};
    case 5:
      return {1 + below(40), 1 + below(200)};
    case 6:
      return {1 + below(6), 1 + below(5), 1 + below(4), 1 + below(3)};
    default:
      return {below(3 * k)};
  }
}

inline Tensors any_list(Content content, int64_t count) {
  Tensors list;
  const bool mixed = below(2) == 0;
  const at::ScalarType one = any_dtype();
  for (int64_t t = 0; t < count; ++t) {
    list.push_back(draw(any_shape(), mixed ? any_dtype() : one, content));
  }
  return list;
}

// Copies of the same layout, at the same alignment.
inline Tensors copies(const Tensors& list) {
  Tensors out;
  for (const at::Tensor& t : list) {
    const int64_t offset = t.storage_offset();
    at::Tensor memory = at::empty({offset + t.numel()}, t.scalar_type());
    out.push_back(memory.as_strided(t.sizes(), t.strides(), offset).copy_(t));
  }
  return out;
}

// The numbers of a list as an operator takes them: each column floats, or a tensor, which the kernel reads from its
// address.
struct Given {
  std::vector<double> floats;
  Tensors tensors;
  std::vector<int64_t> counts;
  int64_t group = 0;

  static Given of(std::vector<double> strengths, Grouping group = Grouping::kNone) {
    Given given;
    given.group = static_cast<int64_t>(group);
    given.floats = std::move(strengths);
    given.counts.assign(given.floats.size(), 1);
    given.counts.resize(kNumbers);
    if (group == Grouping::kNone && given.floats.size() > kNormStrength) {  // its place is not used
      given.floats.erase(given.floats.begin() + kNormStrength);
      given.counts[kNormStrength] = 0;
    }
    return given;
  }

  // Those of an optimizer's step.
  static Given any_step(size_t count) {
    Given given;
    for (int column = 0; column < kNumbers; ++column) {
      if (column == kL1Strength || column == kL2Strength || column == kStep) {
        given.add_any(count, column);
      } else {
        given.counts.push_back(0);
      }
    }
    return given;
  }

  // With a tensor in the place of one.
  static Given with_tensor(std::vector<double> strengths, int column, const at::Tensor& tensor) {
    Given given = of(std::move(strengths));
    given.floats.erase(given.floats.begin() + column - (column > kNormStrength));
    given.counts[column] = kIsTensor;
    given.tensors.push_back(tensor);
    return given;
  }

  static Given any(size_t count) {
    Given given;
    for (int column = 0; column < kNumbers; ++column) {
      given.add_any(count, column);
    }
    given.group = given.counts[kNormStrength] == 0 ? 0 : 1 + below(3);
    return given;
  }

  // Reference weights, importances, or both, of each parameter, laid out in any way.
  void add_references(const Tensors& list) {
    const int64_t kinds = group != 0 ? 1 : 1 + below(3);
    for (const int64_t kind : {1, 2}) {
      counts.push_back(kinds & kind ? list.size() : 0);
      for (const at::Tensor& t : list) {
        if (kinds & kind) {
          at::Tensor own = below(2) == 0 ? at::empty_like(t).normal_() : at::randn(t.sizes(), t.scalar_type());
          tensors.push_back(kind == 2 ? own.abs() : own);
        }
      }
    }
  }

 private:
  void add_any(size_t count, int column) {
    const int64_t kind = below(column == kStep ? 4 : 5);
    const NumberRule rule = rule_of(column);
    const double least = rule.is_above ? 1.5 * rule.least + 0.01 : 0;
    if (kind == 4) {
      counts.push_back(0);
      return;
    }
    std::vector<double> values;
    for (size_t i = 0; i < (kind % 2 == 0 ? 1 : count); ++i) {
      values.push_back(least + (below(5) == 0 ? 0 : std::pow(10.0, uniform(-6, 2))));
    }
    if (kind < 2) {
      counts.push_back(values.size());
      floats.insert(floats.end(), values.begin(), values.end());
      return;
    }
    counts.push_back(kIsTensor);
    at::Tensor tensor = at::tensor(values, at::kDouble).to(any_dtype());
    if (kind == 2) {
      tensor = tensor.squeeze(0);
    } else if (below(2) == 0) {
      tensor = at::stack({tensor, tensor}, 1).select(1, 0);  // strided
    }
    tensors.push_back(tensor);
  }
};

#define GIVEN(s) s.floats, s.tensors, s.counts, s.group

}  // namespace fused_reg
