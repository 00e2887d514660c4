// The forward kernels on tile registers from weights as they come: W x^T in place of x W^T.
//
// Rows of weights take the place of the rows of A, and are parted on their way into the product: each is
// read once, for all rows of the step. What is packed are the few rows of x and h, as columns of B. The sums
// come out turned, a row for each gate of a unit, and are transposed on their way into the gate arithmetic.
#pragma once

#include "rnn_amx.h"

namespace {

// One of the two products of a step: some rows of activations beside weights as they come.
template <int P, typename Cell>
struct TurnedProduct {
  static constexpr int U = Cell::kUnitVectors, V = kVectorsOf<Cell>;
  static constexpr int kGateRows = V * kTileSide;  // rows of weights of one panel of units
  const float* weights;
  int64_t hidden, depth;
  PartedRows<P> gates;
  float* panels;  // kPartedRows rows of activations each

  static int64_t scratch(int64_t rows, int64_t depth) {
    return PartedRows<P>::size(kGateRows, depth) +
           packed_parts<P, kPartedTiles>((rows + kPartedRows - 1) / kPartedRows, depth);
  }
  TurnedProduct(const void* weights, int64_t hidden, int64_t depth, float* memory)
      : weights(static_cast<const float*>(weights)),
        hidden(hidden),
        depth(depth),
        gates(memory, kGateRows, depth),
        panels(memory + PartedRows<P>::size(kGateRows, depth)) {}

  // row(r) for r in [0, rows) is where a row of activations lies.
  template <typename Rows>
  CNNRNN_INLINE void take_rows(int64_t rows, const Rows& row) const {
    for (int64_t first = 0; first < rows; first += kPartedRows)
      part_turned<P, kPartedTiles>(
          at_most(tile_rows(rows - first), kPartedTiles), depth,
          [&](int64_t c) { return first + c < rows ? row(first + c) : nullptr; },
          panels + first / kPartedRows * PartedPanel<P, kPartedTiles>::size(depth));
  }

  // The i-th row of weights of a panel of units; units beyond the last repeat it.
  CNNRNN_INLINE const float* gate_row(int64_t panel, int64_t i) const {
    const int64_t unit = panel * U * kLanes + i % (U * kLanes);
    return weights + (i / (U * kLanes) * hidden + at_most(unit, hidden - 1)) * depth;
  }
  CNNRNN_INLINE void take_panel(int64_t panel) const {
    gates.fill(kGateRows, [&](int64_t i) { return SplitRow<float>{gate_row(panel, i), depth, 0, 0}; });
  }

  // sums (+)= the product with the panel taken last, for rows from `first` on, a multiple of kPartedRows.
  CNNRNN_INLINE void multiply(int64_t panel, int64_t first, int64_t rows, PartedSums<V>& sums,
                              bool accumulate) const {
    const int64_t vectors = tile_rows(rows);
    BandSums<float, kPartedTiles, kGateRows> turned;
    multiply_parted<P, kPartedTiles>(
        turned, gates, 0, kGateRows, [&](int64_t i, int64_t k) { return gate_row(panel, i)[k]; },
        PanelSlice<P, kPartedTiles>(panels, first / kPartedRows, depth), false, vectors);
    for (int64_t c = 0; c < vectors; ++c)
      for (int v = 0; v < V; ++v) {
        vf block[kLanes];
        for (int l = 0; l < kLanes; ++l) block[l] = turned.of[v * kTileSide + l][c];
        transpose<float>(block);
        for (int l = 0; l < kLanes; ++l) {
          vf& sum = sums.of[c * kLanes + l][v];
          sum = accumulate ? sum + block[l] : block[l];
        }
      }
  }
};

// See ForwardProducts.
template <int P, typename Cell>
struct TurnedForward {
  using Product = TurnedProduct<P, Cell>;
  using Sums = PartedSums<kVectorsOf<Cell>>;
  Product x, h;

  static int64_t scratch(int64_t rows, int64_t input, int64_t hidden) {
    return Product::scratch(rows, input) + Product::scratch(rows, hidden);
  }
  TurnedForward(const RnnForwardStep<float>& s, int64_t input)
      : x(s.w, s.hidden, input, s.scratch),
        h(s.r, s.hidden, s.hidden, s.scratch + Product::scratch(s.rows, input)) {
    x.take_rows(input ? s.rows : 0, [&](int64_t r) { return s.x + r * s.x_stride; });
    h.take_rows(s.rows, [&](int64_t r) { return state_row(s.h, r); });
  }
  CNNRNN_INLINE void take_panel(int64_t panel) const { x.take_panel(panel), h.take_panel(panel); }

  template <typename Prefetch>
  CNNRNN_INLINE void input(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                           const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    x.multiply(panel, first, rows, sums, false);
  }
  template <typename Prefetch>
  CNNRNN_INLINE void state(int64_t panel, int64_t first, int64_t rows, Sums& sums, Into into,
                           const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    h.multiply(panel, first, rows, sums, into == Into::kAdd);
  }
};

// Rows of one task of project_turned.
constexpr int64_t kTurnedRows = 4 * kPartedRows;

// See PartedProjection.
template <int P, typename Cell>
struct TurnedProjection {
  using Sums = PartedSums<kVectorsOf<Cell>>;
  TurnedProduct<P, Cell> x;

  template <typename Prefetch>
  CNNRNN_INLINE void input(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                           const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    x.multiply(panel, first % kTurnedRows, rows, sums, false);
  }
};

template <int P, typename Cell>
void project_turned(const RnnForwardStep<float>& s, int64_t first, int64_t last) {
  const int64_t units = kPanelUnits<float, Cell>, panels = (s.hidden + units - 1) / units;
  const TurnedProjection<P, Cell> products = {{s.w, s.hidden, s.input, s.scratch}};
  const TileSession session;
  for (int64_t task = first; task < last; ++task) {
    const int64_t row = task / panels * kTurnedRows, panel = task % panels;
    const int64_t rows = at_most(s.rows - row, kTurnedRows);
    if (task == first || panel == 0)
      products.x.take_rows(rows, [&](int64_t r) { return s.x + (row + r) * s.x_stride; });
    products.x.take_panel(panel);
    for (int64_t r = 0; r < rows; r += kPartedRows)
      project_band<float, Cell>(s, products, panel, row + r, at_most(rows - r, kPartedRows));
  }
}

template <int P, typename Cell>
void forward_turned(const RnnForwardStep<float>& s, int64_t first, int64_t last) {
  using Products = TurnedForward<P, Cell>;
  if (first >= last) return;
  const int64_t bands = (s.rows + kPartedRows - 1) / kPartedRows;
  const Products products(s, s.projected ? 0 : s.input);
  const TileSession session;
  for (int64_t i = first, taken = -1; i < last; ++i) {
    const int64_t task = s.downward ? first + last - 1 - i : i;
    const int64_t panel = task / bands, row = task % bands * kPartedRows;
    if (panel != taken) products.take_panel(panel);
    taken = panel;
    ForwardBand<float, Cell, Products>{s, products, panel, row, at_most(s.rows - row, kPartedRows)}.run();
  }
}

template <int P, typename Cell>
constexpr cnnrnn::CellKernels<float> turned_cell() {
  cnnrnn::CellKernels<float> k = parted_cell<P, Cell>();
  k.takes_bf16 = false, k.as_they_come = true;
  k.tile_rows = kPartedRows, k.band_rows = kTurnedRows;
  k.packed = nullptr, k.pack_gates = nullptr, k.pack_gates_bf16 = nullptr, k.backward = nullptr;
  k.scratch = [](int64_t rows, int64_t input, int64_t hidden, bool) {
    return TurnedForward<P, Cell>::scratch(rows, input, hidden);
  };
  k.project_scratch = [](int64_t rows, int64_t input) {
    return TurnedProduct<P, Cell>::scratch(at_most(rows, kTurnedRows), input);
  };
  k.project = project_turned<P, Cell>, k.forward = forward_turned<P, Cell>;
  return k;
}

}  // namespace
