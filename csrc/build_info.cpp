// What this library was built with, and what it runs on.
#include "build_info.h"

#include <torch/version.h>

#include "cpu/dispatch.h"

#if defined(__clang__)
#define FUSED_REG_COMPILER __VERSION__  // names itself
#else
#define FUSED_REG_COMPILER "GCC " __VERSION__
#endif

namespace fused_reg {

// Read from the bytes of the file where the library cannot be loaded (fused_reg/_ops.py).
__attribute__((used)) extern const char kTorchVersionMark[] = "fused_reg built with torch " TORCH_VERSION;

BuildInfo build_info() { return {TORCH_VERSION, FUSED_REG_COMPILER, "", cpu_capability().name}; }

}  // namespace fused_reg
