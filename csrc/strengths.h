// The strengths of a list, read on the host.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

#include "checks.h"

namespace fused_reg {

class Strength {
 public:
  Strength(const char* name, at::ArrayRef<double> floats, const std::optional<at::Tensor>& tensor, size_t params)
      : values_(floats.vec()) {
    if (tensor.has_value()) {
      const at::Tensor host = tensor->to(at::kCPU, at::kDouble).contiguous();
      values_.assign(host.const_data_ptr<double>(), host.const_data_ptr<double>() + host.numel());
    }
    check_strength(name, values_.size(), params);
  }

  double operator[](size_t t) const { return values_.empty() ? 0 : values_[values_.size() == 1 ? 0 : t]; }

 private:
  std::vector<double> values_;
};

struct Strengths {
  Strength l1, l2;
};

}  // namespace fused_reg
