// One kernel of each pass and step, that with the shortest table: of these scripts/check_cuda_compile.py records the
// machine code for every architecture. Other tables change little, and are compiled for one. No part of a build.
#include "launch_pass.cuh"
#include "launch_step.cuh"

namespace fused_reg::cuda {

#define FUSED_REG_PLAN(name, terms, numbers) \
  template Plan<InlineTable<kSmallTable>> plan_of<InlineTable<kSmallTable>, Pass::k##name>(const Call&);
FUSED_REG_PASSES(FUSED_REG_PLAN)
#undef FUSED_REG_PLAN

#define FUSED_REG_LAUNCH(name, terms, numbers)                                                                        \
  template cudaError_t launch_step_table<Pass::k##name, kSmallStep, false>(const Call&, const StepCall&, const void*, \
                                                                           size_t, cudaStream_t);                     \
  template cudaError_t launch_step_table<Pass::k##name, kSmallStep, true>(const Call&, const StepCall&, const void*,  \
                                                                          size_t, cudaStream_t);
FUSED_REG_STEPS(FUSED_REG_LAUNCH)
#undef FUSED_REG_LAUNCH

}  // namespace fused_reg::cuda
