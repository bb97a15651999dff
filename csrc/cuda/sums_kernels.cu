// The kernels of the passes that sum and write nothing.
#include "launch_pass.cuh"

namespace fused_reg::cuda {

template cudaError_t launch<Pass::kPenalty>(const Call&, const void*, size_t, cudaStream_t);
template cudaError_t launch<Pass::kSoftSquares>(const Call&, const void*, size_t, cudaStream_t);
template cudaError_t launch<Pass::kZeros>(const Call&, const void*, size_t, cudaStream_t);

}  // namespace fused_reg::cuda
