// The chunk kernel with AVX-512. The pragma stands before every include: the whole file is compiled for it.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define FUSED_REG_ISA avx512
#define FUSED_REG_VECTOR_BYTES 64
#include "chunk_kernel_impl.h"

namespace fused_reg {

const Kernels kernels_avx512 = {avx512::run_pass, avx512::finish, avx512::sum_runs, avx512::sum_columns};

}  // namespace fused_reg

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
