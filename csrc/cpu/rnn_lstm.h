// One step of the LSTM scan, forward and backward: matrix product and gate arithmetic in one tile, so that
// pre-activations go from accumulators to activations without touching memory.
#pragma once

#include "../lstm_gates.h"
#include "rnn_tile.h"
#include "vmath.h"

namespace {

using cnnrnn::LstmBackwardStep;
using cnnrnn::LstmForwardStep;

// x * W only. The result waits in `gates` until the scan reaches its time step.
template <typename T>
struct ProjectTile {
  const LstmForwardStep<T>& s;
  int64_t panel;

  template <int Rows>
  void run(int64_t row) const {
    constexpr int L = kLanesOf<T>;
    const int64_t unit = panel * L, n = valid(s.hidden, unit, L);
    for (int r = 0; r < Rows; ++r)
      for (int g = 0; g < 4; ++g)
        prefetch_to_write(s.gates + (row + r) * s.gates_stride + g * s.hidden + unit);
    Vec<T> acc[Rows][4] = {};
    add_product<T, Rows>(acc, s.x + row * s.x_stride, s.x_stride, s.w + panel * s.input * kPanel<T>, s.input);
    for (int r = 0; r < Rows; ++r)
      for (int g = 0; g < 4; ++g)
        store_n(s.gates + (row + r) * s.gates_stride + g * s.hidden + unit, acc[r][g], n);
  }
};

// From pre-activations to the new state, for n units of one row.
template <typename T>
CNNRNN_INLINE void finish_units(const LstmForwardStep<T>& s, int64_t row, int64_t unit, int64_t n,
                                const LstmGates<Vec<T>>& a) {
  const LstmGates<Vec<T>> y = lstm_activate<VectorMath>(a);
  const LstmState<Vec<T>> state = lstm_update<VectorMath>(y, load_n(s.c + row * s.c_stride + unit, n));
  if (s.keep_gates) {
    T* gates = s.gates + row * s.gates_stride + unit;
    store_n(gates, y.i, n);
    store_n(gates + s.hidden, y.f, n);
    store_n(gates + 2 * s.hidden, y.g, n);
    store_n(gates + 3 * s.hidden, y.o, n);
  }
  store_n(s.c_out + row * s.c_out_stride + unit, state.c, n);
  store_n(s.h_out + row * s.h_out_stride + unit, state.h, n);
}

template <typename T>
struct ForwardTile {
  const LstmForwardStep<T>& s;
  int64_t panel;

  template <int Rows>
  void run(int64_t row) const {
    constexpr int L = kLanesOf<T>;
    const int64_t unit = panel * L, n = valid(s.hidden, unit, L);
    for (int r = 0; r < Rows; ++r) {
      if (s.gates)
        for (int g = 0; g < 4; ++g)
          prefetch_to_write(s.gates + (row + r) * s.gates_stride + g * s.hidden + unit);
      prefetch_to_write(s.c_out + (row + r) * s.c_out_stride + unit);
      prefetch_to_write(s.h_out + (row + r) * s.h_out_stride + unit);
      prefetch(s.c + (row + r) * s.c_stride + unit);
    }
    Vec<T> acc[Rows][4] = {};
    if (!s.projected)
      add_product<T, Rows>(acc, s.x + row * s.x_stride, s.x_stride, s.w + panel * s.input * kPanel<T>,
                           s.input);
    add_product<T, Rows>(acc, s.h + row * s.h_stride, s.h_stride, s.r + panel * s.hidden * kPanel<T>,
                         s.hidden);
    for (int r = 0; r < Rows; ++r) {
      if (s.projected)
        for (int g = 0; g < 4; ++g)
          acc[r][g] += load_n(s.gates + (row + r) * s.gates_stride + g * s.hidden + unit, n);
      if (s.bias)
        for (int g = 0; g < 4; ++g) acc[r][g] += loadu(s.bias + panel * kPanel<T> + g * L);
      finish_units<T>(s, row + r, unit, n, {acc[r][0], acc[r][1], acc[r][2], acc[r][3]});
    }
  }
};

template <typename T>
struct BackwardTile {
  const LstmBackwardStep<T>& s;
  int64_t panel;

  template <int Rows>
  void run(int64_t row) const {
    constexpr int L = kLanesOf<T>;
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < 4; ++v) {
        const int64_t unit = panel * kPanel<T> + v * L;
        const T* gates = s.gates + (row + r) * s.gates_stride + unit;
        for (int g = 0; g < 5; ++g) prefetch(gates + g * s.hidden);
        for (int g = 0; g < 4; ++g) prefetch_to_write(s.d + (row + r) * s.d_stride + g * s.hidden + unit);
        prefetch(s.c + (row + r) * s.c_stride + unit);
        prefetch(s.dc + (row + r) * s.dc_stride + unit);
        if (s.dh_1) prefetch(s.dh_1 + (row + r) * s.dh_1_stride + unit);
      }
    }
    Vec<T> acc[Rows][4] = {};
    if (s.d_next)
      add_product<T, Rows>(acc, s.d_next + row * s.d_stride, s.d_stride,
                           s.r + panel * 4 * s.hidden * kPanel<T>, 4 * s.hidden);
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < 4; ++v) {
        const int64_t unit = panel * kPanel<T> + v * L, n = valid(s.hidden, unit, L);
        if (n == 0) break;
        Vec<T> dh = acc[r][v];
        if (s.dh_1) dh += load_n(s.dh_1 + (row + r) * s.dh_1_stride + unit, n);
        if (s.dh_2) dh += load_n(s.dh_2 + (row + r) * s.dh_2_stride + unit, n);
        const T* gates = s.gates + (row + r) * s.gates_stride + unit;
        const LstmGates<Vec<T>> y = {load_n(gates, n), load_n(gates + s.hidden, n),
                                     load_n(gates + 2 * s.hidden, n), load_n(gates + 3 * s.hidden, n)};
        T* dc = s.dc + (row + r) * s.dc_stride + unit;
        const LstmGradients<Vec<T>> grad =
            lstm_backward<VectorMath>(y, load_n(gates + 4 * s.hidden, n),
                                      load_n(s.c + (row + r) * s.c_stride + unit, n), dh, load_n(dc, n));
        T* d = s.d + (row + r) * s.d_stride + unit;
        store_n(d, grad.a.i, n);
        store_n(d + s.hidden, grad.a.f, n);
        store_n(d + 2 * s.hidden, grad.a.g, n);
        store_n(d + 3 * s.hidden, grad.a.o, n);
        store_n(dc, grad.c_prev, n);
      }
    }
  }
};

template <template <typename> class Tile, typename T, typename Step>
CNNRNN_INLINE void run_tasks(const Step& step, int64_t first, int64_t last) {
  const int64_t tiles = tiles_of(step.rows);
  for (int64_t i = first; i < last; ++i) {
    const int64_t task = step.downward ? first + last - 1 - i : i;
    dispatch_tile(step.rows, task % tiles, Tile<T>{step, task / tiles});
  }
}

template <typename T>
void lstm_project(const LstmForwardStep<T>& step, int64_t first, int64_t last) {
  run_tasks<ProjectTile, T>(step, first, last);
}

template <typename T>
void lstm_forward_step(const LstmForwardStep<T>& step, int64_t first, int64_t last) {
  run_tasks<ForwardTile, T>(step, first, last);
}

// sums[l] += w[l] * x over `depth`, the products of each lane apart. Rows of w past the n-th repeat it.
template <typename T>
CNNRNN_INLINE void add_dots(Vec<T> (&sums)[kLanesOf<T>], const T* w, int64_t n, const T* x, int64_t depth) {
  constexpr int L = kLanesOf<T>;
  const T* rows[L];
  for (int l = 0; l < L; ++l) rows[l] = w + (l < n ? l : n - 1) * depth;
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    const Vec<T> v = loadu(x + k);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sums[l] += v * loadu(rows[l] + k);
  }
  if (k == depth) return;
  const Vec<T> v = load_n(x + k, depth - k);
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) sums[l] += v * load_n(rows[l] + k, depth - k);
}

template <typename T>
void lstm_forward_direct(const LstmForwardStep<T>& s, int64_t first, int64_t last) {
  constexpr int L = kLanesOf<T>;
  constexpr int kRows = 4;  // a panel's weights of one gate stay in cache for this many rows
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t unit = panel * L, n = valid(s.hidden, unit, L);
    for (int64_t row = 0; row < s.rows; row += kRows) {
      const int64_t rows = s.rows - row < kRows ? s.rows - row : kRows;
      Vec<T> a[kRows][4];
      for (int g = 0; g < 4; ++g) {
        const int64_t at = g * s.hidden + unit;
        Vec<T> bias{};
        if (s.bias_ih) bias = load_n(s.bias_ih + at, n) + load_n(s.bias_hh + at, n);
        for (int64_t r = 0; r < rows; ++r) {
          Vec<T> sums[L] = {};
          add_dots(sums, s.w + at * s.input, n, s.x + (row + r) * s.x_stride, s.input);
          add_dots(sums, s.r + at * s.hidden, n, s.h + (row + r) * s.h_stride, s.hidden);
          a[r][g] = sum_each<T>(sums) + bias;
        }
      }
      for (int64_t r = 0; r < rows; ++r)
        finish_units<T>(s, row + r, unit, n, {a[r][0], a[r][1], a[r][2], a[r][3]});
    }
  }
}

template <typename T>
void lstm_backward_step(const LstmBackwardStep<T>& step, int64_t first, int64_t last) {
  run_tasks<BackwardTile, T>(step, first, last);
}

}  // namespace
