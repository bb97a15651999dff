#pragma once

#include <cuda_runtime_api.h>

namespace c10::cuda::CUDACachingAllocator {

inline void emptyCache() { cuda_on_host::is_full = false; }

}  // namespace c10::cuda::CUDACachingAllocator
