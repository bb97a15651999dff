// What is said when a launch fails.
#pragma once

#include "kernels.h"
#include "torch_compat.h"

namespace fused_reg::cuda {

// Names the architecture that this library was not built for; else CUDA's own error.
inline void check_launch(cudaError_t error, at::Device device) {
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    (void)cudaGetLastError();  // it is told here
    int major = 0, minor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device.index()));
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device.index()));
    TORCH_CHECK(false, "fused_reg: built for the CUDA architectures ", architectures(), ", but ", device, " has ",
                major, ".", minor, "; build it again with TORCH_CUDA_ARCH_LIST=\"", major, ".", minor, "\"");
  }
  C10_CUDA_CHECK(error);
}

}  // namespace fused_reg::cuda
