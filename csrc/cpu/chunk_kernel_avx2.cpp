// The chunk kernel with AVX2. The pragma stands before every include: the whole file is compiled for it.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FUSED_REG_ISA avx2
#define FUSED_REG_VECTOR_BYTES 32
#include "chunk_kernel_impl.h"

namespace fused_reg {

const Kernels kernels_avx2 = {avx2::run_pass, avx2::finish, avx2::sum_runs, avx2::sum_columns};

}  // namespace fused_reg

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
