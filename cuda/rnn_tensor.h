// The tensor-core kernels of the recurrent layers, as the choice of a schedule sees them.
#pragma once

#include <cstddef>

#include "rnn.h"

namespace cnnrnn::cuda {

// Whether the current device can run groups of so many blocks: of the grid all at once, else as clusters.
bool rnn_tensor_forward_fits(RnnCell, DType, const RnnShape&, int blocks, bool grid);
bool rnn_tensor_backward_fits(RnnCell, DType, const RnnShape&, int blocks, bool grid);

// Bytes that groups of the grid hand over in.
size_t rnn_tensor_forward_exchange(DType, const RnnShape&);
size_t rnn_tensor_backward_exchange(const RnnShape&, int blocks);

void rnn_tensor_forward_layer(RnnCell, DType, const RnnForward&, int blocks, bool grid, void* stream);
void rnn_tensor_backward_layer(RnnCell, DType, const RnnBackward&, int blocks, bool grid, void* stream);

}  // namespace cnnrnn::cuda
