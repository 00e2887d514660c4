// The tensor-core kernels of the recurrent layers, as the choice of a schedule sees them.
#pragma once

#include <cstddef>

#include "rnn.h"

namespace cnnrnn::cuda {

// How a group of blocks is to run: as one of the grid, or else as a block or a cluster.
struct TensorGroup {
  RnnProducts products;
  int blocks;
  bool grid;
};

// How many launches the layer takes one after the other; 0 where the current device cannot run such groups.
// Groups of the grid must run at once, and there may be more of them.
int rnn_tensor_forward_launches(RnnCell, DType, const RnnShape&, const TensorGroup&);
int rnn_tensor_backward_launches(RnnCell, DType, const RnnShape&, const TensorGroup&);

// Whether all blocks of the layer would run at once.
bool rnn_tensor_forward_at_once(RnnCell, DType, const RnnShape&, const TensorGroup&);
bool rnn_tensor_backward_at_once(RnnCell, DType, const RnnShape&, const TensorGroup&);

// Bytes that groups of the grid hand over in.
size_t rnn_tensor_forward_exchange(DType, const RnnShape&);
size_t rnn_tensor_backward_exchange(const RnnShape&, int blocks);

// A launch a step on tensor cores: shared memory of a block; workspace for weights and for what a step leaves
// to the next, which is to be zeros. Bytes.
struct StreamNeeds {
  size_t shared, packed, exchange;
};
StreamNeeds rnn_tensor_step_needs(RnnCell, DType, const RnnShape&, RnnProducts, bool forward);
void rnn_tensor_step_forward(RnnCell, DType, RnnProducts, const RnnForward&, void* stream);
void rnn_tensor_step_backward(RnnCell, DType, RnnProducts, const RnnBackward&, void* stream);

void rnn_tensor_forward_layer(RnnCell, DType, const RnnForward&, const TensorGroup&, void* stream);
void rnn_tensor_backward_layer(RnnCell, DType, const RnnBackward&, const TensorGroup&, void* stream);

}  // namespace cnnrnn::cuda
