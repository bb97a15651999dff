// The dtypes of parameters and gradients, as the kernels know them. Free of torch.
#pragma once

#include <cstdint>

namespace fused_reg {

enum class Dtype : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

}  // namespace fused_reg
