// The CPU kernels of conv_pool as the host file sees them: raw pointers, sizes, one table per instruction set.
#pragma once

#include <cstdint>

namespace cnnrnn {

struct ConvPoolKernels {};

extern const ConvPoolKernels conv_pool_baseline, conv_pool_avx2, conv_pool_avx512;

}  // namespace cnnrnn
