// The CUDA kernels of the recurrent operators as the host file sees them: raw pointers, sizes, a stream.
// No torch. Every launcher enqueues on `stream` and returns at once; errors throw std::runtime_error.
// T is the tensors' element type, A what its sums are kept in: double for double, else float.
//
// A cell has G gates, rows of a weight per unit, and P parts, pre-activations of a unit: lstm 4 and 4 (i, f,
// g, o), gru 3 and 4 (r, z, n of the input, n of the state), rnn 1 and 1. It keeps K values per unit.
//
// Rows: step t of batch row n is row t * N + n of x [R, I], R = T * N; with offsets [T + 1], of a packed x,
// it is row offsets[t] + n, R = offsets[T]. Rows of steps beyond lengths[n] are neither read nor written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace cnnrnn::cuda {

enum class RnnCell { kLstm, kGru, kRnnTanh, kRnnRelu };

struct RnnSizes {
  int gates, joint, parts, kept;  // the first `joint` gates add up the products of input and state
  bool has_c, blends;             // blends: a new h is a mixture with the old one
};
RnnSizes rnn_sizes(RnnCell);

struct RnnShape {
  int steps, batch, hidden, directions;  // T, N, H, D
  int64_t rows;                          // R
  const int64_t* lengths;                // [N], 0 to T each; null: all T
  const int64_t* offsets;                // [T + 1], or null
  const unsigned char* reset;  // [R], or null: no state crosses from step t - 1 to t where it is set
};

// How a layer runs: one launch a time step, or one launch for all of them, with the recurrent weights
// resident in a block, a cluster of blocks (sm_90), or a group of blocks of a cooperative grid.
enum class RnnSchedule { kStep, kBlock, kCluster, kGrid };

// What the recurrent products are made of. On tensor cores: of 16-bit elements as they are; of floats rounded
// to TF32; or of floats as exactly as they are, by three products of TF32 each.
enum class RnnProducts { kFma, kHalves, kTf32, kThreeTf32 };

struct RnnPlan {
  RnnSchedule schedule;
  int blocks;  // that share the units
  RnnProducts products;
  size_t packed_bytes, exchange_bytes;  // of workspace
  int counters;
  bool zeros;  // the exchange is to hold zeros
  bool tensor_cores() const { return products != RnnProducts::kFma; }
};

// What the current device takes for this layer. tf32: whether floats may be rounded to TF32.
RnnPlan rnn_plan(RnnCell, DType, const RnnShape&, bool tf32, bool forward);

struct RnnForward {
  RnnShape shape;
  const void* gates_x[2];    // D x T [R, G*H]: x times weight_ih transposed, without biases
  const void* weight_hh[2];  // D x T [G*H, H]
  const void* bias_ih[2];    // D x T [G*H], or null
  const void* bias_hh[2];
  const void *h_0, *c_0;  // T [D, N, H]; each may be null for zeros
  void* output;           // T [R, D*H]
  void *h_n, *c_n;        // T [D, N, H]
  void* cells;            // T [R, D*H], or null: c after every step
  void* reserve;          // T [D, R, K, H], or null: what the backward needs
  void* packed;           // workspace: the recurrent weights in the kernels' order
  void* carry_c;          // workspace, A [D, N, H]: c from launch to launch
  void* exchange;         // workspace, as the plan says
  unsigned* counters;     // zeros, as many as the plan says
};

struct RnnBackward {
  RnnShape shape;
  const void *grad_output, *grad_cells;  // T [R, D*H], each may be null
  const void *grad_h_n, *grad_c_n;       // T [D, N, H], each may be null
  const void* weight_hh[2];              // D x T [G*H, H]
  const void *h_0, *c_0;                 // T [D, N, H], or null for zeros
  const void *output, *cells, *reserve;  // T [R, D*H] twice, T [D, R, K, H]
  void* grad_parts[2];                   // D x T [R, P*H], of the pre-activations
  void *grad_h_0, *grad_c_0;             // T [D, N, H]
  void* packed;                          // workspace, as above
  void *carry_h, *carry_c;               // workspace, A [D, N, H]: gradients of the state, launch to launch
  void* exchange;                        // workspace, as the plan says
  unsigned* counters;                    // zeros, as many as the plan says
};

// One step; every pointer is T. gates_x [N, G*H]; gates_h likewise, or null where h is zero; h, c [N, H], or
// null for zeros; h_1, c_1 [N, H], or null; reserve [N, K, H], or null.
struct RnnCellForward {
  int64_t batch;
  int hidden;
  const void *gates_x, *gates_h, *bias_ih, *bias_hh, *h, *c;
  void *h_1, *c_1, *reserve;
};

struct RnnCellBackward {
  int batch, hidden;
  const void *grad_h_1, *grad_c_1;  // [N, H], each may be null
  const void *h, *c, *h_1, *c_1, *reserve;
  void *grad_parts, *grad_h, *grad_c;  // [N, P*H], [N, H] twice; grad_h without the way through gates_h
};

void rnn_layer_forward(RnnCell, DType, const RnnPlan&, const RnnForward&, void* stream);
void rnn_layer_backward(RnnCell, DType, const RnnPlan&, const RnnBackward&, void* stream);
void rnn_cell_step_forward(RnnCell, DType, const RnnCellForward&, void* stream);
void rnn_cell_step_backward(RnnCell, DType, const RnnCellBackward&, void* stream);

// before [R, H]: the h that each row of direction d started from; h_0 and output as above. Zero in rows
// beyond a length.
void rnn_states_before(DType, const RnnShape&, int direction, const void* h_0, const void* output,
                       void* before, void* stream);

// to [R, width]: x, and zero in rows beyond a length.
void rnn_running_rows(DType, const RnnShape&, const void* x, int width, void* to, void* stream);

// offsets [T + 1] and lengths [N] of a packed x, from batch_sizes [T] in the host's memory: they travel as
// arguments of kernels, so that nothing waits and a captured graph keeps them.
void rnn_packed_rows(const int64_t* batch_sizes, int steps, int batch, int64_t* offsets, int64_t* lengths,
                     void* stream);

}  // namespace cnnrnn::cuda
