// The launches of the kernels.
#include <algorithm>

#include "../build_info.h"
#include "group_kernels.cuh"
#include "kernels.h"

namespace fused_reg::cuda {

namespace {

template <class... Parameters, class... Arguments>
cudaError_t launch_on(uint32_t ctas, cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// As many CTAs as the device holds at a time, and no more than there is work for.
cudaError_t resident_ctas(uint32_t work, uint32_t* ctas) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *ctas = std::min<uint32_t>(work, multiprocessors * kCtasPerSm);
  return error;
}

template <class Table>
auto sums_kernel_of(Sums sums) {
  switch (sums) {
    case Sums::kPenalty:
    case Sums::kTerms:
      return sums_kernel<Table, TermSumsJob>;
    case Sums::kSoftSquares:
    case Sums::kZeros:
      break;
  }
  return sums_kernel<Table, OneSumJob>;
}

template <class Table>
auto kernel_of(Kernel kernel, Sums sums) {
  switch (kernel) {
    case Kernel::kPenalty:
      return penalty_kernel<Table, PenaltyJob>;
    case Kernel::kAccumulate:
      return penalty_kernel<Table, AccumulateJob>;
    case Kernel::kGradient:
      return gradient_kernel<Table>;
    case Kernel::kSums:
      return sums_kernel_of<Table>(sums);
    case Kernel::kNormGradient:
      return norm_gradient_kernel<Table>;
    case Kernel::kProx:
      break;
  }
  return prox_kernel<Table>;
}

// What the CTAs of a kernel share out.
uint32_t work_of(Kernel kernel, const Call& call) {
  switch (kernel) {
    case Kernel::kPenalty:
    case Kernel::kAccumulate:
    case Kernel::kSums:
      return call.runs;
    case Kernel::kGradient:
    case Kernel::kNormGradient:
    case Kernel::kProx:
      return call.chunks;
  }
  return 0;
}

template <class Table>
cudaError_t launch_table(Kernel kernel, const Table& table, cudaStream_t stream) {
  const uint32_t work = work_of(kernel, table.call);
  const uint32_t teams = strengths_of(kernel) == kTermStrengths ? 1 : kWarps / table.call.team;  // of a CTA
  uint32_t ctas = 0;
  const cudaError_t error = resident_ctas((work + teams - 1) / teams, &ctas);
  return error == cudaSuccess ? launch_on(ctas, stream, kernel_of<Table>(kernel, table.call.sums), table) : error;
}

template <size_t size>
cudaError_t launch_inline(Kernel kernel, const Call& call, const void* bytes, size_t count, cudaStream_t stream) {
  InlineTable<size> table;
  table.call = call;
  std::memcpy(table.bytes, bytes, count);
  return launch_table(kernel, table, stream);
}

// Told to the build information while the library is loaded.
const bool registered = [] {
  constexpr int architectures[] = {__CUDA_ARCH_LIST__};  // 750, 800, ...
  set_cuda_architectures(architectures, std::size(architectures));
  return true;
}();

}  // namespace

cudaError_t launch(Kernel kernel, const Call& call, const void* table, size_t table_bytes, cudaStream_t stream) {
  if (table_bytes <= kSmallTable) {
    return launch_inline<kSmallTable>(kernel, call, table, table_bytes, stream);
  }
  if (table_bytes <= kLargeTable) {
    return launch_inline<kLargeTable>(kernel, call, table, table_bytes, stream);
  }
  return launch_table(kernel, DeviceTable{call, static_cast<const unsigned char*>(table)}, stream);
}

cudaError_t launch_tensor_sums(const Call& call, const void* device_table, void* out, cudaStream_t stream) {
  const DeviceTable table{call, static_cast<const unsigned char*>(device_table)};
  uint32_t ctas = 0;
  cudaError_t error = resident_ctas((call.tensors + kWarps - 1) / kWarps, &ctas);
  if (error == cudaSuccess && call.chunks > 0) {
    error = launch_table(Kernel::kSums, table, stream);
  }
  return error == cudaSuccess ? launch_on(ctas, stream, tensor_sums_kernel, table, out) : error;
}

cudaError_t upload(void* to, const void* table, size_t table_bytes, cudaStream_t stream) {
  for (size_t done = 0; done < table_bytes; done += sizeof(Piece)) {
    const size_t count = std::min(sizeof(Piece), table_bytes - done);
    Piece piece;
    std::memcpy(piece.bytes, static_cast<const unsigned char*>(table) + done, count);
    constexpr uint32_t kCtas = 8;
    const cudaError_t error = launch_on(kCtas, stream, upload_kernel, static_cast<unsigned char*>(to) + done,
                                        static_cast<unsigned>(count), piece);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return cudaSuccess;
}

}  // namespace fused_reg::cuda
