// The CUDA backend of the operators in ops.cpp.
#include <ATen/ATen.h>
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstring>
#include <vector>

#include "../chunks.h"
#include "../strengths.h"
#include "check_launch.h"
#include "kernels.h"
#include "stream_state.h"

namespace fused_reg::cuda {

namespace {

using Floats = at::ArrayRef<double>;
using OptionalTensor = std::optional<at::Tensor>;

// The strengths of a selection: values, or the addresses of numbers on the device, which the kernel reads.
class StrengthRefs {
 public:
  StrengthRefs(const StrengthArg& arg, const Selection& selection) {
    if (!arg.tensor.has_value() || arg.tensor->is_cpu()) {
      const Strength values(arg, selection);
      for (const auto t : c10::irange(values.is_one() ? 1 : selection.places.size())) {
        refs_.push_back({values[t]});
      }
      return;
    }
    check_strength(arg.name, arg.tensor->numel(), selection.list);
    check_strength_memory(*arg.tensor);
    tensor_ = is_supported(arg.tensor->scalar_type()) ? *arg.tensor : arg.tensor->to(at::kDouble);
    source_ = static_cast<Source>(dtype_of(tensor_));
    const auto* const first = static_cast<const char*>(tensor_.const_data_ptr());
    const auto ref = [&](size_t place) {
      StrengthRef r;
      r.address = first + (tensor_.dim() == 0 ? 0 : place * tensor_.stride(0) * tensor_.element_size());
      return r;
    };
    if (tensor_.numel() == 1) {
      refs_.push_back(ref(0));
      return;
    }
    for (const size_t place : selection.places) {
      refs_.push_back(ref(place));
    }
  }

  Source source() const { return source_; }
  bool is_one() const { return refs_.size() == 1; }
  StrengthRef operator[](size_t t) const { return refs_[is_one() ? 0 : t]; }

 private:
  at::Tensor tensor_;
  Source source_ = Source::kValue;
  std::vector<StrengthRef> refs_;
};

// One pass over a list of CUDA tensors: their table, and its launch.
class ListPass {
 public:
  ListPass(at::TensorList params, const Selection& selection, const StrengthArg& l1, const StrengthArg& l2)
      : device_(checked_device(params, l1, l2)),
        guard_(device_),
        launch_(next_launch()),
        l1_(l1, selection),
        l2_(l2, selection) {
    dense_.reserve(params.size());
    std::vector<int64_t> sizes;
    sizes.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      check_memory(t, params[t]);
      // One run of memory, its elements in any order: the parameter itself if it is dense, else a copy.
      dense_.push_back(params[t].is_non_overlapping_and_dense() ? params[t] : params[t].clone());
      sizes.push_back(dense_[t].numel());
    }
    const ChunkPlan plan(sizes);
    TORCH_CHECK_VALUE(plan.chunks() < int64_t{1} << 31, "params must have less than 2^45 elements in all");
    entries_.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      const int64_t before_last = plan.first_chunk(t + 1) - plan.first_chunk(t) - 1;
      Entry e{};
      e.param = dense_[t].const_data_ptr();
      e.first_chunk = static_cast<uint32_t>(plan.first_chunk(t));
      e.tail = static_cast<uint16_t>(sizes[t] - before_last * kChunkSize);
      e.dtype = dtype_of(dense_[t]);
      entries_.push_back(e);
      any_float64_ |= e.dtype == Dtype::kFloat64;
    }
    call_.tensors = static_cast<uint32_t>(params.size());
    call_.chunks = static_cast<uint32_t>(plan.chunks());
    call_.run_length = static_cast<uint32_t>(run_length(plan.chunks()));
    call_.runs = (call_.chunks + call_.run_length - 1) / call_.run_length;
    call_.l1_source = l1_.source();
    call_.l2_source = l2_.source();
    call_.strength_per_tensor = !l1_.is_one() || !l2_.is_one();
  }

  // Memory for the gradient of parameter t, not yet written, with the strides of the parameter.
  at::Tensor fresh_grad(size_t t) const {
    return at::detail::empty_strided_cuda(dense_[t].sizes(), dense_[t].strides(), dense_[t].scalar_type(), device_);
  }

  // The launch shall write the gradient of parameter t. The layout is fresh_grad's.
  void write_grad(size_t t, const at::Tensor& grad) {
    check_grad(t, grad, dense_[t]);
    entries_[t].grad = grad.mutable_data_ptr();
  }

  // The penalty, 0-dim, float64 if any parameter is, else float32; and every gradient that write_grad() asked for.
  at::Tensor run_penalty() {
    const at::ScalarType dtype = any_float64_ ? at::kDouble : at::kFloat;
    if (call_.chunks == 0) {
      return at::zeros({}, at::TensorOptions(device_).dtype(dtype));
    }
    at::Tensor value = at::detail::empty_cuda({}, dtype, device_, std::nullopt);
    const at::Tensor run_sums = scratch(call_.runs);
    call_.run_sums = run_sums.mutable_data_ptr<double>();
    call_.value = value.mutable_data_ptr();
    call_.value_is_float64 = any_float64_;
    call_.ticket = ticket_for(launch_);
    run(Kernel::kPenalty);
    return value;
  }

  // The gradients for this upstream gradient; if keep_if_one, they are there already for 1.
  void run_gradient(const at::Tensor& upstream, bool keep_if_one) {
    TORCH_CHECK_VALUE(upstream.device() == device_ && upstream.numel() == 1,
                      "upstream must be one number on the parameters' device");
    if (call_.chunks == 0) {
      return;
    }
    call_.upstream = upstream.const_data_ptr();
    call_.upstream_source = static_cast<Source>(dtype_of(upstream));
    call_.keep_if_one = keep_if_one;
    run(Kernel::kGradient);
  }

  // [tensors, 2] float64: the sums of |w| and of w^2.
  at::Tensor run_term_sums() {
    at::Tensor out = at::detail::empty_cuda({call_.tensors, 2}, at::kDouble, device_, std::nullopt);
    const at::Tensor chunk_sums = scratch(2 * int64_t{call_.chunks});
    call_.chunk_sums = reinterpret_cast<ChunkSums*>(chunk_sums.mutable_data_ptr<double>());
    const at::Tensor table = device_table(table_bytes(), launch_);
    check_launch(launch_term_sums(call_, table.const_data_ptr(),
                                  reinterpret_cast<ChunkSums*>(out.mutable_data_ptr<double>()), launch_.stream),
                 device_);
    return out;
  }

 private:
  static at::Device checked_device(at::TensorList params, const StrengthArg& l1, const StrengthArg& l2) {
    check_params(params);
    for (const StrengthArg* const strength : {&l1, &l2}) {
      if (strength->tensor.has_value()) {  // which may have brought a call here whose parameters are elsewhere
        check_strength_device(*strength->tensor, params[0].device());
      }
    }
    return params[0].device();
  }

  at::Tensor scratch(int64_t doubles) const {
    return at::detail::empty_cuda({doubles}, at::kDouble, device_, std::nullopt);
  }

  std::vector<unsigned char> table_bytes() const {
    std::vector<StrengthPair> strengths;
    for (const auto t : c10::irange(call_.strength_per_tensor ? entries_.size() : 1)) {
      strengths.push_back({l1_[t], l2_[t]});
    }
    const size_t entries_size = entries_.size() * sizeof(Entry),
                 strengths_size = strengths.size() * sizeof(StrengthPair);
    std::vector<unsigned char> bytes(entries_size + strengths_size);
    std::memcpy(bytes.data(), entries_.data(), entries_size);
    std::memcpy(bytes.data() + entries_size, strengths.data(), strengths_size);
    return bytes;
  }

  void run(Kernel kernel) {
    const std::vector<unsigned char> bytes = table_bytes();
    if (bytes.size() <= kLargeTable) {
      check_launch(launch(kernel, call_, bytes.data(), bytes.size(), launch_.stream), device_);
    } else {
      const at::Tensor table = device_table(bytes, launch_);
      check_launch(launch(kernel, call_, table.const_data_ptr(), bytes.size(), launch_.stream), device_);
    }
  }

  at::Device device_;
  c10::cuda::CUDAGuard guard_;
  Launch launch_;
  StrengthRefs l1_, l2_;
  std::vector<at::Tensor> dense_;
  std::vector<Entry> entries_;
  Call call_{};
  bool any_float64_ = false;
};

at::Tensor penalty(at::TensorList params, Floats l1, Floats l2, const OptionalTensor& l1_tensor,
                   const OptionalTensor& l2_tensor) {
  ListPass pass(params, all_of(params.size()), {"l1", l1, l1_tensor}, {"l2", l2, l2_tensor});
  return pass.run_penalty();
}

std::tuple<at::Tensor, std::vector<at::Tensor>> penalty_and_grad(at::TensorList params,
                                                                 const c10::List<bool>& needs_grad, Floats l1,
                                                                 Floats l2, const OptionalTensor& l1_tensor,
                                                                 const OptionalTensor& l2_tensor) {
  ListPass pass(params, all_of(params.size()), {"l1", l1, l1_tensor}, {"l2", l2, l2_tensor});
  check_needs_grad(needs_grad.size(), params.size());
  std::vector<at::Tensor> grads;
  grads.reserve(params.size());
  for (const auto t : c10::irange(params.size())) {
    if (needs_grad[t]) {
      grads.push_back(pass.fresh_grad(t));
      pass.write_grad(t, grads.back());
    }
  }
  at::Tensor value = pass.run_penalty();
  return {std::move(value), std::move(grads)};
}

std::vector<at::Tensor> penalty_grad(const at::Tensor& upstream, at::TensorList params,
                                     const c10::List<bool>& needs_grad, Floats l1, Floats l2,
                                     const OptionalTensor& l1_tensor, const OptionalTensor& l2_tensor) {
  ListPass pass(params, selection_of(needs_grad, params.size()), {"l1", l1, l1_tensor}, {"l2", l2, l2_tensor});
  std::vector<at::Tensor> grads;
  grads.reserve(params.size());
  for (const auto t : c10::irange(params.size())) {
    grads.push_back(pass.fresh_grad(t));
    pass.write_grad(t, grads.back());
  }
  pass.run_gradient(upstream, /*keep_if_one=*/false);
  return grads;
}

void rescale_grad_(const at::Tensor& upstream, at::TensorList params, at::TensorList grads,
                   const c10::List<bool>& needs_grad, Floats l1, Floats l2, const OptionalTensor& l1_tensor,
                   const OptionalTensor& l2_tensor) {
  ListPass pass(params, selection_of(needs_grad, params.size()), {"l1", l1, l1_tensor}, {"l2", l2, l2_tensor});
  check_grads(grads.size(), params.size());
  for (const auto t : c10::irange(params.size())) {
    pass.write_grad(t, grads[t]);
  }
  pass.run_gradient(upstream, /*keep_if_one=*/true);
}

at::Tensor term_sums(at::TensorList params) {
  const double one = 1;
  ListPass pass(params, all_of(params.size()), {"l1", one, std::nullopt}, {"l2", one, std::nullopt});
  return pass.run_term_sums();
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_reg, CUDA, m) {
  m.impl("penalty", TORCH_FN(penalty));
  m.impl("penalty_and_grad", TORCH_FN(penalty_and_grad));
  m.impl("penalty_grad", TORCH_FN(penalty_grad));
  m.impl("rescale_grad_", TORCH_FN(rescale_grad_));
  m.impl("term_sums", TORCH_FN(term_sums));
}

}  // namespace fused_reg::cuda
