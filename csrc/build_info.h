#pragma once

#include <cstddef>
#include <string>

namespace fused_reg {

struct BuildInfo {
  const char* torch;  // version of torch's headers
  const char* compiler;
  std::string cuda_architectures;  // compute capabilities ("7.5 9.0"); empty: no CUDA kernels were built
  const char* cpu_capability;      // instruction set in use: AVX512, AVX2 or baseline
};

BuildInfo build_info();

// The CUDA kernels tell what they were compiled for: 750, 900.
void set_cuda_architectures(const int* architectures, size_t count);

}  // namespace fused_reg
