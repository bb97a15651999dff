// What outlives a launch: tickets and long tables. Both belong to a device and a stream, on which launches follow one
// another; a launch that is being captured in a graph has its own, because replays may run at any time.
#pragma once

#include <list>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "check_launch.h"
#include "kernels.h"
#include "torch_compat.h"

namespace fused_reg::cuda {

struct Launch {
  c10::cuda::CUDAStream stream;
  bool capturing;
};

constexpr size_t kTablesKept = 4;  // for each stream: a model's forward and backward, and another's

struct KeptTable {
  std::vector<unsigned char> bytes;
  at::Tensor memory;
};

struct OfStream {
  std::optional<uint32_t> ticket;
  std::list<KeptTable> tables;  // last used first
};

struct State {
  std::mutex mutex;
  uint32_t tickets = 0;  // given out
  std::map<std::pair<c10::DeviceIndex, c10::StreamId>, OfStream> streams;

  OfStream& of(const Launch& launch) { return streams[{launch.stream.device_index(), launch.stream.id()}]; }
};

inline State& state() {
  static auto* const s = new State;  // never destroyed: CUDA may be gone by then
  return *s;
}

inline void upload_to(const at::Tensor& memory, const std::vector<unsigned char>& bytes, const Launch& launch) {
  check_launch(upload(memory.mutable_data_ptr(), bytes.data(), bytes.size(), launch.stream), launch.stream.device());
}

inline at::Tensor uploaded(const std::vector<unsigned char>& bytes, const Launch& launch) {
  at::Tensor memory =
      at::detail::empty_cuda({static_cast<int64_t>(bytes.size())}, at::kByte, launch.stream.device(), std::nullopt);
  upload_to(memory, bytes, launch);
  return memory;
}

// The launch that comes next on the current stream.
inline Launch next_launch() {
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  cudaStreamCaptureStatus status{};
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return {stream, status != cudaStreamCaptureStatusNone};
}

// A ticket that no other launch uses at the same time.
inline uint32_t ticket_for(const Launch& launch) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto fresh = [&] {
    TORCH_CHECK(s.tickets < kMaxTickets, "fused_reg: a process can capture at most ", kMaxTickets,
                " calls in CUDA graphs");
    return s.tickets++;
  };
  if (launch.capturing) {
    return fresh();
  }
  std::optional<uint32_t>& own = s.of(launch).ticket;
  return own ? *own : own.emplace(fresh());
}

// The table in device memory: the one that is there already if it has the same bytes, else uploaded.
inline at::Tensor device_table(const std::vector<unsigned char>& bytes, const Launch& launch) {
  if (launch.capturing) {
    return uploaded(bytes, launch);
  }
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  std::list<KeptTable>& tables = s.of(launch).tables;
  for (auto it = tables.begin(); it != tables.end(); ++it) {
    if (it->bytes == bytes) {
      tables.splice(tables.begin(), tables, it);
      return it->memory;
    }
  }
  if (tables.size() == kTablesKept && tables.back().bytes.size() == bytes.size() &&
      tables.back().memory.use_count() == 1) {  // no other thread is about to launch with it
    // Over the last one, so that nothing is allocated, and the next step's gradients come to lie where this step's do.
    tables.splice(tables.begin(), tables, std::prev(tables.end()));
    tables.front().bytes.clear();  // no table, if the upload fails
    upload_to(tables.front().memory, bytes, launch);
    tables.front().bytes = bytes;
    return tables.front().memory;
  }
  tables.push_front({bytes, uploaded(bytes, launch)});
  if (tables.size() > kTablesKept) {
    tables.pop_back();
  }
  return tables.front().memory;
}

}  // namespace fused_reg::cuda
