// A list of tensors as a kernel sees it, and what it shall do with it. Free of torch; host and device.
//
// The table is one run of bytes: an Entry for each tensor; a row of streams for each, the addresses of the parameter
// and of what else a pass reads and writes; numbers, a row for all tensors or one for each; and where Call.norms says
// that there are groups, a GroupInfo for each tensor. It travels in the kernel's arguments, or lies in device memory if
// it is longer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "../dtypes.h"
#include "../passes/pass.h"
#include "../summation.h"

namespace fused_reg::cuda {

struct Entry {
  uint32_t first_chunk;  // of the list's chunks; an empty tensor has the same as the next
  uint16_t tail;         // elements of the last chunk of every group; the tensor is one if there are none
  Dtype dtype;
  uint8_t adds;  // to the streams that are written, which are there
};
static_assert(std::has_unique_object_representations_v<Entry>);  // tables are compared byte for byte

// A number, or the address of one in device memory.
union NumberRef {
  double value;
  const void* address;
};

// What a NumberRef is: the value, or the address of a number of this dtype.
enum class Source : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kValue };

// The groups of a tensor, which are of equal size and follow on one another.
struct GroupInfo {
  int64_t size;          // elements of each
  uint32_t first;        // of them, in Call.norms
  uint32_t first_large;  // of them, among the list's groups of several chunks, if they are such
};
static_assert(std::has_unique_object_representations_v<GroupInfo>);

struct Call {
  uint32_t tensors;
  uint32_t chunks;
  uint32_t run_length;  // chunks
  uint32_t runs;

  bool numbers_per_tensor;
  Source sources[kNumbers];

  // What gradients are multiplied by: the upstream gradient, or a scale.
  Source factor_source;
  bool keep_if_one;  // the gradients are there already, for a factor of 1

  bool value_is_float64;
  bool has_further;       // the rows have the numbers of further terms
  uint8_t team;           // warps that take a chunk together: 1 or kWarps
  uint32_t large_groups;  // those of several chunks
  NumberRef factor;

  // The penalty: written to value by the CTA that is the last to finish. Null: nobody asks for it.
  double* run_sums;  // [runs + large_groups], scratch
  void* value;

  // [1 + large_groups]: how many CTAs have finished, and how many chunks of each large group. The last one takes the
  // count back to 0, for the next launch.
  unsigned* arrivals;

  double* norms;         // [groups], of all groups; null: there are no groups
  union {                // [chunks], scratch
    ScaledSum* squares;  // of the chunks of large groups
    TermSums* chunk_sums;
  };
};

// nvcc and the C++ compiler agree on the layout.
static_assert(sizeof(Entry) == 8 && sizeof(NumberRef) == 8 && sizeof(GroupInfo) == 16);
static_assert(sizeof(Call) == ((kNumbers + 25) / 4 + 2) / 2 * 8 + 48);

constexpr size_t kArgumentBytes = 32764;  // of a kernel; sm_70 and later
constexpr size_t kSmallTable = 4096 - sizeof(Call);
constexpr size_t kMediumTable = 12288 - sizeof(Call);  // what is sent takes time, and few lists need all of it
constexpr size_t kLargeTable = (kArgumentBytes - sizeof(Call)) / 8 * 8;

constexpr int kWarps = 4;  // of a CTA

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

// OF AN OPTIMIZER'S STEP the table is another: the numbers of the tensors, each as often as it differs from that
// before; then an Entry for each tensor, its streams, a StepOfTensor, and where there are groups a GroupInfo. The
// numbers change from step to step, and the rest does not: they travel in the arguments also where the rest is longer
// than these.
struct StepNumbersRow {
  NumberRef of[kNumbers];
  double rates[kRates];
  double count;  // of steps, with this one, of tensors whose own is on the host
  uint64_t options;
};

struct StepOfTensor {
  void* count;       // of the steps before this one, in device memory, to be counted on; null: its numbers have it
  uint32_t numbers;  // which
  uint32_t count_is_float64;
};
static_assert(std::has_unique_object_representations_v<StepOfTensor>);

struct StepCall {
  const unsigned char* numbers;  // in device memory; null: the arguments begin with them
  const unsigned char* tensors;  // the rest; null: it follows on the numbers
  uint32_t rows;                 // of numbers
  Source found_inf_source;
  bool is_alone;        // without the penalty
  NumberRef found_inf;  // not 0: nothing is done
};
static_assert(sizeof(StepNumbersRow) == 48 + 8 * kNumbers && sizeof(StepOfTensor) == 16 && sizeof(StepCall) == 32);

constexpr size_t kSmallStep = kSmallTable - sizeof(StepCall);
constexpr size_t kMediumStep = kMediumTable - sizeof(StepCall);
constexpr size_t kLargeStep = kLargeTable - sizeof(StepCall);

template <size_t size>
struct StepTable {
  Call call;
  StepCall step;
  alignas(8) unsigned char bytes[size];
};

}  // namespace fused_reg::cuda
