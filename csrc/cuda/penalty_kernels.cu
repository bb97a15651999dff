// The kernels of the passes that sum and write gradients.
#include "launch_pass.cuh"

namespace fused_reg::cuda {

template cudaError_t launch<Pass::kPenaltyGradient>(const Call&, const void*, size_t, cudaStream_t);
template cudaError_t launch<Pass::kPenaltyAccumulate>(const Call&, const void*, size_t, cudaStream_t);

}  // namespace fused_reg::cuda
