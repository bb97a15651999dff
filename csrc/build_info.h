#pragma once

namespace fused_reg {

struct BuildInfo {
  const char* torch;  // version of torch's headers
  const char* compiler;
  const char* cuda_architectures;  // empty: no CUDA kernels were built
  const char* cpu_capability;      // instruction set in use: AVX512, AVX2 or baseline
};

BuildInfo build_info();

}  // namespace fused_reg
