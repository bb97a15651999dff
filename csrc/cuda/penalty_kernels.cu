// The launches of the kernels.
#include "group_kernels.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_reg::cuda {

namespace {

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

template <class Table>
Plan<Table> plan_of(Pass pass, const Call& call) {
  switch (pass) {
#define FUSED_REG_PLAN(name, terms, numbers) \
  case Pass::k##name:                        \
    return plan_of<Table, name##Pass, terms, numbers>(call);
    FUSED_REG_PASSES(FUSED_REG_PLAN)
#undef FUSED_REG_PLAN
    default:
      break;
  }
  return {};
}

template <class Table>
cudaError_t launch_table(Pass pass, const Table& table, cudaStream_t stream) {
  const Plan<Table> plan = plan_of<Table>(pass, table.call);
  const uint32_t teams = rows_of(pass).numbers == kTermNumbers ? 1 : kWarps / table.call.team;  // of a CTA
  uint32_t ctas = 0;
  const cudaError_t error = resident_ctas((plan.work + teams - 1) / teams, &ctas);
  return error == cudaSuccess ? launch_on(ctas, stream, plan.kernel, table) : error;
}

template <size_t size>
cudaError_t launch_inline(Pass pass, const Call& call, const void* bytes, size_t count, cudaStream_t stream) {
  InlineTable<size> table;
  table.call = call;
  std::memcpy(table.bytes, bytes, count);
  return launch_table(pass, table, stream);
}

}  // namespace

std::string architectures() {
  std::string names;
  for (const int number : {__CUDA_ARCH_LIST__}) {  // 750, 800, ...
    names += (names.empty() ? "" : " ") + std::to_string(number / 100) + "." + std::to_string(number / 10 % 10);
  }
  return names;
}

cudaError_t launch(Pass pass, const Call& call, const void* table, size_t table_bytes, cudaStream_t stream) {
  if (table_bytes <= kSmallTable) {
    return launch_inline<kSmallTable>(pass, call, table, table_bytes, stream);
  }
  if (table_bytes <= kMediumTable) {
    return launch_inline<kMediumTable>(pass, call, table, table_bytes, stream);
  }
  if (table_bytes <= kLargeTable) {
    return launch_inline<kLargeTable>(pass, call, table, table_bytes, stream);
  }
  return launch_table(pass, DeviceTable{call, static_cast<const unsigned char*>(table)}, stream);
}

cudaError_t launch_tensor_sums(Pass pass, const Call& call, const void* device_table, TermSums* out,
                               cudaStream_t stream) {
  const DeviceTable table{call, static_cast<const unsigned char*>(device_table)};
  uint32_t ctas = 0;
  cudaError_t error = resident_ctas((call.tensors + kWarps - 1) / kWarps, &ctas);
  if (error == cudaSuccess && call.chunks > 0) {
    error = launch_table(pass, table, stream);
  }
  return error == cudaSuccess ? launch_on(ctas, stream, tensor_sums_kernel, table, out) : error;
}

cudaError_t upload(void* to, const void* table, size_t table_bytes, cudaStream_t stream) {
  for (size_t done = 0; done < table_bytes; done += sizeof(Piece)) {
    const size_t count = std::min(sizeof(Piece), table_bytes - done);
    Piece piece;
    std::memcpy(piece.words, static_cast<const unsigned char*>(table) + done, count);
    constexpr uint32_t kCtas = 8;
    const auto words = static_cast<unsigned>((count + sizeof(uint4) - 1) / sizeof(uint4));
    const cudaError_t error =
        launch_on(kCtas, stream, upload_kernel, static_cast<uint4*>(to) + done / sizeof(uint4), words, piece);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace fused_reg::cuda
