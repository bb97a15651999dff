// Numbers and strengths as the kernels take them: values, or the addresses of numbers on the device.
#pragma once

#include <vector>

#include "../numbers.h"
#include "../torch_compat.h"
#include "table.h"

namespace fused_reg::cuda {

// A tensor on the device as the kernels read it.
inline at::Tensor readable(const at::Tensor& t) {
  check_strength_memory(t);
  return is_supported(t.scalar_type()) ? t : t.to(at::kDouble);
}

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

inline NumberRef ref_to(const at::Tensor& t, int64_t element) {
  NumberRef ref;
  ref.address = static_cast<const char*>(t.const_data_ptr()) + element * t.element_size();
  return ref;
}

// The column of a selection.
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
    tensor_ = readable(*arg.tensor);
    source_ = source_of(dtype_of(tensor_));
    if (tensor_.numel() == 1) {
      refs_.push_back(ref_to(tensor_, 0));
      return;
    }
    for (const size_t place : selection.places) {
      refs_.push_back(ref_to(tensor_, place * tensor_.stride(0)));
    }
  }

  Source source() const { return source_; }
  bool is_one() const { return refs_.size() == 1; }
  NumberRef operator[](size_t t) const { return refs_[is_one() ? 0 : t]; }

 private:
  at::Tensor tensor_;
  Source source_ = Source::kValue;
  std::vector<NumberRef> refs_;
};

// What gradients are multiplied by.
class NumberArgRef {
 public:
  NumberArgRef(const NumberArg& arg, at::Device device) : ref_{arg.value} {
    if (!arg.tensor.has_value()) {
      return;
    }
    if (arg.tensor->device() != device) {
      ref_.value = arg.tensor->item<double>();
      return;
    }
    tensor_ = readable(*arg.tensor);
    source_ = source_of(dtype_of(tensor_));
    ref_ = ref_to(tensor_, 0);
  }

  NumberRef ref() const { return ref_; }
  Source source() const { return source_; }

  // The host knows that it is this.
  bool is(double value) const { return source_ == Source::kValue && ref_.value == value; }

 private:
  at::Tensor tensor_;
  Source source_ = Source::kValue;
  NumberRef ref_;
};

}  // namespace fused_reg::cuda
