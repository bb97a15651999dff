// The CPU backend of the operators in ops.cpp.
#include "../build_info.h"
#include "../registration.h"
#include "list_pass.h"

TORCH_LIBRARY_IMPL(fused_reg, CPU, m) {
  fused_reg::register_operators<fused_reg::Operators<fused_reg::ListPass>>(m);
  fused_reg::build_info()["cpu_capability"] = fused_reg::cpu_capability().name;
}
