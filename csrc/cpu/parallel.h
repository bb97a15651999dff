// Runs the chunks of a plan on torch's threads, each thread over an equal share of the elements.
#pragma once

#include "../chunks.h"
#include "../torch_compat.h"

namespace fused_reg {

// Elements that a thread is worth waking for; ATen's own figure.
constexpr int64_t kGrainSize = 32768;

// Set in a child of fork(): OpenMP's threads did not come along, and to wait for them is to hang.
inline bool is_forked_child = false;

// body(c, chunk) once for every chunk. Serial where threads do not pay.
template <class Body>
void for_each_chunk(const ChunkPlan& plan, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    const int64_t first = plan.chunk_from(begin), last = plan.chunk_from(end);
    int64_t t = first < last ? plan.chunk(first).tensor : 0;
    for (int64_t c = first; c < last; ++c) {
      body(c, plan.chunk(c, &t));
    }
  };
  if (is_forked_child) {
    range(0, plan.elements());
  } else {
    at::parallel_for(0, plan.elements(), kGrainSize, range);
  }
}

}  // namespace fused_reg
