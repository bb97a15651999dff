// Which tensors share memory, against the sets of their bytes; and that what it costs grows with the tensors and not
// with the pairs of them.
#include <random>
#include <set>
#include <vector>

#include "expect.h"
#include "extent.h"

using namespace fused_reg;

namespace {

using Numbers = std::vector<int64_t>;

struct View {
  uintptr_t begin;
  size_t element_size;
  Numbers sizes, strides;

  Extent extent() const { return {begin, element_size, sizes, strides}; }

  // The address of every element.
  std::vector<uintptr_t> addresses() const {
    std::vector<uintptr_t> all{begin};
    for (size_t d = 0; d < sizes.size(); ++d) {
      const std::vector<uintptr_t> before = all;
      all.clear();
      for (int64_t i = 0; i < sizes[d]; ++i) {
        for (const uintptr_t a : before) {
          all.push_back(a + i * strides[d] * element_size);
        }
      }
    }
    return all;
  }

  std::set<uintptr_t> bytes() const {
    std::set<uintptr_t> all;
    for (const uintptr_t a : addresses()) {
      for (size_t byte = 0; byte < element_size; ++byte) {
        all.insert(a + byte);
      }
    }
    return all;
  }
};

using Views = std::vector<View>;

std::vector<Extent> extents(const Views& views) {
  std::vector<Extent> all;
  for (const View& v : views) {
    all.push_back(v.extent());
  }
  return all;
}

std::optional<std::pair<size_t, size_t>> expected(const Views& views, size_t read = SIZE_MAX) {
  std::vector<std::set<uintptr_t>> before;
  for (size_t second = 0; second < views.size(); ++second) {
    before.push_back(views[second].bytes());
    for (size_t first = 0; first < std::min(second, read); ++first) {
      for (const uintptr_t byte : before[second]) {
        if (before[first].count(byte) != 0) {
          return std::pair{first, second};
        }
      }
    }
  }
  return std::nullopt;
}

std::mt19937_64 random_bits(0);
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % n); }

View any_view(size_t memory) {
  constexpr size_t kSizes[] = {2, 4, 8};
  View v{0, kSizes[below(3)], {}, {}};
  for (int64_t d = below(4); d > 0; --d) {
    v.sizes.push_back(1 + below(5));
    v.strides.push_back(below(below(2) == 0 ? 4 : 40));
  }
  v.begin = 4096 + below(memory / v.element_size) * v.element_size + (below(20) == 0 ? 1 : 0);  // now and then between
  return v;
}

void expect_any_views() {
  int shared = 0, disjoint = 0, overlapping = 0;
  for (int i = 0; i < 4000; ++i) {
    Views views;
    for (int64_t n = 1 + below(6); n > 0; --n) {
      views.push_back(any_view(i % 2 == 0 ? 200 : 3000));
      const std::vector<uintptr_t> all = views.back().addresses();
      const bool expected = std::set(all.begin(), all.end()).size() < all.size();
      EXPECT(views.back().extent().overlaps_itself() == expected, i);
      overlapping += expected;
    }
    const auto pair = expected(views);
    EXPECT(first_shared(extents(views)) == pair, i);
    const size_t read = static_cast<size_t>(below(static_cast<int64_t>(views.size()) + 1));
    EXPECT(first_shared(extents(views), read) == expected(views, read), i, read);
    (pair ? shared : disjoint) += 1;
  }
  EXPECT(shared > 500 && disjoint > 500 && overlapping > 500, shared, disjoint, overlapping);
}

size_t looked_at = 0;  // runs

struct CountingMarks : Marks {
  using Marks::Marks;
  static void count(const Extent& e) {
    e.any_run([](uintptr_t) { return ++looked_at, false; });
  }
  bool any(const Extent& e) { return count(e), Marks::any(e); }
  void set(const Extent& e) { count(e), Marks::set(e); }
};

// Every run is looked at twice, and where there is an overlap to be named, once more.
void expect_cost(const Views& views, const char* what) {
  size_t runs = 0;
  for (const Extent& e : extents(views)) {
    e.any_run([&](uintptr_t) { return ++runs, false; });
  }
  looked_at = 0;
  EXPECT(!first_shared<CountingMarks>(extents(views)), what);
  EXPECT(looked_at <= 2 * runs, what, looked_at, runs);
  Views more = views;
  more.push_back(views[views.size() / 2]);
  looked_at = 0;
  EXPECT(first_shared<CountingMarks>(extents(more)) == std::pair(views.size() / 2, views.size()), what);
  EXPECT(looked_at <= 3 * runs + 3 * runs / views.size(), what, looked_at, runs);
}

void expect_cost_of_many_views() {
  Views columns, rows, diagonals, in_turn, single;
  for (uintptr_t i = 0; i < 784; ++i) {
    columns.push_back({4 * i, 4, {128}, {784}});
  }
  for (uintptr_t i = 0; i < 10'000; ++i) {
    rows.push_back({40 * i, 4, {10}, {1}});
    in_turn.push_back({2 * i, 2, {20}, {10'000}});
    single.push_back({8 * (i * 7919 % 10'000), 8, {}, {}});
  }
  for (uintptr_t i = 0; i < 300; ++i) {
    diagonals.push_back({4 * i, 4, {100}, {301}});
  }
  Views corners;  // [i::3, j::5] of 90 x 100
  for (uintptr_t i = 0; i < 3; ++i) {
    for (uintptr_t j = 0; j < 5; ++j) {
      corners.push_back({8 * (100 * i + j), 8, {30, 20}, {300, 5}});
    }
  }
  expect_cost(columns, "columns");
  expect_cost(rows, "rows");
  expect_cost(diagonals, "diagonals");
  expect_cost(in_turn, "one of 10,000 in turn");
  expect_cost(single, "single elements");
  expect_cost(corners, "corners");
  looked_at = 0;
  EXPECT(!first_shared<CountingMarks>(extents(rows)) && looked_at == 0, "what lies apart is not looked at", looked_at);
}

// What lies far apart, and what is dense, costs no more than its runs.
void expect_long_runs() {
  const uintptr_t gib = uintptr_t{1} << 30;
  const Views halves{{0, 4, {1 << 10, 1 << 9}, {1 << 10, 1}}, {4 << 9, 4, {1 << 10, 1 << 9}, {1 << 10, 1}}};
  expect_cost(halves, "halves of rows");
  EXPECT(!first_shared(extents({{0, 4, {1 << 28}, {1}}, {gib, 4, {1 << 28}, {1}}})));
  EXPECT(first_shared(extents({{0, 4, {1 << 28}, {1}}, {gib - 4, 4, {1 << 28}, {1}}})) ==
         std::pair(size_t{0}, size_t{1}));
  EXPECT((View{0, 4, {1 << 28, 8}, {0, 1}}.extent().overlaps_itself()));
  EXPECT((!View{0, 4, {3, 4}, {2, 3}}.extent().overlaps_itself()));
  EXPECT((View{0, 4, {4, 4}, {2, 3}}.extent().overlaps_itself()));
}

}  // namespace

int main() {
  expect_any_views();
  expect_cost_of_many_views();
  expect_long_runs();
  return fused_reg::testing::report();
}
