// The kernels of RMSprop's and Adagrad's step.
#include "launch_step.cuh"

namespace fused_reg::cuda {

template cudaError_t launch_step<Pass::kRmsprop>(bool, const Call&, const StepCall&, const void*, size_t, cudaStream_t);
template cudaError_t launch_step<Pass::kAdagrad>(bool, const Call&, const StepCall&, const void*, size_t, cudaStream_t);

}  // namespace fused_reg::cuda
