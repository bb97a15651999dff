// The chunk kernel with what every CPU of the architecture has (SSE2, NEON).
#define FUSED_REG_ISA baseline
#define FUSED_REG_VECTOR_BYTES 16
#include "chunk_kernel_impl.h"

namespace fused_reg {

ChunkSums chunk_kernel_baseline(const ChunkTask& task) { return baseline::run_chunk(task); }

}  // namespace fused_reg
