// What the operators of ops.cpp do, for every backend that has a ListPass:
//
//   ListPass(params, selection, numbers)     checks; the list, not yet read
//   kTakesStrides                            whether dense(t) is the parameter itself, however it lies in memory, and
//                                            streams may lie otherwise
//   empty_grad(param)                        memory for its gradient
//   write_grad(t, grad), add_grad(t, grad)   which gradients the next pass shall give, and where
//   run_...                                  one pass over the list
//   sent(host, device)                       numbers of the host, there; a graph that captures it has them
//
// (cpu/list_pass.h says more.)
#pragma once

#include <list>
#include <tuple>
#include <vector>

#include "checks.h"
#include "layout.h"
#include "numbers.h"
#include "torch_compat.h"

namespace fused_reg {

template <class ListPass>
struct Operators {
  using Tensors = std::vector<at::Tensor>;

  static std::tuple<at::Tensor, Tensors, Tensors> penalty(at::TensorList params, const c10::List<bool>& needs_grad,
                                                          FUSED_REG_NUMBERS) {
    ListPass pass(params, all_of(params.size()), FUSED_REG_NUMBERS_GIVEN);
    Tensors grads, norms;
    std::vector<size_t> places;
    if (!needs_grad.empty()) {
      check_needs_grad(needs_grad.size(), params.size());
      grads.reserve(params.size());
      for (const auto t : c10::irange(params.size())) {
        if (needs_grad[t]) {
          places.push_back(t);
          grads.push_back(ListPass::empty_grad(pass.dense(t)));
          pass.write_grad(t, grads.back());
        }
      }
    }
    at::Tensor value = run_penalty(pass, {1, {}}, &norms);
    for (const auto i : c10::irange(places.size())) {
      grads[i] = laid_out_as(params[places[i]], std::move(grads[i]));
    }
    return {std::move(value), std::move(grads), std::move(norms)};
  }

  static Tensors penalty_grad(const at::Tensor& upstream, at::TensorList params, const c10::List<bool>& needs_grad,
                              const OptionalTensor& norms, at::IntArrayRef first_groups, FUSED_REG_NUMBERS) {
    ListPass pass(params, selection_of(needs_grad, params.size()), FUSED_REG_NUMBERS_GIVEN);
    Tensors grads;
    grads.reserve(params.size());
    for (const auto t : c10::irange(params.size())) {
      grads.push_back(ListPass::empty_grad(pass.dense(t)));
    }
    run_gradient(pass, upstream, params, grads, norms, first_groups, /*keep_if_one=*/false);
    for (const auto t : c10::irange(params.size())) {
      grads[t] = laid_out_as(params[t], std::move(grads[t]));
    }
    return grads;
  }

  static void rescale_grad_(const at::Tensor& upstream, at::TensorList params, at::TensorList grads,
                            const c10::List<bool>& needs_grad, const OptionalTensor& norms,
                            at::IntArrayRef first_groups, FUSED_REG_NUMBERS) {
    ListPass pass(params, selection_of(needs_grad, params.size()), FUSED_REG_NUMBERS_GIVEN);
    check_grads(grads.size(), params.size());
    Tensors written(grads.begin(), grads.end());
    for (const auto t : c10::irange(params.size())) {
      if (!ListPass::kTakesStrides && !has_layout_of(grads[t], pass.dense(t))) {
        written[t] = ListPass::empty_grad(pass.dense(t)).copy_(grads[t]);
      }
    }
    run_gradient(pass, upstream, params, written, norms, first_groups, /*keep_if_one=*/true);
    for (const auto t : c10::irange(params.size())) {
      copy_back(written[t], grads[t]);
    }
  }

  static at::Tensor accumulate_grad_(at::TensorList params, at::TensorList grads, at::IntArrayRef modes, double scale,
                                     const OptionalTensor& scale_tensor, FUSED_REG_NUMBERS) {
    const at::NoGradGuard no_grad;
    check_params(params);
    check_number("scale", {scale, scale_tensor}, params[0].device());
    const std::vector<size_t> places = check_accumulation(params, grads, modes);
    const NumbersArg numbers = FUSED_REG_NUMBERS_GIVEN;
    check_unshared(grads, numbers, &places);
    // What the kernels read and write: pairs of one layout and dtype, copies where a gradient has another than its
    // parameter, or groups that are no runs and the backend needs these. The dtype is one that holds both exactly. (To
    // hold a tensor that Python has, too, takes its lock.)
    Tensors read;
    std::list<at::Tensor> copies;
    std::vector<const at::Tensor*> written(grads.size());
    for (const auto i : c10::irange(places.size())) {
      const at::Tensor& param = params[places[i]];
      const at::ScalarType dtype = c10::promoteTypes(grads[i].scalar_type(), param.scalar_type());
      written[i] = &grads[i];
      if (dtype != grads[i].scalar_type() || !(ListPass::kTakesStrides || is_run(grads[i], numbers.group))) {
        written[i] = &copies.emplace_back(as_run(grads[i], numbers.group).to(dtype));
      }
      if (dtype != param.scalar_type() || !has_layout_of(*written[i], param)) {
        read = read.empty() ? Tensors(params.begin(), params.end()) : std::move(read);
        read[places[i]] = empty_run(*written[i], numbers.group).copy_(param);
      }
    }
    ListPass pass(read.empty() ? params : at::TensorList(read), all_of(params.size()), numbers);
    for (const auto i : c10::irange(places.size())) {
      if (modes[places[i]] == kAddGrad) {
        pass.add_grad(places[i], *written[i]);
      } else {
        pass.write_grad(places[i], *written[i]);
      }
    }
    at::Tensor value = run_penalty(pass, {scale, scale_tensor}, nullptr);
    for (const auto i : c10::irange(places.size())) {
      copy_back(*written[i], grads[i]);
    }
    return read.empty() ? value : value.to(value_dtype(params));
  }

  static Tensors empty_grads(at::TensorList params) {
    const c10::InferenceMode normal(false);  // they serve the next backward, whatever the mode now
    check_params(params);
    Tensors grads;
    grads.reserve(params.size());
    for (const at::Tensor& p : params) {
      grads.push_back(ListPass::empty_grad(p));
    }
    return grads;
  }

  static at::Tensor numbers(const at::Tensor& like, Floats values) {
    const at::Tensor host = at::empty({static_cast<int64_t>(values.size())}, at::kDouble);
    std::copy(values.begin(), values.end(), host.mutable_data_ptr<double>());
    return ListPass::sent(host, like.device());
  }

  static void prox_(at::TensorList params, const OptionalTensor& norms, at::IntArrayRef first_groups,
                    FUSED_REG_NUMBERS) {
    check_not_in_graph(params);
    const at::NoGradGuard no_grad;
    check_params(params);
    const NumbersArg numbers = FUSED_REG_NUMBERS_GIVEN;
    check_list(params, numbers);
    check_writable(params);
    check_unshared(params, numbers);
    ListPass pass(params, all_of(params.size()), numbers);
    if (pass.group() != Grouping::kNone && norms.has_value()) {
      check_norms(norms, first_groups, params, pass.group());
    }
    pass.run_prox(norms, first_groups);
    for (const auto t : c10::irange(params.size())) {
      copy_back(pass.dense(t), params[t]);
    }
  }

  static at::Tensor step_(at::TensorList params, at::TensorList grads, at::TensorList states, at::TensorList steps,
                          const c10::List<bool>& is_first, int64_t optimizer, int64_t options, Floats rates,
                          const OptionalTensor& grad_scale, const OptionalTensor& found_inf, FUSED_REG_NUMBERS) {
    const at::NoGradGuard no_grad;
    NumbersArg numbers = FUSED_REG_NUMBERS_GIVEN;
    numbers.columns[kStep].is_any = true;  // torch's optimizers take any, as a schedule may end a rounding below 0
    check_list(params, numbers);
    const size_t n = params.size();
    TORCH_CHECK_VALUE(optimizer >= 0 && optimizer < kOptimizers, "optimizer must be 0 to ", kOptimizers - 1, ", got ",
                      optimizer);
    const Pass step = step_of(optimizer);
    TORCH_CHECK_VALUE(!(options & kPreconditioned) || !(numbers.has_further() || numbers.group != Grouping::kNone),
                      "options must not be preconditioned with terms other than L1 and L2");
    const unsigned streams = state_streams(step, static_cast<unsigned>(options));
    check_step(params, grads, states, steps, is_first.size(), __builtin_popcount(streams), rates.size(),
               (options & kUnscale) != 0);
    check_unshared(params, numbers);
    check_number("grad_scale", {1, grad_scale}, params[0].device());
    check_number("found_inf", {0, found_inf}, params[0].device());
    // A parameter whose gradient or state has a wider dtype is stepped in that, and rounded once.
    Tensors wide;
    const auto widen = [&](const at::Tensor& x, size_t t) {
      const at::Tensor& p = wide.empty() ? params[t] : wide[t];
      if (x.scalar_type() != p.scalar_type()) {
        wide = wide.empty() ? Tensors(params.begin(), params.end()) : std::move(wide);
        wide[t] = wide[t].to(c10::promoteTypes(x.scalar_type(), wide[t].scalar_type()));
      }
    };
    for (const auto i : c10::irange(n + states.size())) {
      widen(i < n ? grads[i] : states[i - n], i % n);
    }
    ListPass pass(wide.empty() ? params : at::TensorList(wide), all_of(n), numbers);
    // What the kernels read and write: of the dtype of dense(t), and its layout where the backend needs that; copies
    // where a tensor has another.
    std::list<at::Tensor> copies;
    std::vector<const at::Tensor*> own(n + states.size());
    for (const auto i : c10::irange(own.size())) {
      const at::Tensor& given = i < n ? grads[i] : states[i - n];
      const at::Tensor& dense = pass.dense(i % n);
      own[i] = &given;
      if (given.scalar_type() != dense.scalar_type() || !(ListPass::kTakesStrides || has_layout_of(given, dense))) {
        own[i] = &copies.emplace_back(at::empty_like(dense).copy_(given));
      }
    }
    std::vector<StepRow> rows(n);
    for (const auto t : c10::irange(n)) {
      StepRow& row = rows[t];
      row.options = static_cast<unsigned>(options) | (!is_first.empty() && is_first[t] ? kFirst : 0);
      const Floats own_rates = rates.size() == kRates ? rates : rates.slice(kRates * t, kRates);
      std::copy(own_rates.begin(), own_rates.end(), row.rates);
      row.options |= own_rates[kWeightDecay] != 0 ? kDecay : 0;
      row.count = steps.empty() ? nullptr : &steps[t];
      row.streams[1] = own[t];
      size_t next = n + t;
      for (const auto s : c10::irange(kStreams)) {
        if (streams & bit(s)) {
          row.streams[s] = own[next];
          next += n;
        }
      }
      row.streams[kUnscaled] = options & kUnscale ? own[t] : nullptr;
    }
    pass.want_exact();
    at::Tensor value = pass.run_step(step, rows, {1, grad_scale}, {0, found_inf});
    for (const auto t : c10::irange(n)) {
      copy_back(pass.dense(t), params[t]);
    }
    for (const auto i : c10::irange(own.size())) {
      if (i >= n || options & kUnscale) {
        const at::Tensor& given = i < n ? grads[i] : states[i - n];
        if (found_inf.has_value() && own[i]->scalar_type() != given.scalar_type()) {
          // Not the copy, which is rounded.
          copy_rounded(at::where(found_inf->ne(0).reshape({}), given, *own[i]), given);
        } else {
          copy_back(*own[i], given);
        }
      }
    }
    return value;
  }

  static at::Tensor norms(at::TensorList params, FUSED_REG_NUMBERS) {
    ListPass pass(params, all_of(params.size()), FUSED_REG_NUMBERS_GIVEN);
    check_grouped(pass.group());
    return pass.run_soft_norms();
  }

  static at::Tensor sums(at::TensorList params, bool with_zeros, FUSED_REG_NUMBERS) {
    TORCH_CHECK_VALUE(group == 0, "fused_reg::sums: group must be 0, for sums are of tensors, got ", group);
    ListPass pass(params, all_of(params.size()), FUSED_REG_NUMBERS_GIVEN);
    const at::Tensor terms = pass.run_term_sums();
    return with_zeros ? at::cat({terms, pass.run_zero_counts().unsqueeze(1)}, 1) : terms;
  }

 private:
  // After a pass that has written to `written`: that is the tensor, or a copy of it. Autograd shall notice.
  static void copy_back(const at::Tensor& written, const at::Tensor& tensor) {
    if (!written.is_same(tensor)) {
      copy_rounded(written, tensor);
    } else if (!tensor.is_inference()) {
      tensor.unsafeGetTensorImpl()->bump_version();
    }
  }

  // From float64 to a half type by way of float32, as torch does on x86 and not on every CPU: the bits are the same.
  static void copy_rounded(const at::Tensor& from, const at::Tensor& to) {
    to.copy_(from.scalar_type() == at::kDouble && to.element_size() == 2 ? from.to(at::kFloat) : from);
  }

  static void run_gradient(ListPass& pass, const at::Tensor& upstream, at::TensorList params, const Tensors& grads,
                           const OptionalTensor& norms, at::IntArrayRef first_groups, bool keep_if_one) {
    check_number("upstream", {0, upstream}, params[0].device());
    for (const auto t : c10::irange(params.size())) {
      pass.write_grad(t, grads[t]);
    }
    if (pass.group() != Grouping::kNone) {
      check_norms(norms, first_groups, params, pass.group());
    }
    pass.run_gradient({0, upstream}, norms, first_groups, keep_if_one);
  }

  // The value, and the gradients that were asked for. The norms go to `norms`, unless it is null.
  static at::Tensor run_penalty(ListPass& pass, const NumberArg& scale, Tensors* norms) {
    if (pass.group() == Grouping::kNone) {
      return pass.run_penalty(scale);
    }
    auto [value, found] = pass.run_group_penalty(scale);
    if (norms != nullptr) {
      norms->push_back(std::move(found));
    }
    return value;
  }
};

// The functions of one backend, under the names of ops.cpp.
#define FUSED_REG_OPERATORS(apply)                                                                                  \
  apply(penalty) apply(penalty_grad) apply(rescale_grad_) apply(accumulate_grad_) apply(empty_grads) apply(numbers) \
      apply(prox_) apply(step_) apply(norms) apply(sums)

template <class Functions>
void register_operators(torch::Library& m) {
#define FUSED_REG_REGISTER(name) m.impl(#name, TORCH_FN(Functions::name));
  FUSED_REG_OPERATORS(FUSED_REG_REGISTER)
#undef FUSED_REG_REGISTER
}

}  // namespace fused_reg
