// The kernels of the passes that write and sum nothing.
#include "launch_pass.cuh"

namespace fused_reg::cuda {

template cudaError_t launch<Pass::kGradient>(const Call&, const void*, size_t, cudaStream_t);
template cudaError_t launch<Pass::kAccumulate>(const Call&, const void*, size_t, cudaStream_t);
template cudaError_t launch<Pass::kProx>(const Call&, const void*, size_t, cudaStream_t);

}  // namespace fused_reg::cuda
