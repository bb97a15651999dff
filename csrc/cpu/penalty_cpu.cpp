// The CPU backend of the operators in ops.cpp.
#include <pthread.h>

#include "../build_info.h"
#include "../operators.h"
#include "list_pass.h"

TORCH_LIBRARY_IMPL(fused_reg, CPU, m) {
  fused_reg::register_operators<fused_reg::Operators<fused_reg::ListPass>>(m);
  pthread_atfork(nullptr, nullptr, [] { fused_reg::is_forked_child = true; });
  fused_reg::build_info()["cpu_capability"] = fused_reg::cpu_capability().name;
}
