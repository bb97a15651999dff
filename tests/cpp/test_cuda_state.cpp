// What the CUDA backend keeps beyond a call (csrc/cuda/stream_state.h), on the host (cuda_on_host/): long tables and
// counters, of streams and of graphs.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <set>
#include <string>
#include <thread>

#include "cpu/list_pass.h"
#include "cuda/list_pass.h"
#include "cuda_kernels.h"
#include "expect.h"
#include "operators.h"
#include "random_lists.h"

using namespace fused_reg;

namespace {

using OnCpu = Operators<ListPass>;
using OnCuda = Operators<cuda::ListPass>;

// What is captured, and what the graph owns until it ends.
class Graph {
 public:
  template <class Call>
  explicit Graph(const Call& call) {
    cuda_on_host::captured = &graph_;
    call();
    cuda_on_host::captured = nullptr;
  }
  ~Graph() { cuda_on_host::end(&graph_); }

  size_t launches() const {
    const auto is_launch = [](const cuda_on_host::Operation& o) { return o.grid.has_value(); };
    return std::count_if(graph_.operations.begin(), graph_.operations.end(), is_launch);
  }

  void replay() const { cuda_on_host::device.replay(0, graph_); }

 private:
  cuda_on_host_graph graph_;
};

// So many tensors that with numbers for each no kernel's arguments hold their table.
Tensors long_list() {
  Tensors list;
  for (int t = 0; t < 500; ++t) {
    list.push_back(at::randn({1 + below(3), 1 + below(9)}));
  }
  return list;
}

Given numbers_for_each(size_t count, Grouping group) {
  Given given;
  given.group = static_cast<int64_t>(group);
  for (int column = 0; column < kNumbers; ++column) {
    const bool is_absent = column == kNormStrength && group == Grouping::kNone;
    given.counts.push_back(is_absent ? 0 : count);
    for (size_t t = 0; t < count && !is_absent; ++t) {
      given.floats.push_back(std::max(rule_of(column).least, 0.0) + uniform(0.01, 0.1));
    }
  }
  return given;
}

c10::List<bool> for_all(size_t count, bool value) {
  c10::List<bool> list;
  list.resize(count, value);
  return list;
}

// Every kind of call, on a list that it may change: what it gives, and the list.
enum class Kind { kGradients, kRowGradients, kAccumulated, kProx, kRowProx, kNorms, kSums, kStep, kRowStep };

// The sanitizers have the time for some.
std::vector<Kind> kinds() {
  if (cuda_on_host::kSanitized) {
    return {Kind::kRowGradients, Kind::kStep};
  }
  return {Kind::kGradients, Kind::kRowGradients, Kind::kAccumulated, Kind::kProx,   Kind::kRowProx,
          Kind::kNorms,     Kind::kSums,         Kind::kStep,        Kind::kRowStep};
}

Grouping group_of(Kind kind) {
  const bool has_rows =
      kind == Kind::kRowGradients || kind == Kind::kRowProx || kind == Kind::kNorms || kind == Kind::kRowStep;
  return has_rows ? Grouping::kRow : Grouping::kNone;
}

template <class Ops>
Tensors run(Kind kind, const Tensors& list, Tensors grads, const Given& given) {
  const size_t n = list.size();
  Tensors results;
  switch (kind) {
    case Kind::kGradients:
    case Kind::kRowGradients: {
      auto [value, found, norms] = Ops::penalty(list, for_all(n, true), GIVEN(given));
      results = std::move(found);
      results.push_back(value);
      break;
    }
    case Kind::kAccumulated:
      results.push_back(
          Ops::accumulate_grad_(list, grads, std::vector<int64_t>(n, kAddGrad), 0.5, std::nullopt, GIVEN(given)));
      break;
    case Kind::kProx:
    case Kind::kRowProx:
      Ops::prox_(list, std::nullopt, {}, GIVEN(given));
      break;
    case Kind::kNorms:
      results.push_back(Ops::norms(list, GIVEN(given)));
      break;
    case Kind::kSums:
      results.push_back(Ops::sums(list, /*with_zeros=*/false, GIVEN(given)));
      break;
    case Kind::kStep:
    case Kind::kRowStep: {
      const std::vector<double> rates{0.0, 0.0, 0.0, 0.0};
      results.push_back(
          Ops::step_(list, grads, {}, {}, for_all(n, true), 0, 0, rates, std::nullopt, std::nullopt, GIVEN(given)));
      break;
    }
  }
  results.insert(results.end(), grads.begin(), grads.end());
  results.insert(results.end(), list.begin(), list.end());
  return results;
}

// A call with its own list, there and here.
struct Sample {
  Kind kind;
  Tensors list = long_list(), grads = long_grads(list);
  Given given = numbers_for_each(list.size(), group_of(kind));

  static Tensors long_grads(const Tensors& list) {
    Tensors grads;
    for (const at::Tensor& t : list) {
      grads.push_back(at::randn_like(t));
    }
    return grads;
  }

  template <class Ops>
  Tensors on() const {
    return run<Ops>(kind, copies(list), copies(grads), given);
  }
};

std::string named(const std::string& what, Kind kind) { return what + ", kind " + std::to_string(int(kind)); }

void expect_same(const Tensors& actual, const Tensors& expected, const std::string& what) {
  EXPECT(actual.size() == expected.size(), what);
  for (size_t i = 0; i < std::min(actual.size(), expected.size()); ++i) {
    EXPECT(same_bits(actual[i], expected[i]), what, i);
  }
}

// Other calls on the stream, enough to take the place of every table that it keeps.
void overwrite_tables(Kind kind) {
  for (size_t i = 0; i <= cuda::kTablesKept; ++i) {
    Sample{kind}.on<OnCuda>();
  }
}

void expect_tables_of_graphs() {
  for (const Kind kind : kinds()) {
    const Sample sample{kind};
    const Tensors list = copies(sample.list), grads = copies(sample.grads);
    Tensors results;
    const Graph graph([&] { results = run<OnCuda>(kind, list, grads, sample.given); });
    {
      const Graph other([&] { Sample{kind}.on<OnCuda>(); });
    }
    overwrite_tables(kind);
    graph.replay();
    expect_same(results, sample.on<OnCpu>(), named("a replay after other calls", kind));
  }
}

void expect_tables_of_streams() {
  for (const Kind kind : kinds()) {
    std::vector<Sample> samples;
    for (size_t i = 0; i <= cuda::kTablesKept; ++i) {
      samples.push_back({kind});
      expect_same(samples.back().on<OnCuda>(), samples.back().on<OnCpu>(), named("a list", kind));
    }
    const size_t allocated = cuda_on_host::memory.size();
    for (const Sample& sample : samples) {
      expect_same(sample.on<OnCuda>(), sample.on<OnCpu>(), named("the same list", kind));
    }
    EXPECT(cuda_on_host::memory.size() == allocated, named("a stream that has its memory", kind));
  }
}

std::vector<unsigned char> some_bytes(size_t count) {
  std::vector<unsigned char> bytes(count);
  std::generate(bytes.begin(), bytes.end(), [] { return static_cast<unsigned char>(random_bits()); });
  return bytes;
}

bool has_bytes(const cuda::Memory& memory, const std::vector<unsigned char>& bytes) {
  return std::equal(bytes.begin(), bytes.end(), static_cast<const unsigned char*>(memory.get()));
}

void expect_kept_tables() {
  const cuda::Launch launch = cuda::next_launch();
  const auto launches_of = [&](const std::vector<unsigned char>& bytes) {
    const int before = cuda_on_host::launches;
    EXPECT(has_bytes(cuda::device_table(bytes, launch), bytes));
    return cuda_on_host::launches - before;
  };
  std::vector<std::vector<unsigned char>> tables;
  for (size_t i = 0; i <= cuda::kTablesKept; ++i) {
    tables.push_back(some_bytes(160'000));
  }
  for (size_t i = 0; i < cuda::kTablesKept; ++i) {
    EXPECT(launches_of(tables[i]) == 5, "its memory is new");
  }
  for (size_t i = 0; i < cuda::kTablesKept; ++i) {
    EXPECT(launches_of(tables[i]) == 0, "it is there");
  }
  EXPECT(launches_of(tables.back()) == 5, "in the place of the first");
  EXPECT(launches_of(tables[0]) == 5);
  EXPECT(launches_of(tables.back()) == 0);

  // Another thread is about to launch with these.
  std::vector<cuda::Memory> held;
  for (const auto& bytes : tables) {
    held.push_back(cuda::device_table(bytes, launch));
  }
  for (size_t i = 0; i < 2 * cuda::kTablesKept; ++i) {
    launches_of(some_bytes(160'000));
  }
  for (size_t i = 0; i < tables.size(); ++i) {
    EXPECT(has_bytes(held[i], tables[i]), i);
  }
}

bool all_counters_are_zero() {
  bool all = true;
  for (const auto& [key, of_stream] : cuda::state().streams) {
    for (const auto& [size, memory] : of_stream.arrivals) {
      const auto* const bytes = static_cast<const unsigned char*>(memory.get());
      all &= std::all_of(bytes, bytes + size, [](unsigned char c) { return c == 0; });
    }
  }
  return all;
}

// Groups of several chunks, of which one CTA takes many, or only a part.
void expect_large_groups() {
  constexpr int64_t k = kChunkSize;
  const Tensors lists[] = {
      {at::randn({3, k + 1})},
      {at::randn({1, 9}), at::randn({2, 3 * k + 5}, at::kBFloat16), at::empty({0, 4}), at::randn({300, 3}),
       at::randn({5, 2 * k}, at::kDouble), at::randn({1, k}, at::kHalf)},
      {at::randn({k + 1, 2}, at::kHalf), at::randn({70 * k}, at::kBFloat16)},
      {at::randn({150, 300}), at::randn({150, 1}, at::kDouble)},
  };
  for (const Tensors& list : lists) {
    for (const Grouping group : {Grouping::kTensor, Grouping::kRow, Grouping::kColumn}) {
      int64_t groups = 0;
      for (const at::Tensor& t : list) {
        groups += groups_of(t, group);
      }
      if (groups > 500) {
        continue;  // fibers are slow
      }
      const Given given = Given::of({0.1, 0.2, 0.3, 0.1}, group);
      const auto [expected, expected_grads, expected_norms] = OnCpu::penalty(list, for_all(0, false), GIVEN(given));
      for (const int multiprocessors : {1, 3}) {
        cuda_on_host::multiprocessors = multiprocessors;
        const auto [value, grads, norms] = OnCuda::penalty(list, for_all(0, false), GIVEN(given));
        expect_same({value, norms[0]}, {expected, expected_norms[0]}, "large groups");
        expect_same({OnCuda::norms(list, GIVEN(given))}, {OnCpu::norms(list, GIVEN(given))}, "soft norms");
        const Tensors there = copies(list), here = copies(list);
        OnCuda::prox_(there, std::nullopt, {}, GIVEN(given));
        OnCpu::prox_(here, std::nullopt, {}, GIVEN(given));
        expect_same(there, here, "prox_ of large groups");
        EXPECT(all_counters_are_zero());
      }
    }
  }
}

void expect_counters_of_streams() {
  const auto counter_on = [](cudaStream_t stream) {
    cuda_on_host::stream = stream;
    const auto* const counter = cuda::arrivals_for(cuda::next_launch(), 1);
    EXPECT(counter == cuda::arrivals_for(cuda::next_launch(), 1), "that of the stream");
    cuda_on_host::stream = nullptr;
    return counter;
  };
  const auto* const own = counter_on(nullptr);
  const auto* const other = counter_on(reinterpret_cast<cudaStream_t>(64));
  const auto* const of_thread = counter_on(cudaStreamPerThread);
  const unsigned *shared, *of_other_thread;
  std::thread([&] {
    shared = counter_on(nullptr);
    of_other_thread = counter_on(cudaStreamPerThread);
  }).join();
  EXPECT(shared == own, "one stream in every thread");
  EXPECT((std::set{own, other, of_thread, of_other_thread}.size() == 4), "launches that run at a time");
}

void expect_counters_of_graphs() {
  std::set<const unsigned*> counters{cuda::arrivals_for(cuda::next_launch(), 1)};
  const auto capture = [&] {
    counters.insert(cuda::arrivals_for(cuda::next_launch(), 1));
    EXPECT(**counters.rbegin() == 0);
  };
  {
    const Graph first([&] { capture(), capture(); });
    const Graph second(capture);
    EXPECT(counters.size() == 4, "each launch has its own");
  }
  const Graph third([&] { capture(), capture(), capture(); });
  EXPECT(counters.size() == 4, "those of graphs that ended");
}

// More than one process could capture when each call took one of 65,536 tickets.
void expect_many_captures() {
  const Tensors list{at::randn({5})};
  const Given given = Given::of({0.1});
  const auto capture = [&] {
    for (int i = 0; i < (cuda_on_host::kSanitized ? 700 : 70'000); ++i) {
      OnCuda::penalty(list, for_all(0, false), GIVEN(given));
      cuda_on_host::captured->operations.clear();
    }
  };
  {
    const Graph graph(capture);
  }
  const size_t allocated = cuda_on_host::memory.size();
  {
    const Graph graph(capture);
  }
  EXPECT(cuda_on_host::memory.size() == allocated, "what graphs had comes back");
}

// Memory of torch's allocator may belong to a pool that ends with the call.
void expect_nothing_of_the_allocator_is_kept() {
  const size_t before = cuda_on_host::allocator().used();
  for (const Kind kind : kinds()) {
    Sample{kind}.on<OnCuda>();
    EXPECT(cuda_on_host::allocator().used() == before, named("after a call", kind));
    {
      const Graph graph([&] { Sample{kind}.on<OnCuda>(); });
    }
    EXPECT(cuda_on_host::allocator().used() == before, named("after a graph", kind));
  }
}

// Where torch's allocator has taken all memory it gives some back, but not while it is captured.
void expect_memory_of_a_full_device() {
  constexpr size_t kMany = 1 << 20;  // of which no graph has left memory
  cuda_on_host::is_full = true;
  EXPECT(*cuda::arrivals_for(cuda::next_launch(), kMany) == 0 && !cuda_on_host::is_full);
  cuda_on_host::is_full = true;
  std::string refused;
  const Graph graph([&] {
    try {
      cuda::arrivals_for(cuda::next_launch(), kMany);
    } catch (const c10::Error& error) {
      refused = error.what_without_backtrace();
    }
  });
  EXPECT(refused == "CUDA error 2", refused);
  cuda_on_host::is_full = false;
}

// Of any count, as a part of a call that is captured.
void expect_numbers() {
  for (const int64_t count : {0, 1, 2, 7, 5000}) {
    std::vector<double> values;
    for (int64_t i = 0; i < count; ++i) {
      values.push_back(uniform(-1, 1));
    }
    const at::Tensor expected = at::tensor(values, at::kDouble);
    at::Tensor numbers;
    const Graph graph([&] { numbers = OnCuda::numbers(at::empty({0}), values); });
    std::fill(values.begin(), values.end(), 0.0);
    graph.replay();
    expect_same({numbers}, {expected}, "numbers");
  }
}

}  // namespace

int main() {
  at::set_num_threads(1);
  at::manual_seed(0);
  expect_tables_of_graphs();
  expect_tables_of_streams();
  expect_kept_tables();
  expect_large_groups();
  expect_counters_of_streams();
  expect_counters_of_graphs();
  expect_many_captures();
  expect_nothing_of_the_allocator_is_kept();
  expect_memory_of_a_full_device();
  expect_numbers();
  EXPECT(cuda_on_host::mode == cudaStreamCaptureModeGlobal, "what this thread may do while a stream is captured");
  return fused_reg::testing::report();
}
