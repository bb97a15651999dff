// The library without Python: the operators through torch's dispatcher.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>

#include "build_info.h"
#include "expect.h"
#include "penalty.h"

namespace {

std::atomic<int64_t> heap_bytes;  // all that was asked for

}  // namespace

// Not inlined, or GCC finds in each caller that one of them is malloc() or free() and the other is not.
#define FUSED_REG_APART __attribute__((noinline))

FUSED_REG_APART void* operator new(std::size_t size) {
  heap_bytes += static_cast<int64_t>(size);
  if (void* memory = std::malloc(size)) {
    return memory;
  }
  throw std::bad_alloc();
}

FUSED_REG_APART void operator delete(void* memory) noexcept { std::free(memory); }
FUSED_REG_APART void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

using Tensors = std::vector<at::Tensor>;

std::tuple<at::Tensor, Tensors> penalty_and_grad(at::TensorList params, double l1, double l2, double l2_norm = 0,
                                                 int64_t group = 0) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fused_reg::penalty", "")
          .typed<std::tuple<at::Tensor, Tensors, Tensors>(at::TensorList, const c10::List<bool>&, at::ArrayRef<double>,
                                                          at::TensorList, at::IntArrayRef, int64_t)>();
  c10::List<bool> needs_grad;
  for (size_t i = 0; i < params.size(); ++i) {
    needs_grad.push_back(true);
  }
  std::vector<int64_t> counts{1, 1};
  counts.resize(fused_reg::kNumbers);
  std::vector<double> numbers{l1, l2};
  if (group != 0) {
    counts[2] = 1;
    numbers.push_back(l2_norm);
  }
  auto [value, grads, norms] = op.call(params, needs_grad, numbers, {}, counts, group);
  EXPECT(norms.empty() == (group == 0));
  return {value, grads};
}

std::vector<at::Tensor> sample() {
  at::manual_seed(0);
  return {at::randn({300, 500}), at::randn({7}), at::empty({0}), at::randn({40, 1000}).t(), at::randn({})};
}

void expect_right_numbers() {
  const auto params = sample();
  const auto [value, grads] = penalty_and_grad(params, 0.25, 0.5);
  double expected = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const at::Tensor w = params[i].to(at::kDouble);
    expected += 0.25 * w.abs().sum().item<double>() + 0.5 * w.square().sum().item<double>();
    EXPECT(at::equal(grads[i], 0.25 * params[i].sgn() + 0.5 * (2 * params[i])), i);
    EXPECT(grads[i].strides() == params[i].strides(), i);
  }
  EXPECT(std::abs(value.item<double>() - expected) <= 6e-8 * expected, value.item<double>(), expected);
}

// Inside a parallel region the call runs on one thread, with the same bits.
void expect_same_bits_inside_parallel_for() {
  const auto params = sample();
  const auto [value, grads] = penalty_and_grad(params, 0.1, 0.2);
  std::vector<int> equal(8);
  at::parallel_for(0, 8, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [inner_value, inner_grads] = penalty_and_grad(params, 0.1, 0.2);
      equal[i] = at::equal(value, inner_value) && at::equal(grads[0], inner_grads[0]);
    }
  });
  for (const int ok : equal) {
    EXPECT(ok);
  }
}

void expect_same_bits_for_any_thread_count() {
  const auto params = sample();
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const at::Tensor value = std::get<0>(penalty_and_grad(params, 0.1, 0.2));
  for (const int n : {2, 3, 7}) {
    at::set_num_threads(n);
    EXPECT(at::equal(value, std::get<0>(penalty_and_grad(params, 0.1, 0.2))), n);
  }
  at::set_num_threads(threads);
}

void expect_an_error_of_the_caller_is_thrown() {
  bool thrown = false;
  try {
    penalty_and_grad({at::randn({3}), at::ones({2}, at::kInt)}, 1, 1);
  } catch (const c10::TypeError& error) {
    thrown = std::string(error.what()).find("params[1] must be floating point, got torch.int32") != std::string::npos;
  }
  EXPECT(thrown);
}

// Of lists of which each is twice as long as the one before: in proportion, what is added is twice as much as before.
void expect_memory_in_proportion_to_the_list() {
  for (const int64_t group : {0, 1, 2, 3}) {
    std::vector<int64_t> bytes;
    for (const int64_t n : {100, 200, 400}) {
      const std::vector<at::Tensor> params(n, at::ones({6, 5}));
      penalty_and_grad(params, 1, 1, 1, group);
      const int64_t before = heap_bytes;
      penalty_and_grad(params, 1, 1, 1, group);
      bytes.push_back(heap_bytes - before);
    }
    EXPECT(bytes[0] > 0 && bytes[2] - bytes[1] < 3 * (bytes[1] - bytes[0]), group, bytes[0], bytes[1], bytes[2]);
  }
}

}  // namespace

int main() {
  EXPECT(fused_reg::build_info()["torch"].find('.') != std::string::npos);
  expect_right_numbers();
  expect_same_bits_inside_parallel_for();
  expect_same_bits_for_any_thread_count();
  expect_an_error_of_the_caller_is_thrown();
  expect_memory_in_proportion_to_the_list();
  return fused_reg::testing::report();
}
