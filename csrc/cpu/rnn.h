// The recurrent CPU kernels as the host file sees them: raw pointers, sizes, one table per instruction set.
//
// Every matrix product is rows of A times a packed panel of B: 4 vectors of columns side by side,
// [K][4][lanes], so that a tile of rows x 4 vectors of accumulators reads B with unit stride. Work is cut
// into tasks, numbered panel by panel and, within a panel, from one tile of rows to the next; a caller may
// hand any range of tasks to any thread: the same tasks give the same bits.
#pragma once

#include <cstdint>

namespace cnnrnn {

// One step of the LSTM scan over `rows` batch rows. Panels hold `lanes` hidden units x the 4 gates.
template <typename T>
struct LstmForwardStep {
  int64_t rows, hidden, input;
  bool downward;   // tasks in falling order: every other step, so that what is in cache is used first
  bool projected;  // `gates` holds x * W already; x and w are not read
  const T* x;      // [rows, input]
  int64_t x_stride;
  const T* w;  // packed [ceil(hidden / lanes)][input][4][lanes]
  const T* h;  // [rows, hidden]: the state before
  int64_t h_stride;
  const T* r;        // packed [ceil(hidden / lanes)][hidden][4][lanes]
  const T* bias;     // [ceil(hidden / lanes)][4][lanes], or null
  const T* bias_ih;  // [4, hidden], or null: for forward_direct in place of `bias`
  const T* bias_hh;
  const T* c;  // [rows, hidden]: the state before
  int64_t c_stride;
  T* gates;  // [rows, 4, hidden]; null where neither is needed
  int64_t gates_stride;
  bool keep_gates;  // write the activated gates there
  T* c_out;         // [rows, hidden]; may be c
  int64_t c_out_stride;
  T* h_out;  // [rows, hidden]; not h
  int64_t h_out_stride;
};

// One step of the scan back. Panels hold 4 * lanes hidden units.
template <typename T>
struct LstmBackwardStep {
  int64_t rows, hidden;
  bool downward;
  const T* d_next;  // [rows, 4, hidden]: gradient of the pre-activations one step later; null at the last
  int64_t d_stride;
  const T* r;     // packed [ceil(hidden / (4 * lanes))][4 * hidden][4 * lanes]
  const T* dh_1;  // [rows, hidden]: further gradients of h, each may be null
  int64_t dh_1_stride;
  const T* dh_2;
  int64_t dh_2_stride;
  T* dc;  // [rows, hidden]: gradient of this step's c, replaced by that of the c before
  int64_t dc_stride;
  const T* gates;  // [rows, 5, hidden]: activated gates, then c
  int64_t gates_stride;
  const T* c;  // [rows, hidden]: the state before
  int64_t c_stride;
  T* d;  // [rows, 4, hidden]
};

// C (+)= A B for one or more panels of B.
template <typename T>
struct Product {
  int64_t rows, columns, depth;
  const T* a;  // element (r, k) at a[r * a_row + k * a_depth]; one of the two strides is 1
  int64_t a_row, a_depth;
  const T* b;  // packed panels, or row-major [depth, columns]
  int64_t b_stride;
  T* c;  // [rows, columns]
  int64_t c_stride;
  bool accumulate;
};

template <typename T>
struct LstmKernels {
  int lanes, tile_rows;
  int64_t row_block;  // rows of one task of multiply_unpacked
  // b [depth][columns] row-major to panels [first, last) of [ceil(columns / (4 * lanes))][depth][4 * lanes].
  void (*pack_columns)(const T* b, int64_t stride, int64_t depth, int64_t columns, int64_t first,
                       int64_t last, T* out);
  // w [4 * hidden][depth] to panels [first, last) of [ceil(hidden / lanes)][depth][4][lanes].
  void (*pack_gates)(const T* w, int64_t hidden, int64_t depth, int64_t first, int64_t last, T* out);
  // The sum of two bias vectors [4 * hidden] in panels [ceil(hidden / lanes)][4][lanes].
  void (*pack_bias)(const T* ih, const T* hh, int64_t hidden, T* out);
  // gates [rows, 4, hidden] = x * W, tasks of LstmForwardStep.
  void (*project)(const LstmForwardStep<T>& step, int64_t first, int64_t last);
  void (*forward)(const LstmForwardStep<T>& step, int64_t first, int64_t last);
  // The same from weights as they come, w [4, hidden, input] and r [4, hidden, hidden]: for so few rows that
  // packing would take longer. Tasks are panels, each with all rows.
  void (*forward_direct)(const LstmForwardStep<T>& step, int64_t first, int64_t last);
  void (*backward)(const LstmBackwardStep<T>& step, int64_t first, int64_t last);
  // b packed beforehand, a contiguous by row. Tasks: panels x tiles of rows.
  void (*multiply)(const Product<T>& product, int64_t first, int64_t last);
  // b row-major, a contiguous by column; `scratch` holds product_scratch elements, one for each thread.
  // Tasks: panels x blocks of row_block rows.
  void (*multiply_unpacked)(const Product<T>& product, int64_t first, int64_t last, T* scratch);
  int64_t product_scratch;
  // out[m] = sum over k of a[k * stride + m], for m in [first, last).
  void (*sum_rows)(const T* a, int64_t stride, int64_t depth, int64_t first, int64_t last, T* out);
};

struct RnnKernels {
  LstmKernels<float> f32;
  LstmKernels<double> f64;
};

extern const RnnKernels rnn_baseline, rnn_avx2, rnn_avx512;

}  // namespace cnnrnn
