// Shapes and dtypes without data: what meta tensors, FakeTensorMode and torch.compile run.
#include "../operators.h"

namespace fused_reg {

namespace {

using Tensors = std::vector<at::Tensor>;

struct Meta {
  static std::tuple<at::Tensor, Tensors, Tensors> penalty(at::TensorList params, const c10::List<bool>& needs_grad,
                                                          FUSED_REG_NUMBERS) {
    at::Tensor value = value_of(params);
    Tensors grads, all_norms;
    for (const auto t : c10::irange(needs_grad.empty() ? 0 : params.size())) {
      if (needs_grad[t]) {
        grads.push_back(at::empty_like(params[t]));
      }
    }
    if (group != 0) {
      all_norms.push_back(norms(params, floats, tensors, counts, group));
    }
    return {std::move(value), std::move(grads), std::move(all_norms)};
  }

  static Tensors penalty_grad(const at::Tensor&, at::TensorList params, const c10::List<bool>&, const OptionalTensor&,
                              c10::SymIntArrayRef, FUSED_REG_NUMBERS) {
    return empty_grads(params);
  }

  static void rescale_grad_(const at::Tensor&, at::TensorList, at::TensorList, const c10::List<bool>&,
                            const OptionalTensor&, c10::SymIntArrayRef, FUSED_REG_NUMBERS) {}

  static at::Tensor accumulate_grad_(at::TensorList params, at::TensorList, at::IntArrayRef, double,
                                     const OptionalTensor&, FUSED_REG_NUMBERS) {
    return value_of(params);
  }

  static Tensors empty_grads(at::TensorList params) {
    check(params);
    Tensors grads;
    for (const at::Tensor& p : params) {
      grads.push_back(at::empty_like(p));
    }
    return grads;
  }

  static at::Tensor numbers(const at::Tensor& like, Floats values) {
    return at::empty({static_cast<int64_t>(values.size())}, like.options().dtype(at::kDouble));
  }

  static void prox_(at::TensorList params, const OptionalTensor&, c10::SymIntArrayRef, FUSED_REG_NUMBERS) {
    check(params);
  }

  static at::Tensor step_(at::TensorList params, at::TensorList, at::TensorList, at::TensorList, const c10::List<bool>&,
                          int64_t, int64_t, Floats, const OptionalTensor&, const OptionalTensor&, FUSED_REG_NUMBERS) {
    check(params);
    return at::empty({}, params[0].options().dtype(at::kDouble));
  }

  static at::Tensor norms(at::TensorList params, FUSED_REG_NUMBERS) {
    check(params);
    c10::SymInt count = 0;
    for (const at::Tensor& p : params) {
      const int64_t d = sliced_dim(p, static_cast<Grouping>(group));
      if (p.sym_numel() != 0) {
        const bool is_whole = d < 0 && kind_of(static_cast<Grouping>(group)) != Grouping::kBlock;
        const c10::SymInt size = d < 0 ? p.sym_numel() : p.sym_size(d);
        count += is_whole ? c10::SymInt(1) : size / group_length(static_cast<Grouping>(group));
      }
    }
    return at::empty_symint({count}, params[0].options().dtype(at::kDouble));
  }

  static at::Tensor sums(at::TensorList params, bool with_zeros, FUSED_REG_NUMBERS) {
    check(params);
    const int64_t columns = with_zeros ? kSums + 1 : kSums;
    return at::empty({static_cast<int64_t>(params.size()), columns}, params[0].options().dtype(at::kDouble));
  }

 private:
  static void check(at::TensorList params) {
    check_params(params);
    // A strength on the meta device brings a call here whose parameters have data.
    TORCH_CHECK_VALUE(params[0].is_meta(), "strengths must be on the CPU or on the parameters' device (",
                      params[0].device(), "), got meta");
  }

  static at::Tensor value_of(at::TensorList params) {
    check(params);
    return at::empty({}, params[0].options().dtype(value_dtype(params)));
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_reg, Meta, m) { register_operators<Meta>(m); }

}  // namespace fused_reg
