// A list of tensors as a kernel sees it, and what it shall do with it. Free of torch; host and device.
//
// The table is one run of bytes: an Entry for each tensor, then the strengths, one pair for all or one for each. It
// travels in the kernel's arguments, or lies in device memory if it is longer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "../summation.h"

namespace fused_reg::cuda {

struct Entry {
  const void* param;
  void* grad;            // as many elements, to be written; null: none
  uint32_t first_chunk;  // of the list's chunks; an empty tensor has the same as the next
  uint16_t tail;         // elements of the last chunk
  Dtype dtype;
  uint8_t unused;  // tables are compared byte for byte
};
static_assert(std::has_unique_object_representations_v<Entry>);

// A strength, or the address of one in device memory.
union StrengthRef {
  double value;
  const void* address;
};

struct StrengthPair {
  StrengthRef l1, l2;
};

// What a StrengthRef is: the value, or the address of a number of this dtype.
enum class Source : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kValue };

struct Call {
  uint32_t tensors;
  uint32_t chunks;
  bool strength_per_tensor;
  Source l1_source, l2_source;

  // The penalty: written to value by the last of the CTAs, which the ticket finds.
  uint32_t run_length;  // chunks
  uint32_t runs;
  double* run_sums;  // [runs], scratch
  void* value;
  bool value_is_float64;
  uint32_t ticket;

  // The sums of terms, instead of the penalty, if not null.
  ChunkSums* chunk_sums;  // [chunks], scratch

  // The gradient alone.
  const void* upstream;
  Source upstream_source;
  bool keep_if_one;  // the gradients are there already, for an upstream gradient of 1
};

// nvcc and the C++ compiler agree on the layout.
static_assert(sizeof(Entry) == 24 && sizeof(StrengthPair) == 16 && sizeof(Call) == 72);

constexpr size_t kArgumentBytes = 32764;  // of a kernel; sm_70 and later
constexpr size_t kSmallTable = 4096 - sizeof(Call);
constexpr size_t kLargeTable = (kArgumentBytes - sizeof(Call)) / 8 * 8;

constexpr uint32_t kMaxTickets = 1 << 16;

// A table in the arguments of the kernel.
template <size_t size>
struct InlineTable {
  Call call;
  alignas(8) unsigned char bytes[size];
};

// A table in device memory.
struct DeviceTable {
  Call call;
  const unsigned char* bytes;
};

}  // namespace fused_reg::cuda
