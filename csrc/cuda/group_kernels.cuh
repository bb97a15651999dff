// The kernels that know groups and their norms, and those of whatever else a list can be asked for.
//
// A team of warps takes a chunk: a whole CTA, or one warp where chunks are short, as rows are.
#pragma once

#include "penalty_kernels.cuh"
#include "strips.cuh"

namespace fused_reg::cuda {

// The halving tree over one sum in every thread of a warp; the first thread has the result.
__device__ __forceinline__ CompensatedSum warp_sum(CompensatedSum sum) {
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    sum.add(CompensatedSum{__shfl_xor_sync(kAll, sum.sum, half), __shfl_xor_sync(kAll, sum.error, half)});
  }
  return sum;
}

// The sum of squares of a group of several chunks, in every thread of a warp: as sum_of() in summation.h.
__device__ __forceinline__ ScaledSum group_squares(const ScaledSum* chunks, uint32_t count) {
  static_assert(kTensorColumns == kWarp);
  const uint32_t thread = threadIdx.x % kWarp;
  int exponent = __ldcg(&chunks[0].exponent), lowest = exponent;
  CompensatedSum sum{};
#pragma unroll 8
  for (uint32_t c = thread; c < count; c += kWarp) {
    const int own = __ldcg(&chunks[c].exponent);
    exponent = own > exponent ? own : exponent;
    lowest = own < lowest ? own : lowest;
    sum.add(__ldcg(&chunks[c].sum));
  }
#pragma unroll
  for (int half = kWarp / 2; half > 0; half /= 2) {
    const int higher = __shfl_xor_sync(kAll, exponent, half), lower = __shfl_xor_sync(kAll, lowest, half);
    exponent = higher > exponent ? higher : exponent;
    lowest = lower < lowest ? lower : lowest;
  }
  if (lowest != exponent) {
    sum = {};
    for (uint32_t c = thread; c < count; c += kWarp) {
      sum.add(std::ldexp(__ldcg(&chunks[c].sum), 2 * (__ldcg(&chunks[c].exponent) - exponent)));
    }
  }
  return {__shfl_sync(kAll, result(warp_sum(sum)), 0), exponent};
}

// Chunk c of a group of several chunks, `norm` of all norms, has these squares: a warp takes them there. That of the
// last chunk also finds the norm, and the penalty, which goes behind the sums of the runs.
template <class Cursor>
__device__ __forceinline__ void add_to_large_group(const Cursor& cursor, uint32_t c, uint32_t norm,
                                                   const ScaledSum& squares) {
  const Call& call = cursor.view().call();
  const LargeGroup group = cursor.large_group(c);
  bool is_last = false;
  if (threadIdx.x % kWarp == 0) {
    call.squares[c] = squares;
    is_last = is_last_to_arrive(call.arrivals + 1 + group.index, group.chunks);
  }
  if (!__shfl_sync(kAll, is_last, 0)) {
    return;
  }
  __syncwarp();
  const ScaledSum of_group = group_squares(call.squares + group.first_chunk, group.chunks);
  if (threadIdx.x % kWarp == 0) {
    call.norms[norm] = norm_of(of_group);
    if (call.value != nullptr) {
      call.run_sums[call.runs + group.index] = norm_penalty(cursor.number(kNormStrength), of_group);
    }
  }
}

// The sums of a pass over a chunk, of P's second one where `has_second`; those that have left the range of float64 are
// taken again. Of a team's two places `filled` is the one that nobody reads.
template <template <int> class P, int known, class AnyChunk>
__device__ __forceinline__ ChunkSums sums_of(const AnyChunk& chunk, Blocks* blocks, const Team& team,
                                             const ChunkNumbers& numbers, bool has_second, int* filled) {
  for (int exponent = 0;;) {
    Blocks* const place = blocks + (team.warps() == 1 ? threadIdx.x / kWarp : *filled);
    run_chunk<P, known, true>(chunk, place, team, numbers, exponent);
    team.sync();
    const PassSums sums = total(*place, chunk.blocks(), threadIdx.x % kWarp);
    if (team.warps() == 1) {
      __syncwarp();
    }
    *filled = 1 - *filled;
    const bool may_leave = !std::is_void_v<typename P<known>::Sums> &&
                           (P<known>::kOfAnyDtype || chunk.dtype == Dtype::kFloat64) && exponent == 0;
    bool may_be_small = has_second;
    if constexpr (P<known>::kIsRelative && P<known>::kSumFactors != 0) {
      may_be_small = has_second && chunk.streams[kImportance] == nullptr;
    }
    const int again = may_leave ? rescue_exponent(sums.of[0], sums.of[1], may_be_small) : 0;
    if (again == 0) {
      return {{{sums.of[0], exponent}, {sums.of[1], exponent}}};
    }
    exponent = again;
  }
}

// CTAs that are resident, at least: three where numbers, or the loads of sums after the soft threshold, take registers.
template <class Pass, int numbers_of_pass>
constexpr int kSumsCtas = numbers_of_pass > kGroupNumbers || (Pass::kSums == kL2 && !Pass::kIsCount)
                              ? 3
                              : kSummingCtasPerSm;

// The sums of a pass, of every chunk and group; and where Call.value asks for it, the penalty of the list. With all
// numbers it takes those of further terms, too. With strips a team takes runs that follow on one another.
template <class Table, template <int> class P, int known, int numbers_of_pass>
__global__ void __launch_bounds__(kThreads, kSumsCtas<P<known>, numbers_of_pass>)
    sums_kernel(const __grid_constant__ Table table) {
  __shared__ Blocks blocks[kWarps];            // a CTA fills one while another is summed; a warp alone has its own
  __shared__ CompensatedSum run_sums[kWarps];  // of the first thread of a team alone; spares the others registers
  CompensatedSum& run_sum = run_sums[threadIdx.x / kWarp];
  constexpr int kRelativeBit = known & kRelative;
  constexpr bool kHasSecond = known == kNone || kRelativeBit != 0;
  constexpr bool kStrips = kHasStrips<P<known>, numbers_of_pass>;
  const Call& call = table.call;
  const Team team(call.team);
  const uint32_t each = kStrips ? runs_in_turn(call, team) : 1;
  const auto add_to_run = [&](uint32_t c, double penalty) {
    run_sum.add(penalty);
    if (kStrips && (c + 1 == call.chunks || (c + 1) % call.run_length == 0)) {
      call.run_sums[c / call.run_length] = result(run_sum);
      run_sum = {};
    }
  };
  int filled = 0;
  for (uint32_t r = team.index() * each; r < call.runs; r += team.count() * each) {
    uint32_t c = r * call.run_length, taken = 1;
    const auto end = [&] { return kStrips ? smaller((r + each) * call.run_length, call.chunks) : run_end(call, r); };
    Cursor<TableView<Table, streams_of<P<known>>, numbers_of_pass>> cursor(table, c);
    if (team.is_first_thread()) {
      run_sum = {};
    }
    for (; c < end(); c += taken) {
      const auto chunk = cursor.at(c);
      ChunkNumbers numbers = cursor.numbers(1, 0);
      const bool is_report = call.norms == nullptr && call.value == nullptr;
      numbers.terms |= is_report ? kL1L2 : call.norms != nullptr ? kL2 : kNone;
      if constexpr (kStrips) {
        taken = call.norms == nullptr || team.warps() != 1 ? 1 : cursor.strip(chunk, c, end());
        if (taken > 1) {
          sum_strip<P, known>(call, chunk, taken, &blocks[threadIdx.x / kWarp], numbers, [&](int g, double penalty) {
            if (team.is_first_thread()) {
              add_to_run(c + g, penalty);
            }
          });
          continue;
        }
      }
      ChunkSums sums = sums_of<P, known>(chunk, blocks, team, numbers, kHasSecond || (numbers.terms & kL2), &filled);
      if constexpr (numbers_of_pass > kGroupNumbers) {
        FurtherTerms::each([&](auto term) {
          using T = decltype(term);
          if (numbers.terms & T::kBit) {
            const ScaledSum sum =
                sums_of<TermSum<T>::template Pass, kRelativeBit>(chunk, blocks, team, numbers, true, &filled).of[1];
            sums.of[T::kSum] = {sum.sum, T::result_exponent(numbers, sum.exponent)};
          }
        });
      }
      if (team.is_first_thread()) {
        const ScaledSum& squares = sums.of[L2::kSum];
        if (call.value != nullptr) {
          // Relative sums, and those after the soft threshold, need the registers: their numbers are read once more.
          const ChunkNumbers own = kHasSecond ? cursor.numbers(1, 0) : numbers;
          add_to_run(c, SummedTerms::penalty(own.of, sums.of) +
                            (chunk.is_group ? norm_penalty(own.of[kNormStrength], squares) : 0));
        }
        if (is_report) {
          call.chunk_sums[c] = unscaled(sums);
        } else if (call.norms != nullptr && chunk.is_group) {
          call.norms[chunk.group] = norm_of(squares);
        }
      }
      if (call.norms != nullptr && !chunk.is_group && team.warp() == 0) {
        add_to_large_group(cursor, c, chunk.group, sums.of[L2::kSum]);
      }
    }
    if (!kStrips && call.value != nullptr && team.is_first_thread()) {
      call.run_sums[r] = result(run_sum);
    }
  }
  if (call.value == nullptr) {
    return;
  }
  __syncthreads();
  if (is_last_cta(call)) {
    write_value(call);
  }
}

// A pass without sums over the chunks of a list that may have groups with norms, if Call.norms says so, and further
// terms.
template <class Table, template <int> class P, int known, int numbers_of_pass>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) group_element_kernel(const __grid_constant__ Table table) {
  constexpr int kUsed = streams_of<P<known>>, kWritten = streams_in(P<known>::kWrites);
  const Call& call = table.call;
  const Team team(call.team);
  const double factor = read(call.factor, call.factor_source);
  if (call.keep_if_one && factor == 1) {
    return;
  }
  for (uint32_t c = team.index(); c < call.chunks; c += team.count()) {
    Cursor<TableView<Table, kUsed, numbers_of_pass>> cursor(table, c);
    const auto chunk = cursor.at(c);
    if (chunk.streams[kWritten - 1] == nullptr) {
      continue;
    }
    const double norm = call.norms == nullptr ? 0 : call.norms[chunk.group];
    run_chunk<P, known>(chunk, nullptr, team, cursor.numbers(factor, norm));
  }
}

}  // namespace fused_reg::cuda
