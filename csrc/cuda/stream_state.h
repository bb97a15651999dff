// What outlives a launch: tickets and long tables. Both belong to a device and a stream, on which launches follow one
// another; a launch that is being captured in a graph has its own, because replays may run at any time.
#pragma once

#include <vector>

#include "torch_compat.h"

namespace fused_reg::cuda {

struct Launch {
  c10::cuda::CUDAStream stream;
  bool capturing;
};

// The launch that comes next on the current stream.
Launch next_launch();

// A ticket that no other launch uses at the same time.
uint32_t ticket_for(const Launch& launch);

// The table in device memory: the one that is there already if it has the same bytes, else uploaded.
at::Tensor device_table(const std::vector<unsigned char>& bytes, const Launch& launch);

}  // namespace fused_reg::cuda
