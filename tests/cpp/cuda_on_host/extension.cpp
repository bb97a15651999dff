// The Python extension with the CUDA operators on CPU tensors: csrc/cuda registered where csrc/cpu would be, to be
// built in the place of csrc/extension.cpp.
#include "build_info.cpp"
#include "cuda/list_pass.h"
#include "meta/penalty_meta.cpp"
#include "module.cpp"
#include "ops.cpp"

#define CUDA CPU  // the dispatch key
#include "../cuda_kernels.h"
#include "cuda/penalty_cuda.cpp"
