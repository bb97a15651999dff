// All launches and kernels of the CUDA backend, as csrc/cuda/sources.txt names them, in this translation unit.
#pragma once

#include "cuda/element_kernels.cu"
#include "cuda/kernels.cu"
#include "cuda/penalty_kernels.cu"
#include "cuda/relative_kernels.cu"
#include "cuda/rmsprop_adagrad_kernels.cu"
#include "cuda/sgd_adam_kernels.cu"
#include "cuda/sums_kernels.cu"
