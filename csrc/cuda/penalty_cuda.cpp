// The CUDA backend of the operators in ops.cpp.
#include "../build_info.h"
#include "../operators.h"
#include "list_pass.h"

TORCH_LIBRARY_IMPL(fused_reg, CUDA, m) {
  fused_reg::register_operators<fused_reg::Operators<fused_reg::cuda::ListPass>>(m);
  fused_reg::build_info()["cuda_architectures"] = fused_reg::cuda::architectures();
}
