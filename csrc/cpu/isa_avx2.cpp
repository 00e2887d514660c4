// Every CPU kernel, compiled for avx2. Only our own code may stand in these files: an inline function of
// std or torch compiled with wide flags could be merged into code that runs on every machine.

#define CNNRNN_ISA avx2
#include "conv_pool_kernels.h"
#include "rnn_kernels.h"
