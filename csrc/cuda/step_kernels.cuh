// The kernel of an optimizer's step: the step, and the penalty before it. Device code, and no torch.
//
// A CTA takes a chunk at a time, as penalty_kernel does. What the numbers of a tensor come to is found by one thread,
// in shared memory, where the last tensor had others. The last CTA counts the steps on the device.
#pragma once

#include "jobs.cuh"
#include "value.cuh"

namespace fused_reg::cuda {

// A table of a step, with so many streams; of any terms and groups, or of L1 and L2.
template <class Table, int streams, bool has_any>
class StepView {
 public:
  static constexpr int kStreams = streams, kNumbers = has_any ? fused_reg::kNumbers : kGroupNumbers;
  static constexpr bool kHasGroups = has_any;

  __device__ explicit StepView(const Table& table) : table_(table) {}

  __device__ const Call& call() const { return table_.call; }
  __device__ const Entry& entry(uint32_t t) const { return reinterpret_cast<const Entry*>(tensors())[t]; }

  __device__ void* stream(uint32_t t, int s) const {
    return reinterpret_cast<void* const*>(tensors() + call().tensors * sizeof(Entry))[t * streams + s];
  }

  __device__ const StepOfTensor& of(uint32_t t) const {
    const size_t before = call().tensors * (sizeof(Entry) + streams * sizeof(void*));
    return reinterpret_cast<const StepOfTensor*>(tensors() + before)[t];
  }
  __device__ const GroupInfo& group_info(uint32_t t) const {
    return reinterpret_cast<const GroupInfo*>(&of(call().tensors))[t];
  }
  __device__ const StepNumbersRow& row(uint32_t t) const {
    const unsigned char* const begin = table_.step.numbers == nullptr ? table_.bytes : table_.step.numbers;
    return reinterpret_cast<const StepNumbersRow*>(begin)[of(t).numbers];
  }
  __device__ double number(uint32_t t, int which) const { return read(row(t).of[which], call().sources[which]); }

  // The steps, with this one.
  __device__ double count(uint32_t t) const {
    const StepOfTensor& own = of(t);
    return own.count == nullptr        ? row(t).count
           : own.count_is_float64 != 0 ? *static_cast<const double*>(own.count) + 1
                                       : static_cast<double>(*static_cast<const float*>(own.count) + 1);
  }

 private:
  __device__ const unsigned char* tensors() const {
    return table_.step.tensors == nullptr ? table_.bytes + table_.step.rows * sizeof(StepNumbersRow)
                                          : table_.step.tensors;
  }

  const Table& table_;
};

// All warps of a CTA, for one chunk: nothing that comes from the thread's index is kept in registers from one to the
// next, which the elements need.
class CtaAnew {
 public:
  __device__ CtaAnew() : thread_(threadIdx.x) { asm volatile("" : "+r"(thread_)); }
  __device__ int warps() const { return kWarps; }
  __device__ int warp() const { return thread_ / kWarp; }
  __device__ int lane() const { return thread_ % kWarp; }

 private:
  int thread_;
};

// A chunk and what it needs, found by the first thread for all of a CTA.
template <class Pass>
struct StepShared {
  static constexpr int kStreams = streams_in(Pass::kReads);
  static constexpr bool kHasAny = Pass::kSums == 0;
  Chunk<kStreams> chunk;
  StepNumbers numbers;
  uint32_t row;  // of numbers in the table
  bool is_wide;
  union {
    float of32[Pass::kFactors];
    double of64[Pass::kFactors];
  } factors;

  __device__ void clear() { row = ~0u; }

  // The numbers are found where the last chunk had others.
  template <class Table>
  __device__ void set(const Table& table, uint32_t c) {
    Cursor<StepView<Table, kStreams, kHasAny>> cursor(table, c);
    chunk = cursor.at(c);
    const auto& view = cursor.view();
    const uint32_t t = cursor.tensor();
    const double count = view.count(t);
    const double norm = kHasAny && view.call().norms != nullptr ? view.call().norms[chunk.group] : 0;
    const bool wide = chunk.dtype == Dtype::kFloat64;
    if (row == view.of(t).numbers && numbers.step[kCount] == count && numbers.norm == norm && is_wide == wide) {
      return;
    }
    const StepNumbersRow& own = view.row(t);
    row = view.of(t).numbers;
    is_wide = wide;
    StepNumbers found;
    static_cast<ChunkNumbers&>(found) = cursor.numbers(1, norm);
    found.terms = table.step.is_alone ? kNone : found.terms;
#pragma unroll
    for (int i = 0; i < kRates; ++i) {
      found.step[i] = own.rates[i];
    }
    found.step[kCount] = count;
    found.step[kGradScale] = read(view.call().factor, view.call().factor_source);
    found.options = static_cast<unsigned>(own.options);
    found.options = options_of(found);
    if (wide) {
      find(found, factors.of64);
    } else {
      find(found, factors.of32);
    }
    numbers = found;
  }

 private:
  // Without a penalty no step is proximal, and -0.0 is added to the gradient, which changes no bit of it.
  template <class S>
  static __device__ void find(StepNumbers& numbers, S* factors) {
    Pass::factors(numbers, factors);
    if (numbers.terms == kNone) {
      numbers.options &= ~(kProximal | kPreconditioned);
      factors[0] = static_cast<S>(-0.0);
    }
  }
};

// A step as ChunkPass runs it, which also sums some terms before it.
template <Dtype dtype, class Pass>
class StepJob {
  using Sums = Job<dtype, PenaltyPass, kL1L2, false>;

 public:
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  static constexpr unsigned kSums = Pass::kSums, kReads = Pass::kReads;
  static constexpr unsigned kWrites = (Pass::kWrites & ~bit(kUnscaled)) | bit(1);  // the gradient, unscaled
  static constexpr unsigned kOptional = Pass::kOptional;
  static constexpr bool kIsRelative = Pass::kIsRelative;
  using Sum = double;
  static constexpr bool kSumsFirst = kSums != 0 && Sums::kIsExact;
  // With sums of four elements at most; of two, of which all rows are there at a time, where sums come first.
  using Vector = std::conditional_t<kSumsFirst || sizeof(Storage) == sizeof(uint16_t), uint2, uint4>;
  static constexpr bool kAdds = false, kReadsEarly = false;
  template <class V>
  static constexpr int kAhead =
      (streams_in(kReads) > 3 ? 2 : 4) / (kWide<dtype> ? 2 : 1) * (kSumsFirst && kFastMemory ? 2 : 1);

  __device__ StepJob(const StepShared<Pass>& shared, int summed) : sums_(of_terms(summed)), shared_(shared) {}

  __device__ bool writes(int s) const { return s != 1 || (shared_.numbers.options & kUnscale) != 0; }

  __device__ bool has_terms() const { return sums_.has_terms(); }

  static __device__ Storage padding() { return Storage{}; }

  template <class V, int rows, int count, class Again>
  __device__ __forceinline__ void add_rows(const V (&w)[rows], double (&first)[count], double (&second)[count],
                                           const Again& again) const {
    sums_.add_rows(w, first, second, again);
  }

  template <class Body>
  static __device__ __forceinline__ void with_pass(const Body& body) {
    body(Pass{});
  }

  template <class, int streams, int count>
  __device__ __forceinline__ void write(Storage (&x)[streams][count], bool) const {
    const unsigned options = shared_.numbers.options;
    rewrite<E, kReads, kWrites>(x, [&](Scalar* wide) {
      Scalar all[kStreams]{};
      for (int s = 0; s < streams; ++s) {
        all[s] = wide[s];
      }
      Pass::element(all, factors(), options);
      for (int s = 0; s < streams; ++s) {
        wide[s] = all[s];
      }
      wide[1] = all[kUnscaled];
    });
    if constexpr (sizeof(Storage) == sizeof(uint16_t)) {
      for (Storage& w : x[0]) {
        w = options & kProximal ? with_positive_zero(w) : w;
      }
    }
  }

 private:
  static __device__ ChunkNumbers of_terms(int terms) {
    ChunkNumbers numbers{};
    numbers.terms = terms;
    return numbers;
  }

  __device__ const Scalar* factors() const {
    if constexpr (kWide<dtype>) {
      return shared_.factors.of64;
    } else {
      return shared_.factors.of32;
    }
  }

  const Sums sums_;
  const StepShared<Pass>& shared_;
};

// Adds the penalty of a chunk of float64 to that of its run, before the step writes over it: sums that have left the
// range of float64 are taken again.
template <class AnyChunk>
__device__ __forceinline__ void sum_wide(const AnyChunk& chunk, Blocks* blocks, const ChunkNumbers& numbers,
                                         CompensatedSum* run_sum) {
  for (int exponent = 0;;) {
    ChunkPass(chunk, Job<Dtype::kFloat64, PenaltyPass, kL1L2, true>(numbers, exponent)).run(blocks, CtaAnew{});
    __syncthreads();
    const PassSums sums = total(*blocks, chunk.blocks(), CtaAnew{}.lane());
    __syncthreads();
    const int again = exponent == 0 ? rescue_exponent(sums.of[0], sums.of[1], numbers.terms & kL2) : 0;
    if (again == 0) {
      if (threadIdx.x == 0) {
        const ScaledSum of_terms[kSums] = {{sums.of[0], exponent}, {sums.of[1], exponent}};
        run_sum->add(SummedTerms::penalty(numbers.of, of_terms));
      }
      return;
    }
    exponent = again;
  }
}

// Of a chunk, whatever its dtype. That of float64 has its sums already: they may leave the range, and be taken again.
template <class Pass, class AnyChunk>
__device__ __forceinline__ void step_chunk(const AnyChunk& chunk, Blocks* blocks, const StepShared<Pass>& shared) {
  with_dtype(chunk.dtype, [&](auto dtype) {
    constexpr Dtype kDtype = decltype(dtype)::value;
    ChunkPass(chunk, StepJob<kDtype, Pass>(shared, kWide<kDtype> ? kNone : shared.numbers.terms))
        .run(blocks, CtaAnew{});
  });
}

// The steps that are counted in device memory, one more.
template <class View>
__device__ __forceinline__ void count_on(const View& view) {
  for (uint32_t t = threadIdx.x; t < view.call().tensors; t += kThreads) {
    const StepOfTensor& own = view.of(t);
    if (own.count != nullptr && own.count_is_float64 != 0) {
      *static_cast<double*>(own.count) += 1;
    } else if (own.count != nullptr) {
      *static_cast<float*>(own.count) += 1;
    }
  }
}

// known: L1 and L2; or all terms, whose value and norms others have found.
template <class Table, template <int> class P, int known>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) step_kernel(const __grid_constant__ Table table) {
  using Pass = P<known>;
  using Shared = StepShared<Pass>;
  constexpr bool kHasValue = Pass::kSums != 0;
  __shared__ Blocks blocks;
  __shared__ CompensatedSum run_sum;  // the first thread's alone; spares the others registers
  __shared__ Shared shared;
  const Call& call = table.call;
  if (read(table.step.found_inf, table.step.found_inf_source) != 0) {
    return;
  }
  const int thread = threadIdx.x;
  if (thread == 0) {
    shared.clear();
  }
  for (uint32_t r = blockIdx.x; r < call.runs; r += gridDim.x) {
    if (thread == 0) {
      run_sum = {};
    }
    for (uint32_t c = r * call.run_length; c < run_end(call, r); ++c) {
      if (thread == 0) {
        shared.set(table, c);
      }
      __syncthreads();
      const auto& chunk = shared.chunk;
      const bool is_float64 = chunk.dtype == Dtype::kFloat64;
      if (kHasValue && is_float64 && shared.numbers.terms != kNone) {
        sum_wide(chunk, &blocks, shared.numbers, &run_sum);
      }
      step_chunk(chunk, &blocks, shared);
      __syncthreads();
      if (kHasValue && thread < kWarp && !is_float64) {
        const PassSums sums = total(blocks, chunk.blocks(), CtaAnew{}.lane());
        __syncwarp();  // the first thread goes on to the next chunk, and the others have read the size of this one
        if (thread == 0) {
          const ScaledSum of_terms[kSums] = {{sums.of[0], 0}, {sums.of[1], 0}};
          run_sum.add(SummedTerms::penalty(shared.numbers.of, of_terms));
        }
      }
    }
    if (kHasValue && thread == 0) {
      call.run_sums[r] = result(run_sum);
    }
  }
  if (is_last_cta(call)) {
    if (kHasValue) {
      write_value(call);
    }
    count_on(StepView<Table, Shared::kStreams, Shared::kHasAny>(table));
  }
}

}  // namespace fused_reg::cuda
