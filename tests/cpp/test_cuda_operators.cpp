// The operators of the CUDA backend, on the host (cuda_on_host/), against those of the CPU: values, norms, sums,
// counts, gradients and parameters, bit for bit.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <string>

#include "cpu/list_pass.h"
#include "cuda/list_pass.h"
#include "cuda_kernels.h"
#include "cuda_streams.h"
#include "expect.h"
#include "left_out.h"
#include "operators.h"
#include "random_lists.h"

using namespace fused_reg;

namespace {

using OnCpu = Operators<ListPass>;
using OnCuda = Operators<cuda::ListPass>;

c10::List<bool> bools(const std::vector<bool>& v) {
  c10::List<bool> out;
  for (const bool b : v) {
    out.push_back(b);
  }
  return out;
}

void expect_same_list(const Tensors& actual, const Tensors& expected, const std::string& what) {
  EXPECT(actual.size() == expected.size(), what);
  for (size_t t = 0; t < std::min(actual.size(), expected.size()); ++t) {
    EXPECT(same_bits(actual[t], expected[t]), what, t, actual[t].numel(), actual[t].scalar_type());
  }
}

void expect_penalty(const Tensors& list, const Given& s, const std::string& what) {
  const auto [value, grads, norms] = OnCuda::penalty(list, bools({}), GIVEN(s));
  const auto [expected, expected_grads, expected_norms] = OnCpu::penalty(list, bools({}), GIVEN(s));
  EXPECT(same_bits(value, expected, true), what, value, expected);
  EXPECT(grads.empty() && norms.size() == (s.group == 0 ? 0 : 1), what);
  expect_same_list(norms, expected_norms, what + ": norms");
}

void expect_gradients(const Tensors& list, const Given& s, const std::string& what) {
  std::vector<bool> needs;
  Tensors selected;
  for (const at::Tensor& t : list) {
    needs.push_back(below(4) != 0);
    if (needs.back()) {
      selected.push_back(t);
    }
  }
  const auto [value, grads, all_norms] = OnCuda::penalty(list, bools(needs), GIVEN(s));
  const auto [expected, expected_grads, expected_norms] = OnCpu::penalty(list, bools(needs), GIVEN(s));
  EXPECT(same_bits(value, expected, true), what);
  expect_same_list(grads, expected_grads, what + ": gradients");
  if (selected.empty()) {
    return;
  }
  const at::Tensor upstream = below(4) == 0 ? at::ones({}) : at::randn({}, any_dtype());
  OptionalTensor norms;
  std::vector<int64_t> first_groups;
  if (s.group != 0) {
    norms = std::get<2>(OnCpu::penalty(list, bools({}), GIVEN(s)))[0];
    int64_t groups = 0;
    for (size_t t = 0; t < list.size(); ++t) {
      if (needs[t]) {
        first_groups.push_back(groups);
      }
      groups += groups_of(list[t], static_cast<Grouping>(s.group));
    }
  }
  const auto run = [&](auto op) { return op(upstream, selected, bools(needs), norms, first_groups, GIVEN(s)); };
  const Tensors again = run(OnCuda::penalty_grad);
  expect_same_list(again, run(OnCpu::penalty_grad), what + ": penalty_grad");
  Tensors there = copies(again), here = copies(again);
  OnCuda::rescale_grad_(upstream, selected, there, bools(needs), norms, first_groups, GIVEN(s));
  OnCpu::rescale_grad_(upstream, selected, here, bools(needs), norms, first_groups, GIVEN(s));
  expect_same_list(there, here, what + ": rescale_grad_");
}

void expect_accumulation(const Tensors& list, const Given& s, const std::string& what) {
  std::vector<int64_t> modes;
  Tensors grads;
  const bool any_adds = below(4) != 0;
  for (const at::Tensor& t : list) {
    modes.push_back(any_adds ? below(3) : below(2));
    if (modes.back() != kSkipGrad) {
      at::ScalarType dtype = t.scalar_type();
      if (below(5) == 0) {
        dtype = at::kDouble;  // wider
      }
      at::Tensor grad = draw(t.sizes(), dtype, Content::kNormal);
      grads.push_back(below(5) == 0 || grad.sizes() != t.sizes() ? at::randn(t.sizes(), dtype) : grad);
    }
  }
  const double scale = below(3) == 0 ? 1 : uniform(-2, 2);
  const OptionalTensor scale_tensor =
      below(2) == 0 ? std::nullopt : OptionalTensor(at::full({}, scale, at::kDouble).to(any_dtype()));
  Tensors there = copies(grads), here = copies(grads);
  const auto run = [&](auto op, const Tensors& to) { return op(list, to, modes, scale, scale_tensor, GIVEN(s)); };
  const at::Tensor value = run(OnCuda::accumulate_grad_, there);
  EXPECT(same_bits(value, run(OnCpu::accumulate_grad_, here), true), what + ": accumulate_grad_");
  expect_same_list(there, here, what + ": accumulate_grad_");
}

void expect_prox(const Tensors& list, const Given& s, const std::string& what) {
  const Tensors there = copies(list), here = copies(list);
  OnCuda::prox_(there, std::nullopt, {}, GIVEN(s));
  OnCpu::prox_(here, std::nullopt, {}, GIVEN(s));
  expect_same_list(there, here, what + ": prox_");
}

// Groups that a test has the time for: fibers are slow.
bool has_few_groups(const Tensors& list, Grouping group) {
  int64_t groups = 0;
  for (const at::Tensor& t : list) {
    groups += groups_of(t, group);
  }
  return groups < 400;
}

// What an optimizer's step takes, with copies for another backend.
struct Step {
  int64_t optimizer = below(kOptimizers), options = 0;
  Tensors params, grads, states, counts;
  std::vector<bool> is_first;
  std::vector<double> rates;
  OptionalTensor grad_scale, found_inf;

  explicit Step(const Tensors& list) : params(copies(list)) {
    const auto draw_options = [&](std::initializer_list<int64_t> all) {
      for (const int64_t one : all) {
        options |= below(2) == 0 ? one : 0;
      }
    };
    draw_options({kMaximize, kDecoupled, kMomentum, kAmsgrad, kCentered, kProximal, kUnscale});
    options |= options & kMomentum && below(2) == 0 ? kNesterov : 0;
    options |= options & kProximal && below(2) == 0 ? kPreconditioned : 0;
    const bool is_sgd = step_of(optimizer) == Pass::kSgd;
    for (const at::Tensor& p : list) {
      const at::Tensor grad = draw(p.sizes(), below(4) == 0 ? any_dtype() : p.scalar_type(), Content::kNormal);
      grads.push_back(grad.sizes() == p.sizes() ? grad : grad.t());
      for (int i = 0; i < (rates.empty() || below(2) == 0 ? 1 : 0); ++i) {
        for (const double rate : {below(2) * 0.1, below(4) * 0.3, below(4) * 0.3, 1e-8}) {
          rates.push_back(rate);
        }
      }
      if (is_sgd) {
        is_first.push_back(below(2) == 0);
      } else {  // float32 and float64 are counted in the kernel
        constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kDouble, at::kLong};
        counts.push_back(at::full({}, below(50), kDtypes[below(3)]));
      }
    }
    if (rates.size() != list.size() * kRates) {
      rates.resize(kRates);
    }
    for (int s = std::popcount(state_streams(step_of(optimizer), options)); s > 0; --s) {
      for (const at::Tensor& p : list) {
        states.push_back(below(4) == 0 ? at::rand(p.sizes(), any_dtype()) : at::empty_like(p).uniform_());
      }
    }
    if (options & kUnscale) {
      grad_scale = at::full({}, 1024.0, any_dtype());
    }
    if (below(2) == 0) {
      found_inf = at::full({}, below(4) == 0, at::kFloat);
    }
  }

  Step again() const {
    Step other = *this;
    for (Tensors Step::* list : {&Step::params, &Step::grads, &Step::states, &Step::counts}) {
      other.*list = copies(this->*list);
    }
    return other;
  }

  template <class Operators>
  at::Tensor run(const Given& s) const {
    return Operators::step_(params, grads, states, counts, bools(is_first), optimizer, options, rates, grad_scale,
                            found_inf, GIVEN(s));
  }

  void expect_same(const Step& other, const std::string& what) const {
    expect_same_list(params, other.params, what + ": parameters");
    expect_same_list(grads, other.grads, what + ": gradients");
    expect_same_list(states, other.states, what + ": states");
    expect_same_list(counts, other.counts, what + ": counts");
  }
};

void expect_step_of(const Tensors& list, const Given& s, const std::string& what) {
  Step there(list);
  if (s.group != 0 || std::any_of(&s.counts[kGroupNumbers], &s.counts[kNumbers], [](int64_t n) { return n != 0; })) {
    there.options &= ~kPreconditioned;
  }
  const Step here = there.again(), before = there.again();
  const bool is_none = here.found_inf.has_value() && here.found_inf->item<double>() != 0;
  const at::Tensor value = there.run<OnCuda>(s), expected = here.run<OnCpu>(s);
  const std::string name =
      what + ": step of optimizer " + std::to_string(here.optimizer) + " with options " + std::to_string(here.options);
  there.expect_same(here, name);
  EXPECT(is_none || same_bits(value, expected, true), name, value, expected);
  if (is_none) {
    here.expect_same(before, name);
  }
}

void expect_step(const Tensors& list, const std::string& what) {
  const bool has_any = below(3) == 0;
  Given s = has_any ? Given::any(list.size()) : Given::any_step(list.size());
  s.group = has_few_groups(list, static_cast<Grouping>(s.group)) ? s.group : 1;
  if (below(3) == 0) {
    s.add_references(list);
  }
  expect_step_of(list, s, what);
}

void expect_reports(const Tensors& list, const std::string& what) {
  for (const Grouping group : {Grouping::kTensor, Grouping::kRow, Grouping::kColumn}) {
    const Given norms = Given::of({}, group);
    if (has_few_groups(list, group)) {
      EXPECT(same_bits(OnCuda::norms(list, GIVEN(norms)), OnCpu::norms(list, GIVEN(norms)), true), what, norms.group);
    }
  }
  for (const Given& given : {Given::of({}), Given::of({0, 0, 0, 0, 0.1, 0.3, 0.5, 3, 0.5, 4})}) {
    for (const bool with_zeros : {false, true}) {
      const auto run = [&](auto op) { return op(list, with_zeros, GIVEN(given)); };
      EXPECT(same_bits(run(OnCuda::sums), run(OnCpu::sums), true), what, with_zeros);
    }
  }
}

void expect_all(const Tensors& list, const Given& s, const std::string& what) {
  cuda_on_host::multiprocessors = 1 + static_cast<int>(below(5));
  expect_penalty(list, s, what);
  expect_gradients(list, s, what);
  expect_accumulation(list, s, what);
  expect_prox(list, s, what);
}

// Launches of one call.
template <class Call>
int launches_of(const Call& call) {
  cuda_on_host::launches = 0;
  call();
  return cuda_on_host::launches;
}

void expect_few_launches() {
  const Tensors list{at::randn({300, 500}), at::randn({7}, at::kDouble), at::empty({0})};
  const Given terms = Given::of({0.1, 0.2});
  for (const Grouping group : {Grouping::kTensor, Grouping::kRow}) {
    const Given norms = Given::of({0.1, 0.2, 0.3, 0.1}, group);
    EXPECT(launches_of([&] { OnCuda::penalty(list, bools({}), GIVEN(norms)); }) == 1);
    EXPECT(launches_of([&] { OnCuda::penalty(list, bools({1, 1, 1}), GIVEN(norms)); }) == 2);
    EXPECT(launches_of([&] { OnCuda::prox_(list, std::nullopt, {}, GIVEN(norms)); }) == 2);
  }
  Tensors grads = copies(list);
  EXPECT(launches_of([&] { OnCuda::penalty(list, bools({}), GIVEN(terms)); }) == 1);
  EXPECT(launches_of([&] { OnCuda::penalty(list, bools({1, 1, 1}), GIVEN(terms)); }) == 1);
  EXPECT(launches_of([&] { OnCuda::accumulate_grad_(list, grads, {2, 2, 2}, 0.5, std::nullopt, GIVEN(terms)); }) == 1);
  EXPECT(launches_of([&] { OnCuda::prox_(list, std::nullopt, {}, GIVEN(terms)); }) == 1);
  const Given smooth = Given::of({0.1, 0.2, 0, 0.1, 0.3, 0.5});
  EXPECT(launches_of([&] { OnCuda::penalty(list, bools({}), GIVEN(smooth)); }) == 1);
  EXPECT(launches_of([&] { OnCuda::penalty(list, bools({1, 1, 1}), GIVEN(smooth)); }) == 2);
  EXPECT(launches_of([&] { OnCuda::prox_(list, std::nullopt, {}, GIVEN(smooth)); }) == 1);
  OnCuda::sums(list, true, GIVEN(terms));  // uploads its table
  EXPECT(launches_of([&] { OnCuda::sums(list, false, GIVEN(terms)); }) == 2);
}

// One launch for a step of any list, though its numbers change, and captured as one.
void expect_one_launch_of_a_step() {
  for (const int64_t size : {3, 700}) {
    Tensors list;
    for (int64_t t = 0; t < size; ++t) {
      list.push_back(at::randn({t % 7}, t % 3 == 0 ? at::kDouble : at::kFloat));
    }
    for (const bool has_counts : {false, true}) {
      Step there(list);
      there.optimizer = 1;
      there.options = 0;
      there.grads = copies(list);
      there.states.clear();
      for (int64_t i = 0; i < 2 * size; ++i) {
        there.states.push_back(list[i % size].abs());
      }
      there.rates = {0.0, 0.9, 0.99, 1e-8};
      there.is_first.clear();
      there.grad_scale.reset();
      there.found_inf = at::zeros({});
      there.counts.clear();
      for (int64_t t = 0; t < size; ++t) {
        there.counts.push_back(at::full({}, 3 + t / 100, has_counts ? at::kFloat : at::kLong));
      }
      const Step here = there.again();
      for (int i = 0; i < 3; ++i) {
        const Given s = Given::of({0.1, 0.2, 0, 0.1 / (i + 1)});
        const int launches = launches_of([&] { there.run<OnCuda>(s); });
        EXPECT(launches == 1 || (i == 0 && size > 3), size, has_counts, launches);
        here.run<OnCpu>(s);
      }
      there.expect_same(here, "several steps");

      at::Tensor rate = at::full({}, 0.1, at::kDouble);
      const Given s = Given::with_tensor({0.1, 0.2, 0, 0}, kStep, rate);
      cuda_on_host_graph graph;
      cuda_on_host::captured = &graph;
      at::Tensor value;
      std::string refused;
      try {
        value = there.run<OnCuda>(s);
      } catch (const c10::Error& error) {
        refused = error.what_without_backtrace();
      }
      cuda_on_host::captured = nullptr;
      EXPECT(has_counts == refused.empty(), refused);
      there.expect_same(here, "captured, and not yet done");
      for (const double changed : {0.1, 0.03}) {
        rate.fill_(changed);
        cuda_on_host::device.replay(0, graph);
        if (has_counts) {
          EXPECT(same_bits(value, here.run<OnCpu>(s), true));
        }
        there.expect_same(here, "a replay");
      }
      cuda_on_host::end(&graph);
    }
  }
}

// A sum of squares beyond float64, of groups of one chunk and of several, and of chunks that differ.
void expect_rescue() {
  const Given norms = Given::of({0.1, 1e-300, 0.3, 0.1}, Grouping::kTensor);
  for (const double scale : {1e300, 1e-300}) {
    for (const int64_t size : {int64_t{100}, int64_t{kChunkSize + 7}}) {
      at::Tensor w = at::randn({size}, at::kDouble) * scale;
      const Tensors list{w, at::randn({40, 50}, at::kDouble), at::randn({30})};
      for (const double beta : {0.0, 1e-300, 0.5, 1e300}) {
        expect_all(list, Given::of({0.1, 0.2, 0, 0.1, 0.3, beta}), "smooth L1 at scale " + std::to_string(scale));
      }
      expect_all(list, norms, "scale " + std::to_string(scale));
      w.narrow(0, 0, std::min<int64_t>(size, kChunkSize)).zero_();
      expect_all(list, norms, "zeros, then scale " + std::to_string(scale));
    }
  }
}

// Comes to every place in the kernels where threads meet or memory is ordered.
void run_all_kernels() {
  random_bits.seed(1);
  cuda_on_host::draw.seed(1);
  at::manual_seed(1);
  const Tensors list{at::randn({2, kChunkSize + 1}), at::randn({5, 9}), at::randn({3, 700}, at::kDouble) * 1e200};
  const Tensors large{at::randn({kChunkSize}), at::randn({kChunkSize})};  // a CTA takes a chunk
  const Tensors short_rows{at::randn({400, 8})};                          // a warp takes some together
  for (const int multiprocessors : {1, 100}) {                            // fewer CTAs than chunks, and one for each
    cuda_on_host::multiprocessors = multiprocessors;
    for (const Grouping group : {Grouping::kNone, Grouping::kTensor, Grouping::kRow}) {
      const Given s = Given::of({0.1, 0.2, 0.3, 0.1}, group);
      expect_penalty(list, s, "all kernels");
      expect_prox(list, s, "all kernels");
      expect_step_of(list, s, "all kernels");
    }
    expect_penalty(large, Given::of({0.1, 0.2, 0.3}, Grouping::kTensor), "all kernels");
    expect_penalty(short_rows, Given::of({0.1, 0.2, 0.3}, Grouping::kRow), "all kernels");
    expect_gradients(list, Given::of({0.1, 0.2, 0, 0.1, 0.3, 0.5}), "all kernels");
    EXPECT(same_bits(OnCuda::sums(list, true, GIVEN(Given::of({}))), OnCpu::sums(list, true, GIVEN(Given::of({})))));
    Step there(Tensors(20, at::randn({300})));  // several chunks for a CTA
    there.optimizer = there.options = 0;
    there.states.clear();
    there.counts.clear();
    there.grads = copies(there.params);
    there.is_first.assign(20, true);
    there.grad_scale.reset();
    there.found_inf.reset();
    const Step here = there.again();
    there.run<OnCuda>(Given::of({0.1, 0.2}));
    here.run<OnCpu>(Given::of({0.1, 0.2}));
    there.expect_same(here, "all kernels");
  }
}

}  // namespace

int main(int argc, char**) {
  constexpr bool quick = cuda_on_host::kSanitized || cuda_on_host::kWatched;
  at::set_num_threads(1);
  at::manual_seed(0);
  if (argc > 1) {
    cuda_on_host::expect_every_site_matters(run_all_kernels);
    return fused_reg::testing::report();
  }
  for (const Content content : {Content::kNormal, Content::kSparse, Content::kExtreme, Content::kAnyBits}) {
    for (int i = 0; i < (quick ? 2 : 30); ++i) {
      const Tensors list = any_list(content, 1 + below(5));
      const std::string what = "content " + std::to_string(static_cast<int>(content)) + ", list " + std::to_string(i);
      Given strengths = Given::any(list.size());
      strengths.group = has_few_groups(list, static_cast<Grouping>(strengths.group)) ? strengths.group : 1;
      expect_all(list, strengths, what);
      strengths.add_references(list);
      expect_all(list, strengths, what + " with references");
      const auto run = [&](auto op) { return op(list, true, GIVEN(strengths)); };
      EXPECT(strengths.group != 0 || same_bits(run(OnCuda::sums), run(OnCpu::sums)), what, "sums of differences");
      expect_reports(list, what);
      for (int step = 0; step < 4; ++step) {
        expect_step(list, what);
      }
    }
  }
  expect_rescue();
  expect_few_launches();
  expect_one_launch_of_a_step();
  expect_deferred_calls(quick ? 5 : 40);

  const Tensors rows{at::randn({quick ? 2 : 5, kChunkSize + 1}), at::randn({40, 9}), at::randn({300})};
  for (const Grouping group : {Grouping::kTensor, Grouping::kRow, Grouping::kColumn}) {
    if (has_few_groups(rows, group)) {
      expect_all(rows, Given::of({0.1, 0.2, 0.3, 0.1}, group), "many groups, some of several chunks");
      expect_prox(rows, Given::of({0, 0.2, 0.3, 0.1}, group), "many groups, without L1");
    }
  }
  cuda_on_host::multiprocessors = 1;  // so that a warp has several rows
  Tensors short_rows;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
    for (const int64_t size : {8, 100, 768, 1000}) {
      short_rows.push_back(draw({10 + below(40), size}, dtype, Content::kSparse));
    }
  }
  expect_penalty(short_rows, Given::of({0.1, 0.2, 0.3}, Grouping::kRow), "short rows");
  expect_prox(short_rows, Given::of({0.1, 0.2, 0.3, 0.1}, Grouping::kRow), "short rows");
  const Tensors runs{at::randn({6, 8}), at::randn({12, 4, 3}), at::randn({36})};
  const auto several = [](Grouping kind, int64_t n) {
    return Given::of({0.1, 0.2, 0.3, 0.1}, static_cast<Grouping>(static_cast<int64_t>(kind) + kGroupings * (n - 1)));
  };
  expect_all(runs, several(Grouping::kRow, 3), "several rows");
  expect_all(runs, several(Grouping::kColumn, 2), "several columns");
  expect_penalty(runs, several(Grouping::kBlock, 12), "blocks");
  expect_prox(runs, several(Grouping::kBlock, 12), "blocks");
  if (!quick) {  // more than the arguments of a kernel hold
    Tensors many;
    for (int64_t t = 0; t < 850; ++t) {
      many.push_back(draw({t % 20 == 0 ? 2 : 0, 1 + below(20)}, at::kFloat, Content::kSparse));
    }
    expect_all(many, Given::any(many.size()), "many tensors");
    expect_all(many, Given::of({0.1, 0.2, 0.3, 0.1}, Grouping::kRow), "many tensors with groups");
    Given relative = Given::of({0.1, 0.2, 0, 0.1});
    relative.add_references(many);
    expect_all(many, relative, "many tensors with references");
    expect_reports(many, "many tensors");
  }
  return fused_reg::testing::report();
}
