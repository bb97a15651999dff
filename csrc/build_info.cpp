// What this library was built with, and what it runs on.
#include "build_info.h"

#include "cpu/dispatch.h"
#include "torch_compat.h"

#if defined(__clang__)
#define FUSED_REG_COMPILER __VERSION__  // names itself
#else
#define FUSED_REG_COMPILER "GCC " __VERSION__
#endif

namespace fused_reg {

// Read from the bytes of the file where the library cannot be loaded (fused_reg/_ops.py).
__attribute__((used)) extern const char kTorchVersionMark[] = "fused_reg built with torch " TORCH_VERSION;

namespace {

std::string& cuda_architectures() {
  static std::string names;
  return names;
}

}  // namespace

void set_cuda_architectures(const int* architectures, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const std::string name = std::to_string(architectures[i] / 100) + "." + std::to_string(architectures[i] / 10 % 10);
    cuda_architectures() += (i == 0 ? "" : " ") + name;
  }
}

BuildInfo build_info() { return {TORCH_VERSION, FUSED_REG_COMPILER, cuda_architectures(), cpu_capability().name}; }

}  // namespace fused_reg
