// A pass (passes/pass.h) as ChunkPass runs it: for the terms that a chunk has, which the compiler does not know.
#pragma once

#include "../passes/passes.h"
#include "chunk_pass.cuh"
#include "exact_sums.cuh"

namespace fused_reg::cuda {

template <Dtype dtype>
constexpr bool kWide = std::is_same_v<typename Element<dtype>::Scalar, double>;

// body(wide) for each element, where wide[s] is that of stream s.
template <class E, unsigned reads, unsigned writes, int streams, int count, class Body>
__device__ __forceinline__ void rewrite(typename E::Storage (&x)[streams][count], const Body& body) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    typename E::Scalar wide[streams];
    for (int s = 0; s < streams; ++s) {
      wide[s] = reads & bit(s) ? E::widen(x[s][i]) : typename E::Scalar{};
    }
    body(wide);
    for (int s = 0; s < streams; ++s) {
      if (writes & bit(s)) {
        x[s][i] = E::narrow(wide[s]);
      }
    }
  }
}

// known: the terms that P is compiled for; scaled: float64 sums are of elements divided by 2^exponent.
template <Dtype dtype, template <int> class P, int known, bool scaled>
class Job {
  static constexpr int kWhole = (known & ~kRelative) == kL1L2 ? known : known & (kAnyTerms | kFurther | kRelative);
  using Whole = P<kWhole>;

 public:
  using E = Element<dtype>;
  using Storage = typename E::Storage;
  using Scalar = typename E::Scalar;
  static constexpr unsigned kSums = Whole::kSums, kWrites = Whole::kWrites;
  static constexpr unsigned kReads = Whole::kReads | (kSums != 0 ? bit(0) : 0), kOptional = Whole::kOptional;
  static constexpr bool kIsRelative = Whole::kIsRelative;
  using Sum = std::conditional_t<Whole::kIsCount, Scalar, double>;  // of a lane
  // Where the list may have chunks whose streams are written and not read, as a gradient that is not there yet.
  static constexpr bool kAdds = !std::is_void_v<typename Whole::Fresh>;
  using Vector = uint4;
  // Whether the sums of a lane may be taken by integers, for which all its rows are there at a time: before the rest,
  // where other streams are read, too.
  static constexpr bool kIsExact =
      kFewDoubles && !kWide<dtype> && known == kL1L2 && std::is_same_v<typename Whole::Sums, PenaltyPass<kL1L2>>;
  static constexpr bool kSumsFirst = kIsExact && streams_in(kReads) > 1;
  // Rows of a block, by vectors V, that are on their way before the first is used, a power of two: 128 bytes for each
  // thread are 64 KB for a multiprocessor. What takes more registers has fewer, as the sums of further terms.
  template <class V>
  static constexpr int rows_ahead() {
    constexpr bool kTakesMore = kSums == kL2 && (kFewDoubles || Whole::kOfAnyDtype);
    const int few = kFewDoubles && (kTakesMore || !kFastMemory) ? 32 : 64;
    const int most = kTakesMore || kWrites == bit(0) ? few : 128;
    int rows = kRows;
    constexpr int kStreamsRead = kIsRelative ? __builtin_popcount(kReads) : streams_in(kReads);
    while ((!kIsExact || kSumsFirst) && rows > 1 && rows * static_cast<int>(sizeof(V)) * kStreamsRead > most) {
      rows /= 2;
    }
    return rows;
  }
  template <class V>
  static constexpr int kAhead = rows_ahead<V>();
  // Whether the next rows are on their way while rows are summed. The compiler would put the loads of these sums, which
  // are long, one after the other, each just before its use.
  static constexpr bool kReadsEarly =
      !kFewDoubles && kSums == kL2 && !Whole::kIsCount && !(kFewRegisters && Whole::kOfAnyDtype);

  __device__ explicit Job(const ChunkNumbers& numbers, int exponent = 0)
      : terms_(numbers.terms & known), scale_(scaled ? std::ldexp(1.0, -exponent) : 1) {
    Whole::factors(numbers, factors_);
    Whole::template sum_factors<Scalar>(numbers, exponent, sum_factors_);
  }

  // Of the streams that it may write.
  static __device__ bool writes(int) { return true; }

  __device__ bool has_terms() const { return terms_ != kNone; }

  // An element that changes no sum.
  static __device__ Storage padding() { return static_cast<Storage>(Whole::kPadding); }

  // Vectors of rows to the two sums of each lane, which are 0 if the rows are those of a block. again(r, lane) reads an
  // element once more.
  template <class V, int rows, int count, class Again>
  __device__ __forceinline__ void add_rows(const V (&w)[rows], Sum (&first)[count], Sum (&second)[count],
                                           const Again& again) const {
    if constexpr (kIsExact && rows == kRows) {
#pragma unroll
      for (int lane = 0; lane < count; ++lane) {
        add_lane(w, lane, again, &first[lane], &second[lane]);
      }
    } else {
      with_terms(terms_, [&](auto terms) {
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          Storage x[count];
          memcpy(x, &w[r], sizeof(V));
          add_of<decltype(terms)::value>(x, first, second);
        }
      });
    }
  }

  // The same of relative terms: vectors of every stream.
  template <class V, int streams, int rows, int count>
  __device__ __forceinline__ void add_relative_rows(const V (&of)[streams][rows], double (&first)[count],
                                                    double (&second)[count]) const {
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      Storage w[count], toward[count], importance[count];
      memcpy(w, &of[0][r], sizeof(V));
      memcpy(toward, &of[kToward][r], sizeof(V));
      memcpy(importance, &of[kImportance][r], sizeof(V));
#pragma unroll
      for (int i = 0; i < count; ++i) {
        const double d = static_cast<double>(E::widen(w[i])) - static_cast<double>(E::widen(toward[i]));
        const double m = E::widen(importance[i]);
        double sums[2] = {first[i], second[i]};
        Whole::add_weighted(sums, scaled && kWide<dtype> ? without_masked(d, m) : d, m, sum_factors_,
                            [&](double y) { return scaled && kWide<dtype> ? y * scale_ : y; });
        first[i] = sums[0];
        second[i] = sums[1];
      }
    }
  }

  // body(pass), where pass is the one of the terms that the chunk has.
  template <class Body>
  __device__ __forceinline__ void with_pass(const Body& body) const {
    if constexpr (known != kL1L2) {
      body(Whole{});
    } else {
      switch (terms_) {
        case kL1:
          return body(P<kL1>{});
        case kL2:
          return body(P<kL2>{});
        case kL1L2:
          return body(P<kL1L2>{});
        default:
          return body(P<kNone>{});
      }
    }
  }

  // What a pass writes, from what is read: x[s] are elements of stream s.
  template <class Pass, int streams, int count>
  __device__ __forceinline__ void write(Storage (&x)[streams][count], bool adds) const {
    rewrite<E, kReads, kWrites>(x, [&](Scalar* wide) {
      if constexpr (kAdds) {
        adds ? Pass::element(wide, factors_) : Pass::Fresh::element(wide, factors_);
      } else {
        Pass::element(wide, factors_);
      }
    });
    if constexpr (Pass::kPositiveZeros && sizeof(Storage) == sizeof(uint16_t)) {
      for (Storage& w : x[0]) {
        w = with_positive_zero(w);
      }
    }
  }

 private:
  // body(of), where of() are these terms as a constant, if it has any.
  template <class Body>
  static __device__ __forceinline__ void with_terms(int terms, const Body& body) {
    if constexpr (known == kNone) {
      body(std::integral_constant<int, kNone>{});
    } else if ((terms & kL1L2) == kL1L2) {  // both, of one conversion to float64
      body(std::integral_constant<int, kL1L2>{});
    } else if (terms & kL1) {
      body(std::integral_constant<int, kL1>{});
    } else if (terms & kL2) {
      body(std::integral_constant<int, kL2>{});
    }
  }

  // Elements of the parameter to the two sums.
  template <int terms, int count>
  __device__ __forceinline__ void add_of(const Storage (&w)[count], Sum (&first)[count], Sum (&second)[count]) const {
    using MultiplyAdd = std::conditional_t<kWide<dtype>, TwoRoundings, OneRounding>;
    Scalar scalars[count];
    Sum wide[count];
#pragma unroll
    for (int i = 0; i < count; ++i) {
      scalars[i] = E::widen(w[i]);
    }
    widen(scalars, wide);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      Sum sums[2] = {first[i], second[i]};
      P<terms>::template add<MultiplyAdd>(sums, wide[i], sum_factors_,
                                          [&](Sum y) { return scaled && kWide<dtype> ? y * scale_ : y; });
      first[i] = sums[0];
      second[i] = sums[1];
    }
  }

  // The sums of a lane of a block: of 16 bits both by integers, of float32 that of L1. Where these are not exact, or
  // widening takes more than bits, element by element.
  template <class V, class Again>
  __device__ __forceinline__ void add_lane(const V (&w)[kRows], int lane, const Again& again, double* first,
                                           double* second) const {
    constexpr int kLimbs = sizeof(Storage) == sizeof(uint16_t) ? 1 : 2;
    const auto element = [&](int r) {
      Storage x[sizeof(V) / sizeof(Storage)];
      memcpy(x, &w[r], sizeof(V));
      return E::widen(x[lane]);
    };
    bool is_exact = true;
    if (terms_ & (kLimbs == 1 ? kL1L2 : kL1)) {
      is_exact = exact_sums<kLimbs, kRows>([&](int r) { return magnitude(element(r)); }, first, second);
    }
    if (kLimbs == 2 && (terms_ & kL2)) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        is_exact = is_exact && !is_rare(element(r));
        *second = L2::add<OneRounding>(*second, float64_by_bits(element(r)));
      }
    }
    if (is_exact) {
      return;
    }
    __prof_trigger(0);  // rare, as scripts/machine_code.py reads
    double ones[1] = {}, twos[1] = {};
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
      const Storage x[1] = {again(r, lane)};
      with_terms(terms_, [&](auto terms) { add_of<decltype(terms)::value>(x, ones, twos); });
    }
    *first = ones[0];
    *second = twos[0];
  }

  int terms_;
  Scalar factors_[Whole::kFactors + 1];
  double sum_factors_[Whole::kSumFactors + 1];
  double scale_;
};

// body(of), where of() is the dtype, as a constant.
template <class Body>
__device__ __forceinline__ void with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(std::integral_constant<Dtype, Dtype::kFloat32>{});
    case Dtype::kFloat64:
      return body(std::integral_constant<Dtype, Dtype::kFloat64>{});
    case Dtype::kBFloat16:
      return body(std::integral_constant<Dtype, Dtype::kBFloat16>{});
    case Dtype::kFloat16:
      return body(std::integral_constant<Dtype, Dtype::kFloat16>{});
  }
}

// Of a chunk, whatever its dtype.
template <template <int> class P, int known, bool scaled = false, class AnyChunk, class AnyTeam>
__device__ __forceinline__ void run_chunk(const AnyChunk& chunk, Blocks* blocks, const AnyTeam& team,
                                          const ChunkNumbers& numbers, int exponent = 0) {
  with_dtype(chunk.dtype, [&](auto dtype) {
    ChunkPass(chunk, Job<decltype(dtype)::value, P, known, scaled>(numbers, exponent)).run(blocks, team);
  });
}

}  // namespace fused_reg::cuda
