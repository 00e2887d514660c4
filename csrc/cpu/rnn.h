// The recurrent CPU kernels as the host files see them: raw pointers, sizes, one table per instruction set.
//
// Every matrix product is rows of A times a packed panel of B: some vectors of columns side by side,
// [K][vectors][lanes] (or as tile registers want it: split.h), so that a tile of rows x vectors of
// accumulators reads B with unit stride. Work is cut
// into tasks, numbered panel by panel and, within a panel, from one tile of rows to the next; a caller may
// hand any range of tasks to any thread: the same tasks give the same bits.
//
// Sizes of a cell, per hidden unit: G gates (rows of its weights), P parts of the pre-activations (G, but 4
// for gru, whose n has one part from the input and one from the state), K values kept for the backward.
#pragma once

#include <cstdint>

namespace cnnrnn {

// A bfloat16, by its bits: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

// Where the rows of a step find the state before it.
template <typename T>
struct StateRows {
  const T* before;  // [carried, hidden]: of rows whose sequence is under way
  int64_t before_stride, carried;
  const T* initial;  // [rows, hidden]: of the rows from `carried` on
  int64_t initial_stride;
  const uint8_t* reset;  // [flagged], or null: a row whose flag is set starts from `zeros`
  int64_t flagged;
  const T* zeros;
};

// What a step keeps for the backward, `kept_rows` rows in all of which the call's begin at kept_first:
// [vectors of units][kept_rows][K][lanes], the last vector as narrow as the units that are left. So what a
// panel's kernel writes, and later reads, lies side by side: rows of [K, hidden] would be a page apart.
template <typename T, int K>
struct Kept {
  T* base;
  int64_t rows, first, hidden;
  T* at(int64_t row, int k, int64_t unit, int64_t lanes) const {
    const int64_t width = hidden - unit < lanes ? hidden - unit : lanes;
    return base + unit * rows * K + ((first + row) * K + k) * width;
  }
};

// One step of the scan over `rows` batch rows. Forward panels hold `panel_units` hidden units x G gates.
template <typename T>
struct RnnForwardStep {
  int64_t rows, hidden, input;
  bool downward;       // tasks in falling order: every other step, so that what is in cache is used first
  bool projected;      // `projection` holds x * W already; x and w are not read
  const T* x;          // [rows, input]
  const Bf16* x_bf16;  // the same in bfloat16 in place of x, for the kernels that take it
  int64_t x_stride;
  const void* w;                 // packed panels of depth `input`; direct: [G, hidden, input] as it comes
  const void* r;                 // packed panels of depth `hidden`; direct: [G, hidden, hidden]
  const T* bias;                 // [panels][P][panel_units], or null
  const T *bias_ih, *bias_hh;    // [G, hidden], or null: for the direct kernels in place of `bias`
  const T *scale_ih, *scale_hh;  // [G, hidden], or null: of the rows of narrow weights
  StateRows<T> h, c;
  T* projection;  // [rows, G, hidden]
  int64_t projection_stride;
  T* kept;  // see Kept; or null
  int64_t kept_rows, kept_first;
  T* c_out;  // [rows, hidden]; may be where c comes from
  int64_t c_out_stride;
  T* h_out;  // [rows, hidden]; not where h comes from
  int64_t h_out_stride;
  T* scratch;  // CellKernels::scratch elements, nobody else's during the call
};

// One step of the scan back. Panels hold 4 * lanes hidden units.
template <typename T>
struct RnnBackwardStep {
  int64_t rows, hidden;
  bool downward;
  const T*
      d_next;  // [continued, P, hidden]: gradient of the pre-activations one step later; null at the last
  int64_t d_stride, continued;
  const uint8_t* next_reset;  // [next_flagged], or null: the step later did not see this row's state
  int64_t next_flagged;
  const T* zeros;  // [P * hidden]
  const T* r;      // packed columns of depth G * hidden
  const T* dh_1;   // [rows, hidden], or null: gradient of the output
  int64_t dh_1_stride;
  const T* dh_n;  // [rows, hidden], or null: gradient of the last state, for the rows from `continued` on
  int64_t dh_n_stride;
  const T* dc_1;  // [rows, hidden], or null: gradient of the cells
  int64_t dc_1_stride;
  T* carry;  // [rows, hidden]: lstm: gradient of c; gru: of h, past the product. Replaced by the step
             // before's
  int64_t carry_stride;
  const T* kept;  // see Kept
  int64_t kept_rows, kept_first;
  const T* h_now;  // [rows, hidden]
  int64_t h_now_stride;
  const T* c_now;
  int64_t c_now_stride;
  StateRows<T> h, c;  // before this step
  T* d;               // [rows, P, hidden]
  T* scratch;         // CellKernels::scratch elements, nobody else's during the call
};

// C (+)= A B for one or more panels of B.
template <typename T>
struct Product {
  int64_t rows, columns, depth;
  const T* a;  // element (r, k) at a[r * a_row + k * a_depth]; one of the two strides is 1
  int64_t a_row, a_depth;
  const T* const* a_rows;   // where each row of A begins, or null
  int64_t a_split, a_skip;  // multiply: from depth a_split on, a row goes on a_skip elements further
  const T* b;               // packed panels, or row-major [depth, columns]
  const Bf16* b_bf16;       // a row-major B in bfloat16 in its place, or null
  int64_t b_stride;
  const T* const* b_rows;  // where each row of an unpacked B begins, or null
  T* c;                    // [rows, columns]
  int64_t c_stride;
  bool accumulate;
};

template <typename T>
struct CellKernels {
  int gates, parts, kept;
  int joint;  // the first gates, whose input and state parts are one; the others' state parts stand last
  bool has_c, has_carry;
  bool takes_bf16;    // project and forward: x_bf16
  bool as_they_come;  // project and forward: weights [G, hidden, depth]; nothing packs them
  int panel_units, tile_rows, band_rows;
  int64_t (*packed)(int64_t panels, int64_t depth);  // elements that packed weights take
  // Elements of scratch memory that a step of `rows` rows needs, forward (input 0 where projected) or back;
  // and their projection.
  int64_t (*scratch)(int64_t rows, int64_t input, int64_t hidden, bool backward);
  int64_t (*project_scratch)(int64_t rows, int64_t input);
  // w [G * hidden][depth] to panels [first, last).
  void (*pack_gates)(const T* w, int64_t hidden, int64_t depth, int64_t first, int64_t last, T* out);
  void (*pack_gates_bf16)(const Bf16* w, int64_t hidden, int64_t depth, int64_t first, int64_t last, T* out);
  void (*pack_bias)(const T* ih, const T* hh, int64_t hidden, T* out);
  // projection = x * W. Tasks: bands of band_rows rows x panels.
  void (*project)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  void (*forward)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  // The same from weights as they come: for so few rows that packing would take longer. Tasks are panels,
  // each with all rows. With `projected`, x * W is taken from `projection`.
  void (*forward_direct)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  // forward_direct and project with narrow weights. Tasks are panels in all of them. These, and what packs
  // from bfloat16, are null for double.
  void (*forward_bf16)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  void (*forward_int8)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  void (*project_bf16)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  void (*project_int8)(const RnnForwardStep<T>& step, int64_t first, int64_t last);
  void (*backward)(const RnnBackwardStep<T>& step, int64_t first, int64_t last);
};

enum Cell { kLstm, kGru, kRnnTanh, kRnnRelu, kCells };

template <typename T>
struct RnnKernels {
  int lanes, tile_rows, band_rows;
  int64_t row_block;                                 // rows of one task of multiply_unpacked
  int64_t (*packed)(int64_t panels, int64_t depth);  // elements that packed columns take
  // b [depth][columns] row-major to panels [first, last) of 4 * lanes columns.
  void (*pack_columns)(const T* b, int64_t stride, int64_t depth, int64_t columns, int64_t first,
                       int64_t last, T* out);
  void (*pack_columns_bf16)(const Bf16* b, int64_t stride, int64_t depth, int64_t columns, int64_t first,
                            int64_t last, T* out);
  // b packed beforehand, a contiguous by row. Tasks: bands of band_rows rows x panels. `scratch` holds
  // multiply_scratch(depth) elements, one for each thread.
  void (*multiply)(const Product<T>& product, int64_t first, int64_t last, T* scratch);
  int64_t (*multiply_scratch)(int64_t depth);
  // b row-major, a contiguous by column; `scratch` holds product_scratch elements, one for each thread.
  // Tasks: panels x blocks of row_block rows.
  void (*multiply_unpacked)(const Product<T>& product, int64_t first, int64_t last, T* scratch);
  int64_t product_scratch;
  // out[m] = sum over k of a[k * stride + m], for m in [first, last).
  void (*sum_rows)(const T* a, int64_t stride, int64_t depth, int64_t first, int64_t last, T* out);
  CellKernels<T> cells[kCells];
};

struct RnnTable {
  RnnKernels<float> f32;
  RnnKernels<double> f64;
};

extern const RnnTable rnn_baseline, rnn_avx2, rnn_avx512;

// On tile registers: beside rnn_avx512, for as many rows as fill a tile. The direct kernels are missing.
extern const RnnKernels<float> rnn_amx_float32, rnn_amx_bfloat16;

// On tile registers too, forward only: for rows that would not make up for packing the weights.
extern const CellKernels<float> rnn_amx_turned[kCells];

}  // namespace cnnrnn
