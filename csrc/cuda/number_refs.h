// Numbers and strengths as the kernels take them: values, or the addresses of numbers on the device.
#pragma once

#include <vector>

#include "../numbers.h"
#include "../torch_compat.h"
#include "table.h"

namespace fused_reg::cuda {

inline Source source_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return Source::kFloat32;
    case Dtype::kFloat64:
      return Source::kFloat64;
    case Dtype::kBFloat16:
      return Source::kBFloat16;
    case Dtype::kFloat16:
      return Source::kFloat16;
  }
  TORCH_INTERNAL_ASSERT(false, "no Source for this Dtype");
}

// The column of a selection, or one number for all: what gradients are multiplied by.
class ColumnRefs {
 public:
  ColumnRefs() : refs_{NumberRef{0}} {}  // 0 for all

  ColumnRefs(const ColumnArg& arg, const Selection& selection, at::Device device) {
    if (arg.tensor == nullptr || arg.tensor->device() != device) {
      const HostColumn values(arg, selection);
      for (const auto t : c10::irange(values.is_one() ? 1 : selection.places.size())) {
        refs_.push_back({values[t]});
      }
      return;
    }
    check_strength(arg.name, arg.tensor->numel(), selection.list);
    take(*arg.tensor);
    if (tensor_.numel() == 1) {
      refer_to(0);
      return;
    }
    for (const size_t place : selection.places) {
      refer_to(place * tensor_.stride(0));
    }
  }

  ColumnRefs(const NumberArg& arg, at::Device device) {
    if (arg.tensor.has_value() && arg.tensor->device() == device) {
      take(*arg.tensor);
      refer_to(0);
    } else {
      refs_.push_back({arg.tensor.has_value() ? arg.tensor->item<double>() : arg.value});
    }
  }

  Source source() const { return source_; }
  bool is_one() const { return refs_.size() == 1; }
  NumberRef operator[](size_t t) const { return refs_[is_one() ? 0 : t]; }

  // The host knows that it is this.
  bool is(double value) const { return source_ == Source::kValue && refs_[0].value == value; }

 private:
  void take(const at::Tensor& on_device) {
    check_strength_memory(on_device);
    tensor_ = is_supported(on_device.scalar_type()) ? on_device : on_device.to(at::kDouble);
    source_ = source_of(dtype_of(tensor_));
  }

  void refer_to(int64_t element) {
    NumberRef ref;
    ref.address = static_cast<const char*>(tensor_.const_data_ptr()) + element * tensor_.element_size();
    refs_.push_back(ref);
  }

  at::Tensor tensor_;
  Source source_ = Source::kValue;
  std::vector<NumberRef> refs_;
};

}  // namespace fused_reg::cuda
