// Device memory that outlives a call: counters of those that have arrived (table.h), and long tables. It is of our own,
// since what torch's allocator gives may belong to a pool that ends before (torch.cuda.use_mem_pool, CUDA graphs of
// torch.compile).
//
// It belongs to a device and a stream, on which launches follow one another; or to the graph that captures a launch,
// because replays may run at any time.
#pragma once

#include <algorithm>
#include <atomic>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

#include "check_launch.h"
#include "kernels.h"
#include "torch_compat.h"

namespace fused_reg::cuda {

struct Launch {
  c10::cuda::CUDAStream stream;
  cudaGraph_t graph;  // captures it; null: it runs
};

// The launch that comes next on the current stream.
inline Launch next_launch() {
  Launch launch{c10::cuda::getCurrentCUDAStream(), nullptr};
  cudaStreamCaptureStatus status{};
  cudaGraph_t graph{};
#if CUDART_VERSION >= 13000
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(launch.stream, &status, nullptr, &graph));
#else
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo_v2(launch.stream, &status, nullptr, &graph));
#endif
  if (status == cudaStreamCaptureStatusActive) {
    launch.graph = graph;
  }
  return launch;
}

// This thread may allocate and wait while any stream is being captured.
class BesideCaptures {
 public:
  BesideCaptures() { C10_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  ~BesideCaptures() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// It goes to the free list with its last owner, without a call of CUDA: what a graph owns ends where none is allowed.
using Memory = std::shared_ptr<void>;

// Memory that was allocated and is not used now. Sizes are powers of two, so that others can use it.
class FreeList {
 public:
  static size_t rounded(size_t bytes) {
    size_t size = 512;
    while (size < bytes) {
      size *= 2;
    }
    return size;
  }

  Memory take(const Launch& next, size_t bytes) {
    const Key key{next.stream.device_index(), rounded(bytes)};
    void* data = pop(key);
    if (data == nullptr) {
      data = allocated(key.second, next);
    }
    return {data, [this, key](void* p) { push(key, p); }};
  }

 private:
  using Key = std::pair<c10::DeviceIndex, size_t>;

  static void* allocated(size_t bytes, const Launch& next) {
    const BesideCaptures beside;
    void* data = nullptr;
    cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaErrorMemoryAllocation && next.graph == nullptr) {  // torch may hold all, though it uses less
      (void)cudaGetLastError();
      c10::cuda::CUDACachingAllocator::emptyCache();
      error = cudaMalloc(&data, bytes);
    }
    C10_CUDA_CHECK(error);
    return data;
  }

  void* pop(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<void*>& all = blocks_[key];
    if (all.empty()) {
      return nullptr;
    }
    void* const data = all.back();
    all.pop_back();
    return data;
  }

  void push(const Key& key, void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_[key].push_back(data);
  }

  std::mutex mutex_;  // no call of CUDA is made under it
  std::map<Key, std::vector<void*>> blocks_;
};

constexpr size_t kTablesKept = 4;  // of each size, for each stream: a model's forward and backward, and another's

struct KeptTable {
  std::vector<unsigned char> bytes;
  Memory memory;
};

// By size.
struct OfStream {
  std::map<size_t, Memory> arrivals;
  std::map<size_t, std::list<KeptTable>> tables;  // last used first
};

struct State {
  std::mutex mutex;
  std::map<std::tuple<c10::DeviceIndex, c10::StreamId, uint64_t>, OfStream> streams;
  std::map<c10::DeviceIndex, cudaStream_t> copies;  // streams of our own

  OfStream& of(const c10::cuda::CUDAStream& stream) {
    return streams[{stream.device_index(), stream.id(), thread_of(stream)}];
  }

 private:
  // The default stream of a thread, which has one name in all of them; else 0.
  static uint64_t thread_of(cudaStream_t stream) {
    static std::atomic<uint64_t> threads{0};
    thread_local const uint64_t own = ++threads;
    return stream == cudaStreamPerThread ? own : 0;
  }
};

// Never destroyed: CUDA may be gone by then.
inline State& state() {
  static auto* const s = new State;
  return *s;
}
inline FreeList& free_list() {
  static auto* const list = new FreeList;
  return *list;
}

// Memory with these bytes, which are there once this returns, and in no graph. Under the state's mutex.
inline Memory placed(const std::vector<unsigned char>& bytes, const Launch& launch) {
  const BesideCaptures beside;
  Memory memory = free_list().take(launch, bytes.size());
  cudaStream_t& copies = state().copies[launch.stream.device_index()];
  if (copies == nullptr) {
    C10_CUDA_CHECK(cudaStreamCreateWithFlags(&copies, cudaStreamNonBlocking));
  }
  C10_CUDA_CHECK(cudaMemcpyAsync(memory.get(), bytes.data(), bytes.size(), cudaMemcpyHostToDevice, copies));
  C10_CUDA_CHECK(cudaStreamSynchronize(copies));
  return memory;
}

// The same for a launch that is being captured. The graph owns it, with whatever is made of the graph.
inline Memory placed_for_graph(const std::vector<unsigned char>& bytes, const Launch& launch) {
  Memory memory = placed(bytes, launch);
  auto owner = std::make_unique<Memory>(memory);
  const auto destroy = [](void* p) { delete static_cast<Memory*>(p); };
  cudaUserObject_t object{};
  C10_CUDA_CHECK(cudaUserObjectCreate(&object, owner.get(), destroy, 1, cudaUserObjectNoDestructorSync));
  owner.release();
  const cudaError_t error = cudaGraphRetainUserObject(launch.graph, object, 1, 0);
  C10_CUDA_CHECK(cudaUserObjectRelease(object, 1));  // the graph holds it, if anyone
  C10_CUDA_CHECK(error);
  return memory;
}

// So many counters, which are 0 and which no other launch uses at the same time.
inline unsigned* arrivals_for(const Launch& launch, size_t count) {
  const size_t size = FreeList::rounded(count * sizeof(unsigned));
  const auto zeros = [&] { return std::vector<unsigned char>(size); };
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (launch.graph != nullptr) {
    return static_cast<unsigned*>(placed_for_graph(zeros(), launch).get());
  }
  Memory& own = s.of(launch.stream).arrivals[size];
  if (own == nullptr) {
    own = placed(zeros(), launch);
  }
  return static_cast<unsigned*>(own.get());
}

// The table in device memory: the one that is there already if it has the same bytes, else uploaded. To be held until
// the launch.
inline Memory device_table(const std::vector<unsigned char>& bytes, const Launch& launch) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (launch.graph != nullptr) {
    return placed_for_graph(bytes, launch);
  }
  std::list<KeptTable>& tables = s.of(launch.stream).tables[FreeList::rounded(bytes.size())];
  for (auto it = tables.begin(); it != tables.end(); ++it) {
    if (it->bytes == bytes) {
      tables.splice(tables.begin(), tables, it);
      return it->memory;
    }
  }
  if (tables.size() >= kTablesKept && tables.back().memory.use_count() == 1) {  // no thread is about to launch with it
    tables.splice(tables.begin(), tables, std::prev(tables.end()));
  } else {
    tables.push_front({{}, free_list().take(launch, bytes.size())});
  }
  KeptTable& table = tables.front();
  table.bytes.clear();  // no table, if the upload fails
  check_launch(upload(table.memory.get(), bytes.data(), bytes.size(), launch.stream), launch.stream.device());
  table.bytes = bytes;
  return table.memory;
}

}  // namespace fused_reg::cuda
