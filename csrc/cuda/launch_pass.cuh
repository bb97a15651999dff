// The launch of a pass, which the file that compiles its kernels instantiates.
#pragma once

#include "group_kernels.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_reg::cuda {

// A launch: the kernel of a pass, and what its CTAs share out.
template <class Table>
struct Plan {
  void (*kernel)(Table);
  uint32_t work;
};

template <class Table, template <int> class P, int known, int numbers>
Plan<Table> plan_of(const Call& call) {
  if constexpr (numbers > kGroupNumbers) {
    if (!call.has_further) {
      constexpr int kPlain = known & ~kFurther;
      return plan_of<Table, P, kPlain, kGroupNumbers>(call);
    }
  }
  if constexpr (P<known>::kSums != 0 && P<known>::kWrites != 0) {
    return {penalty_kernel<Table, P>, call.runs};
  } else if constexpr (P<known>::kSums != 0) {
    return {sums_kernel<Table, P, known, numbers>, call.runs};
  } else if constexpr (numbers == kTermNumbers) {
    return {element_kernel<Table, P>, call.chunks};
  } else {
    return {group_element_kernel<Table, P, known, numbers>, call.chunks};
  }
}

template <class Table, Pass pass>
Plan<Table> plan_of(const Call& call) {
#define FUSED_REG_PLAN(name, terms, numbers)                 \
  if constexpr (pass == Pass::k##name) {                     \
    return plan_of<Table, name##Pass, terms, numbers>(call); \
  }
  FUSED_REG_PASSES(FUSED_REG_PLAN)
#undef FUSED_REG_PLAN
}

template <Pass pass, class Table>
cudaError_t launch_table(const Table& table, cudaStream_t stream) {
  const Plan<Table> plan = plan_of<Table, pass>(table.call);
  const uint32_t teams = rows_of(pass).numbers == kTermNumbers ? 1 : kWarps / table.call.team;  // of a CTA
  uint32_t ctas = 0;
  const cudaError_t error = resident_ctas(plan.kernel, (plan.work + teams - 1) / teams, &ctas);
  return error == cudaSuccess ? launch_on(ctas, stream, plan.kernel, table) : error;
}

template <Pass pass, size_t size>
cudaError_t launch_inline(const Call& call, const void* bytes, size_t count, cudaStream_t stream) {
  InlineTable<size> table;
  table.call = call;
  std::memcpy(table.bytes, bytes, count);
  return launch_table<pass>(table, stream);
}

template <Pass pass>
cudaError_t launch(const Call& call, const void* table, size_t table_bytes, cudaStream_t stream) {
  if (table_bytes <= kSmallTable) {
    return launch_inline<pass, kSmallTable>(call, table, table_bytes, stream);
  }
  if (table_bytes <= kMediumTable) {
    return launch_inline<pass, kMediumTable>(call, table, table_bytes, stream);
  }
  if (table_bytes <= kLargeTable) {
    return launch_inline<pass, kLargeTable>(call, table, table_bytes, stream);
  }
  return launch_table<pass>(DeviceTable{call, static_cast<const unsigned char*>(table)}, stream);
}

}  // namespace fused_reg::cuda
