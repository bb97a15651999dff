// The kernels of SGD's and Adam's step.
#include "launch_step.cuh"

namespace fused_reg::cuda {

template cudaError_t launch_step<Pass::kSgd>(bool, const Call&, const StepCall&, const void*, size_t, cudaStream_t);
template cudaError_t launch_step<Pass::kAdam>(bool, const Call&, const StepCall&, const void*, size_t, cudaStream_t);

}  // namespace fused_reg::cuda
