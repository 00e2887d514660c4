#pragma once

#include "conv_pool.h"
#include "isa.h"

namespace {}  // kernels

namespace cnnrnn {
extern const ConvPoolKernels CNNRNN_TABLE(conv_pool);
const ConvPoolKernels CNNRNN_TABLE(conv_pool) = {};
}  // namespace cnnrnn
