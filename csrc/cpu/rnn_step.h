// One step of the scan, forward and backward: matrix product and gate arithmetic in one tile, so that
// pre-activations go from accumulators to activations without touching memory.
#pragma once

#include "rnn_cells.h"

namespace {

template <typename Cell>
constexpr int kVectorsOf = Cell::kGates * Cell::kUnitVectors;
template <typename Cell>
constexpr int kForwardRows = kTileRowsOf<kVectorsOf<Cell>>;
template <typename T, typename Cell>
constexpr int kPanelUnits = Cell::kUnitVectors * kLanesOf<T>;

// Panel `panel` of packed weights of this depth.
template <typename T, typename Cell>
CNNRNN_INLINE const T* panel_of(const void* packed, int64_t panel, int64_t depth) {
  return static_cast<const T*>(packed) + panel * depth * kVectorsOf<Cell> * kLanesOf<T>;
}

template <typename T, typename Cell, int Rows>
CNNRNN_INLINE void input_product(const RnnForwardStep<T>& s, int64_t panel, int64_t row,
                                 Vec<T> (&acc)[Rows][kVectorsOf<Cell>]) {
  const T* x[Rows];
  for (int r = 0; r < Rows; ++r) x[r] = s.x + (row + r) * s.x_stride;
  product<T, Rows, kVectorsOf<Cell>, Into::kSet>(acc, x, panel_of<T, Cell>(s.w, panel, s.input), s.input);
}

// x * W only. The result waits in `projection` until the scan reaches its time step.
template <typename T, typename Cell>
struct ProjectTile {
  static constexpr int kMostRows = kForwardRows<Cell>;
  const RnnForwardStep<T>& s;
  int64_t panel;

  template <int Rows>
  void run(int64_t row) const {
    constexpr int L = kLanesOf<T>, U = Cell::kUnitVectors;
    const int64_t unit = panel * kPanelUnits<T, Cell>;
    for (int r = 0; r < Rows; ++r)
      for (int g = 0; g < Cell::kGates; ++g)
        prefetch_to_write(s.projection + (row + r) * s.projection_stride + g * s.hidden + unit);
    Vec<T> acc[Rows][kVectorsOf<Cell>];
    input_product<T, Cell, Rows>(s, panel, row, acc);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < kVectorsOf<Cell>; ++v)
        store_n(s.projection + (row + r) * s.projection_stride + v / U * s.hidden + unit + v % U * L,
                acc[r][v], valid(s.hidden, unit + v % U * L, L));
  }
};

template <typename T, typename Cell>
struct ForwardTile {
  static constexpr int kMostRows = kForwardRows<Cell>;
  static constexpr int U = Cell::kUnitVectors, V = kVectorsOf<Cell>, L = kLanesOf<T>;
  const RnnForwardStep<T>& s;
  int64_t panel;

  template <int Rows>
  CNNRNN_INLINE void prefetch_rows(int64_t row, int64_t unit) const {
    for (int r = row; r < row + Rows; ++r) {
      if (s.kept)
        for (int k = 0; k < Cell::kKept; ++k)
          prefetch_to_write(s.kept + r * s.kept_stride + k * s.hidden + unit);
      if (Cell::kHasC) {
        prefetch_to_write(s.c_out + r * s.c_out_stride + unit);
        prefetch(state_row(s.c, r) + unit);
      }
      prefetch_to_write(s.h_out + r * s.h_out_stride + unit);
    }
  }

  template <int Rows>
  void run(int64_t row) const {
    const int64_t unit = panel * kPanelUnits<T, Cell>;
    prefetch_rows<Rows>(row, unit);
    const T* h[Rows];
    state_rows<T, Rows>(s.h, row, h);
    // Where a gate keeps the two products apart, the input's steps aside for the state's.
    constexpr int kApart = (Cell::kGates - Cell::kJoint) * U;
    Vec<T> acc[Rows][V], input_part[Rows][kApart + 1];
    if (s.projected) {
      product<T, Rows, V, Into::kSet>(acc, h, panel_of<T, Cell>(s.r, panel, s.hidden), s.hidden);
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kApart; ++v) input_part[r][v] = Vec<T>{};
    } else {
      input_product<T, Cell, Rows>(s, panel, row, acc);
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < kApart; ++v) {
          input_part[r][v] = acc[r][Cell::kJoint * U + v];
          acc[r][Cell::kJoint * U + v] = Vec<T>{};
        }
      product<T, Rows, V, Into::kAdd>(acc, h, panel_of<T, Cell>(s.r, panel, s.hidden), s.hidden);
    }
    if (unit + kPanelUnits<T, Cell> <= s.hidden)
      finish<Rows, true>(row, acc, input_part);
    else
      finish<Rows, false>(row, acc, input_part);
  }

  template <int Rows, bool kFull, int kApart>
  CNNRNN_INLINE void finish(int64_t row, const Vec<T> (&acc)[Rows][V],
                            const Vec<T> (&input_part)[Rows][kApart]) const {
    for (int u = 0; u < U; ++u) {
      const Units<false, kFull> at = {row, panel * kPanelUnits<T, Cell> + u * L, s.hidden};
      if (at.unit >= s.hidden) break;
      Pack<T, Rows> a[Cell::kParts];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        for (int g = 0; g < Cell::kJoint; ++g) a[g].v[r] = acc[r][g * U + u];
        for (int g = Cell::kJoint; g < Cell::kGates; ++g) {
          a[g].v[r] = input_part[r][(g - Cell::kJoint) * U + u];
          a[Cell::kGates + g - Cell::kJoint].v[r] = acc[r][g * U + u];
        }
      }
      if (s.projected)
        for (int g = 0; g < Cell::kGates; ++g)
          a[g] = a[g] + load_units<Rows, T>(s.projection + g * s.hidden, s.projection_stride, at);
      if (s.bias)
        for (int p = 0; p < Cell::kParts; ++p) {
          const Vec<T> bias = loadu(s.bias + (panel * Cell::kParts + p) * kPanelUnits<T, Cell> + u * L);
          for (int r = 0; r < Rows; ++r) a[p].v[r] += bias;
        }
      Cell::template forward<T, Rows>(s, at, a);
    }
  }
};

template <typename T, typename Cell>
struct BackwardTile {
  static constexpr int kMostRows = kTileRows;
  static constexpr int L = kLanesOf<T>;
  const RnnBackwardStep<T>& s;
  int64_t panel;

  template <int Rows>
  CNNRNN_INLINE void prefetch_rows(int64_t row) const {
    for (int64_t r = row; r < row + Rows; ++r) {
      for (int v = 0; v < 4; ++v) {
        const int64_t unit = panel * kPanel<T> + v * L;
        for (int k = 0; k < Cell::kKept; ++k) prefetch(s.kept + r * s.kept_stride + k * s.hidden + unit);
        for (int p = 0; p < Cell::kParts; ++p) prefetch_to_write(s.d + r * s.d_stride + p * s.hidden + unit);
        if (Cell::kHasC) prefetch(state_row(s.c, r) + unit);
        if (Cell::kHasC) prefetch(s.c_now + r * s.c_now_stride + unit);
        if (Cell::kHasCarry) prefetch(s.carry + r * s.carry_stride + unit);
        if (s.dh_1) prefetch(s.dh_1 + r * s.dh_1_stride + unit);
      }
    }
  }

  CNNRNN_INLINE const T* next_row(int64_t row) const {
    const bool cut = row >= s.continued || (s.next_reset && row < s.next_flagged && s.next_reset[row]);
    return cut ? s.zeros : s.d_next + row * s.d_stride;
  }

  template <int Rows>
  void run(int64_t row) const {
    prefetch_rows<Rows>(row);
    Vec<T> acc[Rows][4];
    if (s.d_next) {
      // The weights' rows are the gates; the state's part of a gate that keeps it apart stands last in d.
      constexpr int kJoint = Cell::kJoint, kApart = Cell::kGates - kJoint;
      const T* d[Rows];
      for (int r = 0; r < Rows; ++r) d[r] = next_row(row + r);
      const T* weights = s.r + panel * Cell::kGates * s.hidden * kPanel<T>;
      product<T, Rows, 4, Into::kSet>(acc, d, weights, kJoint * s.hidden);
      if constexpr (kApart > 0) {
        for (int r = 0; r < Rows; ++r) d[r] += Cell::kGates * s.hidden;
        product<T, Rows, 4, Into::kAdd>(acc, d, weights + kJoint * s.hidden * kPanel<T>, kApart * s.hidden);
      }
    } else {
      for (int r = 0; r < Rows; ++r)
        for (int v = 0; v < 4; ++v) acc[r][v] = Vec<T>{};
    }
    if ((panel + 1) * kPanel<T> <= s.hidden)
      finish<Rows, true>(row, acc);
    else
      finish<Rows, false>(row, acc);
  }

  template <int Rows, bool kFull>
  CNNRNN_INLINE void finish(int64_t row, const Vec<T> (&acc)[Rows][4]) const {
#pragma GCC unroll 1
    for (int64_t r = 0; r < Rows; ++r) {
      const Units<true, kFull> at = {row + r, panel * kPanel<T>, s.hidden};
      Pack<T, 4> dh;
      for (int v = 0; v < 4; ++v) dh.v[v] = acc[r][v];
      if (s.dh_1) dh = dh + load_units<4>(s.dh_1, s.dh_1_stride, at);
      if (s.dh_n && row + r >= s.continued) dh = dh + load_units<4>(s.dh_n, s.dh_n_stride, at);
      Cell::backward(s, at, dh);
    }
  }
};

template <typename Tile, typename Step>
CNNRNN_INLINE void run_tasks(const Step& step, int64_t first, int64_t last) {
  constexpr int kMost = Tile::kMostRows;
  const int64_t tiles = tiles_of<kMost>(step.rows);
  for (int64_t i = first; i < last; ++i) {
    const int64_t task = step.downward ? first + last - 1 - i : i;
    dispatch_tile<kMost>(step.rows, task % tiles, Tile{step, task / tiles});
  }
}

template <typename T, typename Cell>
void project(const RnnForwardStep<T>& step, int64_t first, int64_t last) {
  run_tasks<ProjectTile<T, Cell>>(step, first, last);
}

template <typename T, typename Cell>
void forward_step(const RnnForwardStep<T>& step, int64_t first, int64_t last) {
  run_tasks<ForwardTile<T, Cell>>(step, first, last);
}

template <typename T, typename Cell>
void backward_step(const RnnBackwardStep<T>& step, int64_t first, int64_t last) {
  run_tasks<BackwardTile<T, Cell>>(step, first, last);
}

}  // namespace
