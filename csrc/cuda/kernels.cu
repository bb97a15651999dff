// The launches that are not of one pass alone; those of the passes are compiled with their kernels, in files of their
// own.
#include "group_kernels.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace fused_reg::cuda {

// The sums of every tensor, [tensors], from those of its chunks: a warp a tensor.
static __global__ void __launch_bounds__(kThreads) tensor_sums_kernel(const DeviceTable table, TermSums* out) {
  const int thread = threadIdx.x % kWarp;
  const TableView<DeviceTable, 1, kGroupNumbers> view(table);
  const Call& call = table.call;
  for (uint32_t t = blockIdx.x * kWarps + threadIdx.x / kWarp; t < call.tensors; t += gridDim.x * kWarps) {
    const uint32_t end = t + 1 < call.tensors ? view.entry(t + 1).first_chunk : call.chunks;
    CompensatedSum sums[kSums]{};
    for (uint32_t c = view.entry(t).first_chunk + thread; c < end; c += kWarp) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        sums[i].add(call.chunk_sums[c].of[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const double sum = result(warp_sum(sums[i]));
      if (thread == 0) {
        out[t].of[i] = sum;
      }
    }
  }
}

// A piece of a table, from the arguments into device memory: unlike a copy from the host, it waits for nothing, and a
// graph can capture it.
constexpr size_t kPieceWords = kLargeTable / sizeof(uint4);
struct Piece {
  uint4 words[kPieceWords];
};

static __global__ void __launch_bounds__(kThreads)
    upload_kernel(uint4* to, unsigned words, const __grid_constant__ Piece piece) {
  for (unsigned i = blockIdx.x * kThreads + threadIdx.x; i < words; i += gridDim.x * kThreads) {
    to[i] = piece.words[i];
  }
}

std::string architectures() {
  std::string names;
  for (const int number : {__CUDA_ARCH_LIST__}) {  // 750, 800, ...
    names += (names.empty() ? "" : " ") + std::to_string(number / 100) + "." + std::to_string(number / 10 % 10);
  }
  return names;
}

cudaError_t launch(Pass pass, const Call& call, const void* table, size_t table_bytes, cudaStream_t stream) {
  switch (pass) {
#define FUSED_REG_LAUNCH(name, terms, numbers) \
  case Pass::k##name:                          \
    return launch<Pass::k##name>(call, table, table_bytes, stream);
    FUSED_REG_PASSES(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH
    default:
      return cudaErrorInvalidDeviceFunction;
  }
}

cudaError_t launch_tensor_sums(Pass pass, const Call& call, const void* device_table, TermSums* out,
                               cudaStream_t stream, bool is_relative) {
  const DeviceTable table{call, static_cast<const unsigned char*>(device_table)};
  uint32_t ctas = 0;
  cudaError_t error = resident_ctas(tensor_sums_kernel, (call.tensors + kWarps - 1) / kWarps, &ctas);
  if (error == cudaSuccess && call.chunks > 0) {
    error = is_relative ? launch_relative(pass, call, device_table, stream)
                        : launch(pass, call, device_table, kOnDevice, stream);
  }
  return error == cudaSuccess ? launch_on(ctas, stream, tensor_sums_kernel, table, out) : error;
}

cudaError_t launch_step(Pass optimizer, bool has_any, const Call& call, const StepCall& step, const void* bytes,
                        size_t count, cudaStream_t stream) {
  switch (optimizer) {
#define FUSED_REG_LAUNCH(name, terms, numbers) \
  case Pass::k##name:                          \
    return launch_step<Pass::k##name>(has_any, call, step, bytes, count, stream);
    FUSED_REG_STEPS(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH
    default:
      return cudaErrorInvalidDeviceFunction;
  }
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
