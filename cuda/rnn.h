// The CUDA kernels of the recurrent operators as the host file sees them: raw pointers, sizes, a stream.
// No torch. Every launcher enqueues on `stream` and returns at once; errors throw std::runtime_error.
// T is the tensors' element type, A what its sums are kept in: double for double, else float.
//
// The layer has three schedules, the first that fits is taken: weights resident in one block, in a cluster of
// 8 (sm_90), or one launch a step.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace cnnrnn::cuda {

struct LstmShape {
  int steps, batch, hidden, directions;  // T, N, H, D
};

struct LstmForward {
  LstmShape shape;
  const void* gates_x[2];    // D x T [T, N, 4*H]: x times weight_ih transposed, without biases
  const void* weight_hh[2];  // D x T [4*H, H]
  const void* bias_ih[2];    // D x T [4*H], or null
  const void* bias_hh[2];
  const void *h_0, *c_0;  // T [D, N, H]; each may be null for zeros
  void* output;           // T [T, N, D*H]
  void *h_n, *c_n;        // T [D, N, H]
  void* cells;            // T [T, N, D*H], or null: c after every step
  void* reserve;          // T [D, T, N, 4, H], or null: the activated gates
  void* packed;           // A [D, H, H, 4] workspace: the recurrent weights in the kernels' order
  void* carry;            // A [D, N, H] workspace: c from launch to launch
};

struct LstmBackward {
  LstmShape shape;
  const void *grad_output, *grad_cells;  // T [T, N, D*H], each may be null
  const void *grad_h_n, *grad_c_n;       // T [D, N, H], each may be null
  const void* weight_hh[2];              // D x T [4*H, H]
  const void* c_0;                       // T [D, N, H], or null for zeros
  const void *cells, *reserve;           // T [T, N, D*H], T [D, T, N, 4, H]
  void* grad_gates[2];                   // D x T [T, N, 4*H], of the pre-activations
  void *grad_h_0, *grad_c_0;             // T [D, N, H]
  void* packed;                          // A [D, H, H, 4] workspace
  void* carry;                           // A [D, N, H] workspace: the gradient of c from launch to launch
};

// One step; every pointer is T. gates_x [N, 4*H]; gates_h likewise, or null where h is zero; c [N, H], or
// null for zeros; h_1, c_1 [N, H]; reserve [N, 4, H], or null.
struct LstmCellForward {
  int batch, hidden;
  const void *gates_x, *gates_h, *bias_ih, *bias_hh, *c;
  void *h_1, *c_1, *reserve;
};

struct LstmCellBackward {
  int batch, hidden;
  const void *grad_h_1, *grad_c_1;  // [N, H], each may be null
  const void *c, *c_1, *reserve;
  void *grad_gates, *grad_c;  // [N, 4*H], [N, H]
};

void lstm_layer_forward(DType, const LstmForward&, void* stream);
void lstm_layer_backward(DType, const LstmBackward&, void* stream);
void lstm_cell_step_forward(DType, const LstmCellForward&, void* stream);
void lstm_cell_step_backward(DType, const LstmCellBackward&, void* stream);

}  // namespace cnnrnn::cuda
