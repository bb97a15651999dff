// Shapes and dtypes without data: what meta tensors, FakeTensorMode and torch.compile run.

#include "../checks.h"
#include "../layout.h"
#include "../numbers.h"
#include "../registration.h"
#include "../torch_compat.h"

namespace fused_reg {

namespace {

using Tensors = std::vector<at::Tensor>;

struct Meta {
  static std::tuple<at::Tensor, Tensors, Tensors> penalty(at::TensorList params, const c10::List<bool>& needs_grad,
                                                          FUSED_REG_NUMBERS) {
    Tensors all_norms;
    if (group != 0) {
      all_norms.push_back(norms(params, floats, tensors, counts, group));
    }
    Tensors grads = like(params, [&](size_t t) { return !needs_grad.empty() && needs_grad[t]; });
    return {value(params), std::move(grads), std::move(all_norms)};
  }

  static Tensors penalty_grad(const at::Tensor&, at::TensorList params, const c10::List<bool>&, const OptionalTensor&,
                              c10::SymIntArrayRef, FUSED_REG_NUMBERS) {
    return like(params, [](size_t) { return true; });
  }

  static void rescale_grad_(const at::Tensor&, at::TensorList, at::TensorList, const c10::List<bool>&,
                            FUSED_REG_NUMBERS) {}

  static at::Tensor accumulate_grad_(at::TensorList params, at::TensorList, at::IntArrayRef, double,
                                     const OptionalTensor&, FUSED_REG_NUMBERS) {
    return value(params);
  }

  static Tensors empty_grads(at::TensorList params) {
    return like(params, [](size_t) { return true; });
  }

  static void prox_(at::TensorList params, const OptionalTensor&, c10::SymIntArrayRef, FUSED_REG_NUMBERS) {
    check(params);
  }

  static at::Tensor norms(at::TensorList params, FUSED_REG_NUMBERS) {
    check(params);
    c10::SymInt count = 0;
    for (const at::Tensor& p : params) {
      const int64_t d = sliced_dim(p, static_cast<Grouping>(group));
      if (p.sym_numel() != 0) {
        count += d < 0 ? 1 : p.sym_size(d);
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
    check_meta(params);
  }

  static at::Tensor value(at::TensorList params) {
    check(params);
    return at::empty({}, params[0].options().dtype(value_dtype(params)));
  }

  template <class IsWanted>
  static Tensors like(at::TensorList params, const IsWanted& is_wanted) {
    check(params);
    Tensors found;
    for (const auto t : c10::irange(params.size())) {
      if (is_wanted(t)) {
        found.push_back(at::empty_like(params[t]));
      }
    }
    return found;
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(fused_reg, Meta, m) { register_operators<Meta>(m); }

}  // namespace fused_reg
