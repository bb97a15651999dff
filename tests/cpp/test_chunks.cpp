// The plan covers every element of every tensor exactly once, however the elements are shared out.
#include <random>

#include "chunks.h"
#include "expect.h"

using namespace fused_reg;

namespace {

void expect_covers(const std::vector<int64_t>& sizes, const std::vector<int64_t>& groups) {
  const ChunkPlan plan(sizes, groups);
  std::vector<int64_t> covered(sizes.size());
  int64_t last_tensor = 0;
  for (int64_t c = 0; c < plan.chunks(); ++c) {
    const Chunk chunk = plan.chunk(c);
    EXPECT(chunk.tensor >= last_tensor && chunk.tensor < plan.tensors(), c);
    EXPECT(plan.first_chunk(chunk.tensor) <= c && c < plan.first_chunk(chunk.tensor + 1), c);
    EXPECT(chunk.size > 0 && chunk.size <= kChunkSize, c, chunk.size);
    EXPECT(chunk.begin == covered[chunk.tensor], c, chunk.begin);  // in order: no gap, no overlap
    covered[chunk.tensor] += chunk.size;
    // Within one group, which it fills or ends.
    const int64_t t = chunk.tensor, size = plan.group_size(t), within = chunk.group - plan.first_group(t);
    EXPECT(within == chunk.begin / size && within == (chunk.begin + chunk.size - 1) / size, c, chunk.group);
    EXPECT(chunk.size == kChunkSize || (chunk.begin + chunk.size) % size == 0, c, chunk.size);
    last_tensor = chunk.tensor;
  }
  EXPECT(covered == sizes);
  EXPECT(plan.chunk_from(0) == 0 && plan.chunk_from(plan.elements()) == plan.chunks());
}

// Any cut of the elements into shares is a cut of the chunks, each chunk in the share that holds its middle.
void expect_shares_are_disjoint(const std::vector<int64_t>& sizes, const std::vector<int64_t>& groups,
                                std::mt19937_64& random) {
  const ChunkPlan plan(sizes, groups);
  std::vector<int64_t> start(sizes.size());
  for (size_t t = 1; t < sizes.size(); ++t) {
    start[t] = start[t - 1] + sizes[t - 1];
  }
  for (int i = 0; i < 100; ++i) {
    const int64_t cut = static_cast<int64_t>(random() % (plan.elements() + 1));
    const int64_t c = plan.chunk_from(cut);
    EXPECT(c >= 0 && c <= plan.chunks(), cut);
    const auto middle = [&](int64_t i) {
      const Chunk chunk = plan.chunk(i);
      return start[chunk.tensor] + chunk.begin + chunk.size / 2;
    };
    EXPECT(c == plan.chunks() || middle(c) >= cut, cut, c);
    EXPECT(c == 0 || middle(c - 1) < cut, cut, c);
  }
}

}  // namespace

int main() {
  constexpr int64_t k = kChunkSize;
  std::vector<std::vector<int64_t>> lists = {
      {},
      {0},
      {0, 0, 0},
      {1},
      {k - 1, k, k + 1},
      {2 * k + 1, 0, 0, 5},
      {0, 3, 0},
      {3, 0},
      std::vector<int64_t>(10000, 0),
      std::vector<int64_t>(10000, 64),
      {(int64_t{1} << 31) + 5, 1, (int64_t{1} << 31) + 7},  // above 2^32 in all
  };
  std::mt19937_64 random(0);
  for (int i = 0; i < 50; ++i) {
    std::vector<int64_t> sizes(random() % 40);
    for (int64_t& size : sizes) {
      size = static_cast<int64_t>(random() % 3 == 0 ? random() % 4 : random() % (3 * k));
    }
    lists.push_back(sizes);
  }
  for (const auto& sizes : lists) {
    const std::vector<int64_t> whole(sizes.size(), 1);
    expect_covers(sizes, whole);
    expect_shares_are_disjoint(sizes, whole, random);
    std::vector<int64_t> rows;  // as many as divide the size, and none where it is 0
    for (const int64_t size : sizes) {
      int64_t count = size == 0 ? 0 : size > 100000 ? 1 : 1 + static_cast<int64_t>(random() % size);
      while (count > 1 && size % count != 0) {
        --count;
      }
      rows.push_back(count);
    }
    expect_covers(sizes, rows);
    expect_shares_are_disjoint(sizes, rows, random);
  }
  const ChunkPlan plan({6, 0, 3 * (k + 1)}, {6, 0, 3});
  EXPECT(plan.groups() == 9 && plan.chunks() == 12 && plan.first_group(2) == 6 && plan.chunks_per_group(2) == 2);
  EXPECT(plan.chunk(9).group == 7 && plan.chunk(9).begin == 2 * k + 1 && plan.chunk(9).size == 1);
  return fused_reg::testing::report();
}
