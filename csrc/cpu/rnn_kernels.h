#pragma once

#include "rnn.h"
#include "isa.h"

namespace {}  // kernels

namespace cnnrnn {
extern const RnnKernels CNNRNN_TABLE(rnn);
const RnnKernels CNNRNN_TABLE(rnn) = {};
}  // namespace cnnrnn
