// The recurrent CPU kernels as the host file sees them: raw pointers, sizes, one table per instruction set.
#pragma once

#include <cstdint>

namespace cnnrnn {

struct RnnKernels {};

extern const RnnKernels rnn_baseline, rnn_avx2, rnn_avx512;

}  // namespace cnnrnn
