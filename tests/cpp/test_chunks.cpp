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

// Visits go over all chunks in their order, and keep short groups whole.
void expect_visits(const ChunkPlan& plan, int64_t begin, int64_t end) {
  int64_t t = begin < end ? plan.chunk(begin).tensor : 0;
  for (int64_t c = begin; c < end;) {
    const Visit visit = plan.visit(c, end, &t);
    EXPECT(visit.first.begin == plan.chunk(c).begin && visit.number == c && visit.first.tensor == t, c);
    EXPECT(visit.chunks >= 1 && visit.chunks <= kMaxVisit && c + visit.chunks <= end, c, visit.chunks);
    EXPECT(visit.chunks == 1 || visit.size <= std::max(kVisitedGroup, kVisitedTogether), c, visit.size);
    int64_t size = 0;
    for (int64_t i = c; i < c + visit.chunks; ++i) {
      const Chunk chunk = plan.chunk(i);
      size += chunk.size;
      EXPECT(chunk.tensor == t && (chunk.size == visit.first.size || i + 1 == c + visit.chunks), c, i);
    }
    EXPECT(size == visit.size, c);
    c += visit.chunks;
    if (plan.visits_groups(t)) {
      EXPECT((c - plan.first_chunk(t)) % plan.chunks_per_group(t) == 0, c);
    }
  }
}

// Any cut of the elements into shares is a cut of what is visited whole, each in the share that holds its middle.
void expect_shares_are_disjoint(const std::vector<int64_t>& sizes, const ChunkPlan& plan, std::mt19937_64& random) {
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
      const int64_t t = chunk.tensor, size = plan.group_size(t);
      const int64_t within =
          plan.visits_groups(t) ? chunk.begin / size * size + size / 2 : chunk.begin + chunk.size / 2;
      return start[t] + within;
    };
    EXPECT(c == plan.chunks() || middle(c) >= cut, cut, c);
    EXPECT(c == 0 || middle(c - 1) < cut, cut, c);
    if (i > 1) {
      continue;
    }
    expect_visits(plan, 0, c);
    expect_visits(plan, c, plan.chunks());
  }
}

// Strips go over all chunks once, however the tensor is shared out, each over neighbouring groups.
void expect_strips(ChunkPlan plan, int64_t most, std::mt19937_64& random) {
  for (int64_t t = 0; t < plan.tensors(); ++t) {
    plan.set_strips(t, 16, most);
  }
  const int64_t cut = plan.chunk_from(static_cast<int64_t>(random() % (plan.elements() + 1)));
  std::vector<int> covered(plan.chunks());
  for (int64_t c = 0, t = 0; c < plan.chunks();) {
    const Visit strip = plan.visit(c, c < cut ? cut : plan.chunks(), &t);
    EXPECT(strip.first.tensor == t && strip.first.begin == plan.chunk(strip.number).begin, c);
    EXPECT(strip.size <= std::max<int64_t>(kStripElements, 16 * kChunkSize) && strip.chunks <= most, c, strip.size);
    for (int64_t i = 0; i < strip.chunks;) {
      const Visit part = plan.part(strip, i);
      EXPECT(part.first.size == strip.first.size && part.first.group == strip.first.group + i, c, i);
      EXPECT(part.chunks == 1 || (part.chunks <= kMaxVisit && plan.chunks_per_group(t) == 1), c, i);
      for (int64_t k = 0; k < part.chunks; ++k) {
        ++covered[part.number + k];
      }
      i += part.chunks;
    }
    c += strip.chunks;
  }
  EXPECT(covered == std::vector<int>(plan.chunks(), 1));
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
    expect_shares_are_disjoint(sizes, ChunkPlan(sizes), random);
    expect_shares_are_disjoint(sizes, ChunkPlan(sizes, whole), random);
    std::vector<int64_t> rows;  // as many as divide the size, and none where it is 0
    for (const int64_t size : sizes) {
      int64_t count = size == 0 ? 0 : size > 100000 ? 1 : 1 + static_cast<int64_t>(random() % size);
      while (count > 1 && size % count != 0) {
        --count;
      }
      rows.push_back(count);
    }
    expect_covers(sizes, rows);
    expect_shares_are_disjoint(sizes, ChunkPlan(sizes, rows), random);
    if (ChunkPlan(sizes, rows).chunks() < 1000000) {
      expect_strips(ChunkPlan(sizes, rows), 16 << random() % 4, random);
    }
  }
  const ChunkPlan plan({6, 0, 3 * (k + 1)}, {6, 0, 3});
  EXPECT(plan.groups() == 9 && plan.chunks() == 12 && plan.first_group(2) == 6 && plan.chunks_per_group(2) == 2);
  EXPECT(plan.chunk(9).group == 7 && plan.chunk(9).begin == 2 * k + 1 && plan.chunk(9).size == 1);
  return fused_reg::testing::report();
}
