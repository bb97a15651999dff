// Runs the visits of a plan on torch's threads, each thread over an equal share of the elements.
#pragma once

#include "../chunks.h"
#include "../torch_compat.h"

namespace fused_reg {

// Elements that a thread is worth waking for; ATen's own figure.
constexpr int64_t kGrainSize = 32768;

// Set in a child of fork(): OpenMP's threads did not come along, and to wait for them is to hang.
inline bool is_forked_child = false;

// body(begin, end) for ranges that make up [0, size), each on a thread if they are of at least so many.
template <class Body>
void in_parallel(int64_t size, int64_t grain, const Body& body) {
  if (is_forked_child) {
    body(0, size);
  } else {
    at::parallel_for(0, size, grain, body);
  }
}

// body(visit) once for every visit. Serial where threads do not pay.
template <class Body>
void for_each_visit(const ChunkPlan& plan, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    const int64_t last = plan.chunk_from(end);
    int64_t c = plan.chunk_from(begin);
    int64_t t = c < last ? plan.chunk(c).tensor : 0;
    while (c < last) {
      const Visit visit = plan.visit(c, last, &t);
      body(visit);
      c += visit.chunks;
    }
  };
  in_parallel(plan.elements(), kGrainSize, range);
}

}  // namespace fused_reg
