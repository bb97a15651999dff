// The chunk kernel with what every CPU of the architecture has (SSE2, NEON).
#define FUSED_REG_ISA baseline
#define FUSED_REG_VECTOR_BYTES 16
#include "chunk_kernel_impl.h"

namespace fused_reg {

const Kernels kernels_baseline = {baseline::run_pass, baseline::finish, baseline::sum_runs, baseline::sum_columns};

}  // namespace fused_reg
