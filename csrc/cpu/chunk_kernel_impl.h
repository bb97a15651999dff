// The kernel of some chunks: a pass, and which of its kernels. chunk_kernel_<isa>.cpp includes it with FUSED_REG_ISA
// and FUSED_REG_VECTOR_BYTES set. Whatever the width of the vectors, every instruction set gives the same bits.
#pragma once

#include "across.h"
#include "finish.h"
#include "in_turn.h"
#include "short.h"

namespace fused_reg::FUSED_REG_ISA {

// Where sums have left the range of float64, they are taken again.
template <Dtype dtype, class P>
void run_kernel(const ChunkTask& task, TaskSums* sums) {
  constexpr bool kIsRescued = !std::is_void_v<typename P::Sums> && (dtype == Dtype::kFloat64 || P::kOfAnyDtype);
  const bool may_be_small = P::kSums & kL2 && (P::kSumFactors == 0 || task.streams[kImportance] == nullptr);
  if constexpr (kIsRescued && (P::kWrites & bit(0))) {
    if (sums != nullptr) {
      run_kernel<dtype, typename P::Sums>(task, sums);  // of what is written over
      sums = nullptr;
    }
  }
  Kernel<dtype, P>(task.numbers, 0, task.ahead).run(task, sums);
  if constexpr (kIsRescued) {
    for (const int exponent : {-kRescueExponent, kRescueExponent}) {
      TaskSums again;
      bool is_there = false;
      for (int64_t c = 0; sums != nullptr && c * task.chunk_size < task.size; ++c) {
        if (sums->of(0, c).exponent == 0 &&
            rescue_exponent(sums->sum[0][c], sums->sum[1][c], may_be_small) == exponent) {
          if (!is_there) {
            Kernel<dtype, typename P::Sums>(task.numbers, exponent, 0).run(task, &again);
            is_there = true;
          }
          for (int k = 0; k < kPassSums; ++k) {
            sums->sum[k][c] = again.sum[k][c];
            sums->set_exponent(k, c, exponent);
          }
        }
      }
    }
  }
}

// What a pass that knows some terms is compiled for (passes/terms.h), where a chunk has these of them.
constexpr int compiled(int terms, int known) {
  return terms & kFurther ? known & (kAnyTerms | kFurther) : terms == (kNorm | kL1) ? kNorm | kL1L2 : terms;
}

template <Dtype dtype, template <int> class P, int known, int terms = 0>
void run_compiled(const ChunkTask& task, TaskSums* sums) {
  if constexpr ((terms & ~known) == 0 && compiled(terms, known) == terms) {
    if (compiled(task.numbers.terms & known, known) == terms) {
      return run_kernel<dtype, P<terms>>(task, sums);
    }
  }
  if constexpr (terms < known) {
    run_compiled<dtype, P, known, terms + 1>(task, sums);
  }
}

// The sum of each further term that a chunk has.
template <Dtype dtype, int relative>
void sum_further(const ChunkTask& task, TaskSums* sums) {
  sums->has_further = true;
  FurtherTerms::each([&](auto term) {
    using T = decltype(term);
    std::fill_n(sums->sum[T::kSum], task.chunks(), 0.0);
    if (task.numbers.terms & T::kBit) {
      TaskSums found;
      run_kernel<dtype, typename TermSum<T>::template Pass<relative>>(task, &found);
      for (int64_t c = 0; c * task.chunk_size < task.size; ++c) {
        sums->sum[T::kSum][c] = found.sum[1][c];
        sums->set_exponent(T::kSum, c, T::result_exponent(task.numbers, found.of(1, c).exponent));
      }
    }
  });
}

// A pass of relative terms, each maybe. With further ones, and in a step, first the sums, and then what is written.
template <Dtype dtype, template <int> class P, int known>
void run_relative(const ChunkTask& task, TaskSums* sums) {
  if constexpr (P<known>::kHasOptions || (P<known>::kSums != 0 && known != kNone)) {
    if constexpr (!P<known>::kHasOptions) {
      if (!(task.numbers.terms & kFurther)) {
        return run_kernel<dtype, P<kL1L2 | kRelative>>(task, sums);
      }
    }
    if (sums != nullptr) {
      run_kernel<dtype, PenaltyPass<kL1L2 | kRelative>>(task, sums);
      sum_further<dtype, kRelative>(task, sums);
    }
    if constexpr (P<known>::kHasOptions) {
      run_kernel<dtype, P<kAllTerms | kRelative>>(task, nullptr);
    } else if constexpr (P<known>::kWrites != 0) {
      run_kernel<dtype, typename P<known>::template Alone<kAnyTerms | kFurther | kRelative>>(task, nullptr);
    }
  } else {
    if constexpr (P<known>::kPositiveZeros) {  // else further terms that are not there may change the sign of a zero
      if (!(task.numbers.terms & kFurther)) {
        return run_kernel<dtype, P<(known & kAnyTerms) | kRelative>>(task, sums);
      }
    }
    run_kernel<dtype, P<(known & (kAnyTerms | kFurther)) | kRelative>>(task, sums);
  }
}

// A pass; with further terms in parts, for which the chunks are still in the cache.
template <Dtype dtype, template <int> class P, int known>
void run_terms(const ChunkTask& task, TaskSums* sums) {
  const bool is_relative = task.streams[kToward] != nullptr || task.streams[kImportance] != nullptr;
  if constexpr (P<known>::kHasOptions) {
    if (task.numbers.terms == kNone) {
      return run_kernel<dtype, P<kNone>>(task, sums);
    }
  }
  if constexpr (P<kRelative>::kIsRelative) {
    if (is_relative) {
      return run_relative<dtype, P, known>(task, sums);
    }
  }
  if constexpr (P<known>::kHasOptions) {
    if ((task.numbers.terms & ~known) == 0) {
      return run_kernel<dtype, P<known>>(task, sums);
    }
    if (sums != nullptr) {
      run_terms<dtype, PenaltyPass, known>(task, sums);
    }
    return run_kernel<dtype, P<kAllTerms>>(task, nullptr);
  } else if constexpr (P<known>::kSums != 0 && known != kNone) {
    if (task.numbers.terms & kFurther) {
      run_compiled<dtype, PenaltyPass, kL1L2>(task, sums);
      sum_further<dtype, kNone>(task, sums);
      if constexpr (P<known>::kWrites != 0) {
        run_compiled<dtype, P<known>::template Alone, kAllTerms>(task, nullptr);
      }
      return;
    }
  }
  run_compiled<dtype, P, known>(task, sums);
}

template <Dtype dtype>
void run_pass_of(const ChunkTask& task, TaskSums* sums) {
  switch (task.pass) {
#define FUSED_REG_RUN(name, terms, numbers) \
  case Pass::k##name:                       \
    return run_terms<dtype, name##Pass, terms>(task, sums);
    FUSED_REG_PASSES(FUSED_REG_RUN)
    FUSED_REG_STEPS(FUSED_REG_RUN)
#undef FUSED_REG_RUN
    case Pass::kCount:
      break;
  }
}

inline void run_pass(const ChunkTask& task, TaskSums* sums) {
  switch (task.dtype) {
    case Dtype::kFloat32:
      return run_pass_of<Dtype::kFloat32>(task, sums);
    case Dtype::kFloat64:
      return run_pass_of<Dtype::kFloat64>(task, sums);
    case Dtype::kBFloat16:
      return run_pass_of<Dtype::kBFloat16>(task, sums);
    case Dtype::kFloat16:
      return run_pass_of<Dtype::kFloat16>(task, sums);
  }
}

}  // namespace fused_reg::FUSED_REG_ISA
