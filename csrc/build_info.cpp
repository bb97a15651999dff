#include "build_info.h"

#include "torch_compat.h"

#if defined(__clang__)
#define FUSED_REG_COMPILER __VERSION__  // names itself
#else
#define FUSED_REG_COMPILER "GCC " __VERSION__
#endif

namespace fused_reg {

std::map<std::string, std::string>& build_info() {
  static std::map<std::string, std::string> info{{"torch", TORCH_VERSION}, {"compiler", FUSED_REG_COMPILER}};
  return info;
}

}  // namespace fused_reg
