// The CUDA operators on CPU tensors: csrc/cuda registered where csrc/cpu would be, to be built instead of it.
#include <ATen/ATen.h>
#include <torch/library.h>

#define CUDA CPU  // the dispatch key
#include "cuda/penalty_cuda.cpp"
#include "cuda/penalty_kernels.cu"
#include "cuda/stream_state.cpp"
