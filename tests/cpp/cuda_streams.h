// Calls of the CUDA operators whose launches run later (cuda_on_host/device.h): on two streams in any order that these
// allow, with memory that is handed out again at once, and captured ones that are replayed between them. Against the
// CPU's operators, bit for bit.
#pragma once

#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "cpu/list_pass.h"
#include "cuda/list_pass.h"
#include "expect.h"
#include "operators.h"
#include "random_lists.h"

namespace fused_reg {

inline cudaStream_t stream_number(int64_t i) { return reinterpret_cast<cudaStream_t>(16 * i); }

// A model whose calls are on one stream, and the same one on the CPU.
class Trained {
 public:
  explicit Trained(int64_t stream) : stream_(stream_number(stream)) {
    const bool is_long = below(4) == 0;  // a table that does not fit in a kernel's arguments
    const int64_t count = is_long ? 1500 : 1 + below(4);
    for (int64_t t = 0; t < count; ++t) {
      here_.push_back(at::randn({is_long ? 1 + t % 5 : 1 + below(t == 0 ? 3 * kChunkSize : 2000)},
                                below(2) == 0 ? at::kFloat : at::kDouble));
      grads_here_.push_back(at::randn_like(here_.back()));
    }
    there_ = copies(here_);
    grads_there_ = copies(grads_here_);
  }

  // A call drawn at random, whose results are looked at later, or never: then its memory is free at once.
  void call() {
    cuda_on_host::stream = stream_;
    const Given s = Given::of({0.1, 0.2, 0.3, 0.01}, static_cast<Grouping>(below(2)));
    const std::vector<int64_t> adds(here_.size(), kAddGrad);
    switch (below(5)) {
      case 0: {
        const c10::List<bool> needs = all_of(below(2) == 0);
        auto [value, grads, norms] = OnCuda::penalty(there_, needs, GIVEN(s));
        auto [value_here, expected, norms_here] = OnCpu::penalty(here_, needs, GIVEN(s));
        grads.insert(grads.end(), norms.begin(), norms.end());
        expected.insert(expected.end(), norms_here.begin(), norms_here.end());
        grads.push_back(value);
        expected.push_back(value_here);
        keep(grads, expected);
        break;
      }
      case 1:
        keep({OnCuda::accumulate_grad_(there_, grads_there_, adds, 0.5, std::nullopt, GIVEN(s))},
             {OnCpu::accumulate_grad_(here_, grads_here_, adds, 0.5, std::nullopt, GIVEN(s))});
        break;
      case 2:
        OnCuda::prox_(there_, std::nullopt, {}, GIVEN(s));
        OnCpu::prox_(here_, std::nullopt, {}, GIVEN(s));
        break;
      case 3:
        step(s.group);
        break;
      default: {
        const Given none = Given::of({});
        keep({OnCuda::sums(there_, false, GIVEN(none))}, {OnCpu::sums(here_, false, GIVEN(none))});
      }
    }
  }

  // What is captured runs now on the CPU, once for every replay.
  void capture() {
    cuda_on_host::stream = stream_;
    cuda_on_host::captured = &graph_;
    const Given s = Given::of({0.1, 0.2, 0.3}, Grouping::kTensor);
    const std::vector<int64_t> adds(here_.size(), kAddGrad);
    for (int i = 0; i < 2; ++i) {  // the second one may take what the first one has let go
      values_.push_back(OnCuda::accumulate_grad_(there_, grads_there_, adds, 0.25, std::nullopt, GIVEN(s)));
    }
    cuda_on_host::captured = nullptr;
  }
  void replay() {
    const Given s = Given::of({0.1, 0.2, 0.3}, Grouping::kTensor);
    const std::vector<int64_t> adds(here_.size(), kAddGrad);
    cuda_on_host::device.replay(cuda_on_host::number_of(stream_), graph_);
    Tensors expected;
    for (int i = 0; i < 2; ++i) {
      expected.push_back(OnCpu::accumulate_grad_(here_, grads_here_, adds, 0.25, std::nullopt, GIVEN(s)));
    }
    expected_values_ = expected;
  }

  // What comes next is on another stream, and waits for this one.
  void move_to(int64_t stream) {
    cuda_on_host::Event& event = events_.emplace_back();
    cuda_on_host::device.record(cuda_on_host::number_of(stream_), &event);
    stream_ = stream_number(stream);
    cuda_on_host::device.wait(cuda_on_host::number_of(stream_), &event);
  }

  // When all has run.
  void expect_same(const std::string& what) {
    const auto compare = [&](const Tensors& actual, const Tensors& expected, const char* of) {
      for (size_t t = 0; t < expected.size(); ++t) {
        EXPECT(same_bits(actual[t], expected[t]), what, of, t);
      }
    };
    compare(there_, here_, "parameter");
    compare(grads_there_, grads_here_, "gradient");
    compare(values_, expected_values_, "value of a replay");
    for (const auto& [actual, expected] : kept_) {
      compare(actual, expected, "result");
    }
    kept_.clear();
  }

  // The memory that a graph has kept is free with what it has given.
  void expect_graph_ends() {
    values_.clear();
    cuda_on_host::end(&graph_);
    const size_t used = cuda_on_host::allocator().used(graph_.pool);
    EXPECT(used == 0, "a graph's pool has", used, "blocks in use");
    cuda_on_host::allocator().trim(graph_.pool);
  }

 private:
  using OnCpu = Operators<ListPass>;
  using OnCuda = Operators<cuda::ListPass>;

  c10::List<bool> all_of(bool value) const {
    c10::List<bool> all;
    for (size_t t = 0; t < here_.size(); ++t) {
      all.push_back(value);
    }
    return all;
  }

  void step(int64_t group) {
    Given s = Given::of({0.1, 0.2, 0.3, 0.01}, static_cast<Grouping>(group));
    const std::vector<double> rates{0.0, 0.9, 0.9, 1e-8};
    const Tensors none;
    keep({OnCuda::step_(there_, grads_there_, none, none, all_of(true), 0, 0, rates, std::nullopt, std::nullopt,
                        GIVEN(s))},
         {OnCpu::step_(here_, grads_here_, none, none, all_of(true), 0, 0, rates, std::nullopt, std::nullopt,
                       GIVEN(s))});
  }

  void keep(Tensors actual, Tensors expected) {
    if (below(3) != 0) {
      kept_.emplace_back(std::move(actual), copies(expected));
    }
  }

  cudaStream_t stream_;
  Tensors here_, there_, grads_here_, grads_there_;
  cuda_on_host_graph graph_;
  std::deque<cuda_on_host::Event> events_;
  Tensors values_, expected_values_;
  std::vector<std::pair<Tensors, Tensors>> kept_;
};

inline void expect_deferred_calls(int rounds) {
  cuda_on_host::is_deferred = true;
  for (int round = 0; round < rounds; ++round) {
    cuda_on_host::multiprocessors = 1 + static_cast<int>(below(2));
    Trained models[2]{Trained(below(3)), Trained(2)};
    for (Trained& model : models) {
      model.capture();
    }
    for (int i = 0; i < 12; ++i) {
      Trained& model = models[below(2)];
      below(3) == 0 ? model.replay() : model.call();
      if (below(4) == 0) {
        model.move_to(below(3));
      }
    }
    cuda_on_host::device.synchronize();
    for (Trained& model : models) {
      model.expect_same("round " + std::to_string(round));
      model.expect_graph_ends();
    }
  }
  cuda_on_host::is_deferred = false;
  cuda_on_host::allocator().trim(0);
  cuda_on_host::stream = nullptr;
}

}  // namespace fused_reg
