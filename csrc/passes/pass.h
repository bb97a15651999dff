// A PASS over a list: what is done with every element, written once for every backend. Each is a file here, and a line
// in passes.h.
//
//   template <int terms> struct SomePass  terms: those of penalty.h that a chunk has
//
//     kReads, kWrites          the streams that it reads and writes, a bit each: of as many elements as the parameter,
//                              which is stream 0
//     kOptional                those of them that a tensor may not have
//     kIsRelative              whether its terms are relative (kRelative): it reads two streams more
//     factors(numbers, f)      the kFactors numbers that its elements need, in the type S in which they are computed;
//                              once for a chunk
//     element(x, f)            the streams that it writes, from those that it reads
//     kPositiveZeros           whether a zero that comes from the last rounding shall be +0
//     Fresh                    the pass that does the same where a stream that it adds to is not there yet, if it adds
//                              to one; else void
//
//     kSums                    the sums that it takes over a chunk, a bit each
//     sum_factors<S>(numbers, exponent, f)
//                              the kSumFactors that these need, in float64; the exponent is 0, or where sums with 0
//                              left the range of float64, that of rescue_exponent()
//     add<MultiplyAdd>(sums, w, f, scaled)
//                              adds a parameter's element to the sums, in float64; scaled(x) is x / 2^exponent
//     add_weighted(sums, w, importance, f, scaled)
//                              the same of relative terms with importances
//     Sums                     the pass that takes its sums alone, where they can leave the range of float64; else void
//     kOfAnyDtype              whether those of elements that are narrower than float64 can
//     kIsCount                 whether what it adds is 0 or 1: that of a lane may be taken in the type of the elements
//     kPadding                 the byte of which elements consist that change no sum
//
//     kHasOptions              whether element() takes the options of an optimizer's step, and is proximal with one of
//                              them only
//     kUsual                   those that are not rare; with others alone it may take a little longer
//
// V is S, or a SIMD vector of it; D is a double, or a vector of them.
#pragma once

#include "../penalty.h"

namespace fused_reg {

constexpr int kStreams = 8;     // at most
constexpr int kUnscaled = 5;    // that of gradients which a step has taken a loss scale from
constexpr int kToward = 6;      // that of reference weights, which are 0 where a tensor has none;
constexpr int kImportance = 7;  // and of importances, which are 1
constexpr int kPassSums = 2;

// The numbers of an optimizer's step of a tensor (passes/step.h), beside kStep, its learning rate: momentum, beta1 or
// the decay of the learning rate; dampening, beta2 or alpha; the steps so far, with this one.
enum StepNumber : int { kWeightDecay, kFirstDecay, kSecondDecay, kEpsilon, kCount, kGradScale, kStepNumbers };
constexpr int kRates = kCount;  // those that the options of an optimizer say

// What is known of a chunk beside the penalty's numbers, where an optimizer takes a step.
struct StepNumbers : ChunkNumbers {
  double step[kStepNumbers];
  unsigned options;
};

// The options of a step, with those that its terms are.
enum StepTerm : unsigned { kAddsL1 = 2048, kAddsL2 = 4096 };
FUSED_REG_INLINE unsigned options_of(const StepNumbers& n) {
  return n.options | (n.terms & kL1 ? unsigned{kAddsL1} : 0) | (n.terms & kL2 ? unsigned{kAddsL2} : 0);
}

constexpr unsigned bit(int i) { return 1u << i; }

// The streams that relative terms need beside the parameter.
constexpr unsigned relative_streams(int terms) { return terms & kRelative ? bit(kToward) | bit(kImportance) : 0; }

// What the terms of an element are of.
template <int terms, class V>
FUSED_REG_INLINE V difference(V w, const V* x) {
  if constexpr ((terms & kRelative) != 0) {
    return w - x[kToward];
  } else {
    return w;
  }
}

// How many streams there are up to the last of these.
constexpr int streams_in(unsigned bits) { return bits == 0 ? 0 : 1 + streams_in(bits >> 1); }

// How many streams a pass has.
template <class Pass>
constexpr int streams_of = streams_in(Pass::kReads | Pass::kWrites | (Pass::kSums ? bit(0) : 0));

// What a pass is unless it says otherwise.
struct AnyPass {
  using Sums = void;
  using Fresh = void;
  static constexpr unsigned kReads = 0, kWrites = 0, kOptional = 0, kSums = 0, kUsual = 0;
  static constexpr int kFactors = 0, kSumFactors = 0, kPadding = 0;
  static constexpr bool kOfAnyDtype = false, kPositiveZeros = false, kHasOptions = false, kIsRelative = false;
  static constexpr bool kIsCount = false;

  template <class S>
  static FUSED_REG_INLINE void factors(const ChunkNumbers&, S*) {}
  template <class S>
  static FUSED_REG_INLINE void sum_factors(const ChunkNumbers&, int, double*) {}
  template <class V>
  static FUSED_REG_INLINE void element(V*, const V*) {}
  template <class MultiplyAdd, class D, class Scaled>
  static FUSED_REG_INLINE void add(D*, D, const D*, const Scaled&) {}
};

}  // namespace fused_reg
