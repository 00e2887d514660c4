// The CPU kernels of conv_pool as the host file sees them: raw pointers, sizes, one table per instruction set.
#pragma once

#include <cstdint>

namespace cnnrnn {

struct ConvPoolKernels;  // filled in below by the kernels' author

}  // namespace cnnrnn
