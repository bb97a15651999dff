// The chunk kernel with what every CPU of the architecture has (SSE2, NEON).
#define FUSED_REG_ISA baseline
#define FUSED_REG_VECTOR_BYTES 16
#include "chunk_kernel_impl.h"

namespace fused_reg {

void chunk_kernel_baseline(const ChunkTask& task, ChunkSums* sums) { baseline::run_pass(task, sums); }

}  // namespace fused_reg
