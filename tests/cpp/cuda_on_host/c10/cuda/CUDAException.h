#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call)                                        \
  do {                                                              \
    const cudaError_t error_ = (call);                              \
    TORCH_CHECK(error_ == cudaSuccess, "CUDA error ", int(error_)); \
  } while (false)
