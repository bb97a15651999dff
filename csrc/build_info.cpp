#include "build_info.h"

#include "torch_compat.h"

#if defined(__clang__)
#define FUSED_REG_COMPILER __VERSION__  // names itself
#else
#define FUSED_REG_COMPILER "GCC " __VERSION__
#endif

namespace fused_reg {

// Read from the bytes of the file where the library cannot be loaded (fused_reg/_library.py).
__attribute__((used)) extern const char kTorchVersionMark[] = "fused_reg built with torch " TORCH_VERSION;

std::map<std::string, std::string>& build_info() {
  static std::map<std::string, std::string> info{{"torch", TORCH_VERSION}, {"compiler", FUSED_REG_COMPILER}};
  return info;
}

}  // namespace fused_reg
