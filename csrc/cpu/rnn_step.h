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

// The two products of a forward step, from rows and panels of T as they are. Bands reach a step's operands
// through this or its like, so that gate arithmetic stands once for every way to multiply.
template <typename T, typename Cell>
struct ForwardProducts {
  static constexpr int V = kVectorsOf<Cell>;
  using Sums = BandSums<T, V>;
  const RnnForwardStep<T>& s;

  // sums = x * W for `rows` rows from `first` on.
  template <typename Prefetch>
  CNNRNN_INLINE void input(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                           const Prefetch& prefetch) const {
    const T* x[Sums::kRows];
    for (int64_t r = 0; r < rows; ++r) x[r] = s.x + (first + r) * s.x_stride;
    multiply_band(sums, rows, x, panel_of<T, Cell>(s.w, panel, s.input), s.input, Into::kSet, prefetch);
  }
  // sums (+)= h * R
  template <typename Prefetch>
  CNNRNN_INLINE void state(int64_t panel, int64_t first, int64_t rows, Sums& sums, Into into,
                           const Prefetch& prefetch) const {
    const T* h[Sums::kRows];
    state_rows(s.h, first, rows, h);
    multiply_band(sums, rows, h, panel_of<T, Cell>(s.r, panel, s.hidden), s.hidden, into, prefetch);
  }
};

// x * W only. The result waits in `projection` until the scan reaches its time step.
template <typename T, typename Cell, typename Products>
CNNRNN_INLINE void project_band(const RnnForwardStep<T>& s, const Products& products, int64_t panel,
                                int64_t first, int64_t rows) {
  constexpr int V = kVectorsOf<Cell>, L = kLanesOf<T>, U = Cell::kUnitVectors;
  const int64_t unit = panel * kPanelUnits<T, Cell>;
  typename Products::Sums sums;
  products.input(panel, first, rows, sums, [&](int64_t r) {
    for (int g = 0; g < Cell::kGates; ++g)
      prefetch_to_write(s.projection + (first + r) * s.projection_stride + g * s.hidden + unit);
  });
  for (int64_t r = 0; r < rows; ++r)
    for (int v = 0; v < V; ++v)
      store_n(s.projection + (first + r) * s.projection_stride + v / U * s.hidden + unit + v % U * L,
              sums.of[r][v], valid(s.hidden, unit + v % U * L, L));
}

template <typename T, typename Cell, typename Products>
struct ForwardBand {
  static constexpr int kMostRows = kForwardRows<Cell>;
  static constexpr int U = Cell::kUnitVectors, V = kVectorsOf<Cell>, L = kLanesOf<T>;
  // Where a gate keeps the two products apart, the input's steps aside for the state's.
  static constexpr int kApart = (Cell::kGates - Cell::kJoint) * U;
  using Sums = typename Products::Sums;
  using InputPart = Vec<T>[Sums::kRows][kApart + 1];
  const RnnForwardStep<T>& s;
  const Products& products;
  int64_t panel, first, rows;

  CNNRNN_INLINE void prefetch_row(int64_t r, int64_t unit) const {
    if (s.kept)
      for (int k = 0; k < Cell::kKept; ++k) prefetch_to_write(kept_of<Cell>(s).at(r, k, unit, L));
    if (Cell::kHasC) {
      prefetch_to_write(s.c_out + r * s.c_out_stride + unit);
      prefetch(state_row(s.c, r) + unit);
    }
    if (s.projected)
      for (int g = 0; g < Cell::kGates; ++g)
        prefetch(s.projection + r * s.projection_stride + g * s.hidden + unit);
    prefetch_to_write(s.h_out + r * s.h_out_stride + unit);
  }

  void run() const {
    const int64_t unit = panel * kPanelUnits<T, Cell>;
    const auto ahead = [&](int64_t r) { prefetch_row(first + r, unit); };
    Sums sums;
    InputPart input_part;
    if (s.projected) {
      products.state(panel, first, rows, sums, Into::kSet, ahead);
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kApart; ++v) input_part[r][v] = Vec<T>{};
    } else {
      products.input(panel, first, rows, sums, ahead);
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < kApart; ++v) {
          input_part[r][v] = sums.of[r][Cell::kJoint * U + v];
          sums.of[r][Cell::kJoint * U + v] = Vec<T>{};
        }
      products.state(panel, first, rows, sums, Into::kAdd, NoPrefetch{});
    }
    if (unit + kPanelUnits<T, Cell> <= s.hidden)
      for_tiles<kMostRows>(rows, Finish<true>{*this, sums, input_part});
    else
      for_tiles<kMostRows>(rows, Finish<false>{*this, sums, input_part});
  }

  template <bool kFull>
  struct Finish {
    const ForwardBand& band;
    const Sums& sums;
    const InputPart& input_part;
    template <int Rows>
    CNNRNN_INLINE void run(int64_t row) const {
      band.finish<Rows, kFull>(row, sums.of + row, input_part + row);
    }
  };

  template <int Rows, bool kFull>
  CNNRNN_INLINE void finish(int64_t row, const Vec<T> (*sum)[V],
                            const Vec<T> (*input_part)[kApart + 1]) const {
    for (int u = 0; u < U; ++u) {
      const Units<false, kFull> at = {first + row, panel * kPanelUnits<T, Cell> + u * L, s.hidden};
      if (at.unit >= s.hidden) break;
      Pack<T, Rows> a[Cell::kParts];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        for (int g = 0; g < Cell::kJoint; ++g) a[g].v[r] = sum[r][g * U + u];
        for (int g = Cell::kJoint; g < Cell::kGates; ++g) {
          a[g].v[r] = input_part[r][(g - Cell::kJoint) * U + u];
          a[Cell::kGates + g - Cell::kJoint].v[r] = sum[r][g * U + u];
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

// Row `row` of the gradients one step later, as far as they reach this step.
template <typename T>
CNNRNN_INLINE const T* next_row(const RnnBackwardStep<T>& s, int64_t row) {
  const bool cut = row >= s.continued || (s.next_reset && row < s.next_flagged && s.next_reset[row]);
  return cut ? s.zeros : s.d_next + row * s.d_stride;
}

// The product of a step back; see ForwardProducts. The weights' rows are the gates; the state's part of a
// gate that keeps it apart stands last in d.
template <typename T, typename Cell>
struct BackwardProducts {
  using Sums = BandSums<T, 4>;
  const RnnBackwardStep<T>& s;

  template <typename Prefetch>
  CNNRNN_INLINE void next(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                          const Prefetch& prefetch) const {
    constexpr int kJoint = Cell::kJoint, kApart = Cell::kGates - kJoint;
    const T* d[Sums::kRows];
    for (int64_t r = 0; r < rows; ++r) d[r] = next_row(s, first + r);
    const T* weights = s.r + panel * Cell::kGates * s.hidden * kPanel<T>;
    multiply_band(sums, rows, d, weights, kJoint * s.hidden, Into::kSet, prefetch);
    if constexpr (kApart > 0) {
      for (int64_t r = 0; r < rows; ++r) d[r] += Cell::kGates * s.hidden;
      multiply_band(sums, rows, d, weights + kJoint * s.hidden * kPanel<T>, kApart * s.hidden, Into::kAdd);
    }
  }
};

template <typename T, typename Cell, typename Products>
struct BackwardBand {
  static constexpr int L = kLanesOf<T>;
  using Sums = typename Products::Sums;
  const RnnBackwardStep<T>& s;
  const Products& products;
  int64_t panel, first, rows;

  CNNRNN_INLINE void prefetch_row(int64_t r) const {
    for (int v = 0; v < 4; ++v) {
      const int64_t unit = panel * kPanel<T> + v * L;
      for (int k = 0; k < Cell::kKept; ++k) prefetch(kept_of<Cell>(s).at(r, k, unit, L));
      for (int p = 0; p < Cell::kParts; ++p) prefetch_to_write(s.d + r * s.d_stride + p * s.hidden + unit);
      if (Cell::kHasC) prefetch(state_row(s.c, r) + unit);
      if (Cell::kHasC) prefetch(s.c_now + r * s.c_now_stride + unit);
      if (Cell::kHasCarry) prefetch(s.carry + r * s.carry_stride + unit);
      if (s.dh_1) prefetch(s.dh_1 + r * s.dh_1_stride + unit);
    }
  }

  void run() const {
    Sums sums;
    if (s.d_next)
      products.next(panel, first, rows, sums, [&](int64_t r) { prefetch_row(first + r); });
    else
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < 4; ++v) sums.of[r][v] = Vec<T>{};
    if ((panel + 1) * kPanel<T> <= s.hidden)
      finish<true>(sums);
    else
      finish<false>(sums);
  }

  template <bool kFull>
  CNNRNN_INLINE void finish(const Sums& sums) const {
#pragma GCC unroll 1
    for (int64_t r = 0; r < rows; ++r) {
      const Units<true, kFull> at = {first + r, panel * kPanel<T>, s.hidden};
      Pack<T, 4> dh;
      for (int v = 0; v < 4; ++v) dh.v[v] = sums.of[r][v];
      if (s.dh_1) dh = dh + load_units<4>(s.dh_1, s.dh_1_stride, at);
      if (s.dh_n && first + r >= s.continued) dh = dh + load_units<4>(s.dh_n, s.dh_n_stride, at);
      Cell::backward(s, at, dh);
    }
  }
};

template <typename T, typename Cell>
void project(const RnnForwardStep<T>& step, int64_t first, int64_t last) {
  const ForwardProducts<T, Cell> products = {step};
  const int64_t units = kPanelUnits<T, Cell>, panels = (step.hidden + units - 1) / units;
  for_panels_of_bands<kVectorsOf<Cell>>(step.rows, panels, first, last,
                                        [&](int64_t panel, int64_t row, int64_t rows) {
                                          project_band<T, Cell>(step, products, panel, row, rows);
                                        });
}

template <typename T, typename Cell>
void forward_step(const RnnForwardStep<T>& step, int64_t first, int64_t last) {
  using Products = ForwardProducts<T, Cell>;
  const Products products = {step};
  for_bands_of_panels<kForwardRows<Cell>>(
      step.rows, first, last, step.downward, [&](int64_t panel, int64_t row, int64_t rows) {
        ForwardBand<T, Cell, Products>{step, products, panel, row, rows}.run();
      });
}

template <typename T, typename Cell>
void backward_step(const RnnBackwardStep<T>& step, int64_t first, int64_t last) {
  using Products = BackwardProducts<T, Cell>;
  const Products products = {step};
  for_bands_of_panels<kTileRows>(step.rows, first, last, step.downward,
                                 [&](int64_t panel, int64_t row, int64_t rows) {
                                   BackwardBand<T, Cell, Products>{step, products, panel, row, rows}.run();
                                 });
}

}  // namespace
