// The recurrent kernels on tile registers: float32 by three bfloat16 parts, or bfloat16 by one (split.h).
// Gate arithmetic, tasks and everything else are those of the plain kernels; only products differ.
#pragma once

#include "rnn.h"
#include "rnn_product.h"
#include "split.h"

namespace {

constexpr int kPartedTiles = 4;  // tiles of rows that pass over a panel together
constexpr int kPartedRows = kPartedTiles * kTileSide;

template <int V>
using PartedSums = BandSums<float, V, kPartedRows>;

// pack_gates: columns of B are rows of w.
template <int P, typename Cell, typename W>
void part_gates(const W* w, int64_t hidden, int64_t depth, int64_t first, int64_t last, float* out) {
  constexpr int U = Cell::kUnitVectors, V = kVectorsOf<Cell>;
  for (int64_t panel = first; panel < last; ++panel)
    part_turned<P, V>(
        V, depth,
        [&](int64_t c) {
          const int64_t unit = panel * U * kLanes + c % (U * kLanes);
          return unit < hidden ? w + (c / (U * kLanes) * hidden + unit) * depth : nullptr;
        },
        out + panel * PartedPanel<P, V>::size(depth));
}

// for_bands_of_panels, with tiles of rows where the tile registers have them.
template <typename F>
CNNRNN_INLINE void for_parted_bands(int64_t rows, int64_t first, int64_t last, bool downward, const F& f) {
  if (first >= last) return;
  const int64_t tiles = tile_rows(rows), panels_begin = first / tiles, panels_last = (last - 1) / tiles;
  for (int64_t i = panels_begin; i <= panels_last; ++i) {
    const int64_t panel = downward ? panels_begin + panels_last - i : i;
    const int64_t begin = first > panel * tiles ? first - panel * tiles : 0;
    const int64_t end = last < (panel + 1) * tiles ? last - panel * tiles : tiles;
    for (int64_t tile = begin; tile < end; tile += kPartedTiles) {
      const int64_t row = tile * kTileSide;
      const int64_t row_end = at_most(at_most(tile + kPartedTiles, end) * kTileSide, rows);
      f(panel, row, row_end - row);
    }
  }
}

// Prepares x from row `first` on.
template <int P>
CNNRNN_INLINE void fill_input(const RnnForwardStep<float>& s, const PartedRows<P>& x, int64_t first,
                              int64_t rows) {
  const auto fill = [&](auto from) {
    x.fill(rows, [&](int64_t r) {
      return SplitRow<std::decay_t<decltype(*from)>>{from + (first + r) * s.x_stride, s.input, 0, 0};
    });
  };
  s.x_bf16 ? fill(s.x_bf16) : fill(s.x);
}
CNNRNN_INLINE float input_at(const RnnForwardStep<float>& s, int64_t row, int64_t k) {
  return s.x_bf16 ? value_of(s.x_bf16[row * s.x_stride + k]) : s.x[row * s.x_stride + k];
}

// See ForwardProducts. Rows are prepared once for all panels of the call.
template <int P, typename Cell>
struct PartedForward {
  static constexpr int V = kVectorsOf<Cell>;
  using Sums = PartedSums<V>;
  const RnnForwardStep<float>& s;
  PartedRows<P> x, h;

  static int64_t scratch(int64_t rows, int64_t input, int64_t hidden) {
    return PartedRows<P>::size(rows, input) + PartedRows<P>::size(rows, hidden);
  }
  PartedForward(const RnnForwardStep<float>& s)
      : s(s),
        x(s.scratch, s.rows, s.projected ? 0 : s.input),
        h(s.scratch + PartedRows<P>::size(s.rows, s.projected ? 0 : s.input), s.rows, s.hidden) {
    if (!s.projected) fill_input(s, x, 0, s.rows);
    h.fill(s.rows, [&](int64_t r) { return SplitRow<float>{state_row(s.h, r), s.hidden, 0, 0}; });
  }

  template <typename Prefetch>
  CNNRNN_INLINE void input(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                           const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    multiply_parted<P, V>(
        sums, x, first / kTileSide, rows, [&](int64_t r, int64_t k) { return input_at(s, first + r, k); },
        PanelSlice<P, V>(s.w, panel, s.input), false);
  }
  template <typename Prefetch>
  CNNRNN_INLINE void state(int64_t panel, int64_t first, int64_t rows, Sums& sums, Into into,
                           const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    multiply_parted<P, V>(
        sums, h, first / kTileSide, rows, [&](int64_t r, int64_t k) { return state_row(s.h, first + r)[k]; },
        PanelSlice<P, V>(s.r, panel, s.hidden), into == Into::kAdd);
  }
};

// The same for the projection, whose tasks want the rows of one band at a time.
template <int P, typename Cell>
struct PartedProjection {
  static constexpr int V = kVectorsOf<Cell>;
  using Sums = PartedSums<V>;
  const RnnForwardStep<float>& s;
  PartedRows<P> x;

  template <typename Prefetch>
  CNNRNN_INLINE void input(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                           const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    multiply_parted<P, V>(
        sums, x, 0, rows, [&](int64_t r, int64_t k) { return input_at(s, first + r, k); },
        PanelSlice<P, V>(s.w, panel, s.input), false);
  }
};

// See BackwardProducts.
template <int P, typename Cell>
struct PartedBackward {
  using Sums = PartedSums<4>;
  const RnnBackwardStep<float>& s;
  PartedRows<P> d;

  static int64_t depth(int64_t hidden) { return Cell::kGates * hidden; }
  PartedBackward(const RnnBackwardStep<float>& s) : s(s), d(s.scratch, s.rows, depth(s.hidden)) {
    if (s.d_next) d.fill(s.rows, [&](int64_t r) { return row(r); });
  }
  CNNRNN_INLINE SplitRow<float> row(int64_t r) const {
    constexpr int kApart = Cell::kGates - Cell::kJoint;
    return {next_row(s, r), Cell::kJoint * s.hidden, kApart * s.hidden, 0};
  }
  template <typename Prefetch>
  CNNRNN_INLINE void next(int64_t panel, int64_t first, int64_t rows, Sums& sums,
                          const Prefetch& prefetch) const {
    for (int64_t r = 0; r < rows; ++r) prefetch(r);
    multiply_parted<P, 4>(
        sums, d, first / kTileSide, rows, [&](int64_t r, int64_t k) { return *row(first + r).at(k); },
        PanelSlice<P, 4>(s.r, panel, depth(s.hidden)), false);
  }
};

template <int P, typename Cell>
int64_t scratch_parted(int64_t rows, int64_t input, int64_t hidden, bool backward) {
  if (backward) return PartedRows<P>::size(rows, PartedBackward<P, Cell>::depth(hidden));
  return PartedForward<P, Cell>::scratch(rows, input, hidden);
}

template <int P, typename Cell>
void project_parted(const RnnForwardStep<float>& s, int64_t first, int64_t last) {
  const int64_t units = kPanelUnits<float, Cell>, panels = (s.hidden + units - 1) / units;
  const PartedProjection<P, Cell> products = {s, PartedRows<P>(s.scratch, kPartedRows, s.input)};
  const TileSession session;
  for (int64_t task = first; task < last; ++task) {
    const int64_t row = task / panels * kPartedRows, rows = at_most(s.rows - row, kPartedRows);
    if (task == first || task % panels == 0) fill_input(s, products.x, row, rows);
    project_band<float, Cell>(s, products, task % panels, row, rows);
  }
}

template <int P, typename Cell>
void forward_parted(const RnnForwardStep<float>& s, int64_t first, int64_t last) {
  using Products = PartedForward<P, Cell>;
  if (first >= last) return;
  const Products products(s);
  const TileSession session;
  for_parted_bands(s.rows, first, last, s.downward, [&](int64_t panel, int64_t row, int64_t rows) {
    ForwardBand<float, Cell, Products>{s, products, panel, row, rows}.run();
  });
}

template <int P, typename Cell>
void backward_parted(const RnnBackwardStep<float>& s, int64_t first, int64_t last) {
  using Products = PartedBackward<P, Cell>;
  if (first >= last) return;
  const Products products(s);
  const TileSession session;
  for_parted_bands(s.rows, first, last, s.downward, [&](int64_t panel, int64_t row, int64_t rows) {
    BackwardBand<float, Cell, Products>{s, products, panel, row, rows}.run();
  });
}

// ---- outside the scan ----

// Blocks of the products: so many rows of A, depths and panels of B are parted, and stay in the second-level
// cache, together.
constexpr int64_t kPartedBlock = 3 * kPartedRows, kPartedDepth = 512, kPartedGroup = 4;

// to (+)= A * panel for the rows of a block of A, row(r) as A was filled.
template <int P, typename Rows>
CNNRNN_INLINE void multiply_block(const PartedRows<P>& a, int64_t rows, const Rows& row,
                                  const PanelSlice<P, 4>& panel, const ProductColumns<float>& to) {
  for (int64_t r = 0; r < rows; r += kPartedRows) {
    const int64_t now = at_most(rows - r, kPartedRows);
    const ProductColumns<float> band = {to.c + r * to.stride, to.stride, to.columns, to.accumulate};
    for (int64_t i = 0; i < now; ++i) band.prefetch_row(i);
    PartedSums<4> sums;
    multiply_parted<P, 4>(
        sums, a, r / kTileSide, now, [&](int64_t i, int64_t k) { return *row(r + i).at(k); }, panel, false);
    for (int64_t i = 0; i < now; ++i) band.store(i, sums.of[i]);
  }
}

template <int P>
int64_t multiply_scratch_parted(int64_t depth) {
  return PartedRows<P>::size(kPartedBlock, at_most(depth, kPartedDepth));
}

template <int P>
void multiply_parted_columns(const Product<float>& p, int64_t first, int64_t last, float* scratch) {
  const int64_t panels = (p.columns + kPanel<float> - 1) / kPanel<float>;
  const TileSession session;
  for (int64_t task = first; task < last;) {
    const int64_t row = task / panels * kPartedBlock, rows = at_most(p.rows - row, kPartedBlock);
    const int64_t begin = task % panels, end = at_most(begin + last - task, panels);
    for (int64_t k = 0; k == 0 || k < p.depth; k += kPartedDepth) {
      const PartedRows<P> a(scratch, kPartedBlock, at_most(p.depth - k, kPartedDepth));
      const auto row_of_a = [&](int64_t r) {
        return SplitRow<float>{p.a_rows ? p.a_rows[row + r] : p.a + (row + r) * p.a_row, p.a_split, p.a_skip,
                               k};
      };
      a.fill(rows, row_of_a);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanel<float>;
        multiply_block<P>(
            a, rows, row_of_a, {p.b, panel, p.depth, k},
            {p.c + row * p.c_stride + column, p.c_stride, p.columns - column, p.accumulate || k > 0});
      }
    }
    task += end - begin;
  }
}

template <int P>
constexpr int64_t kPartedScratch =
    kPartedGroup * PartedPanel<P, 4>::size(kPartedDepth) + PartedRows<P>::size(kPartedBlock, kPartedDepth);

// multiply_unpacked on tile registers.
template <int P>
void multiply_parted_unpacked(const Product<float>& p, int64_t first, int64_t last, float* scratch) {
  if (first >= last) return;
  const BlockTasks tasks(p.rows, kPartedBlock, p.columns, kPanel<float>, first, last);
  const int64_t panel_end = tasks.panel_end();
  float* const a_memory = scratch + kPartedGroup * PartedPanel<P, 4>::size(kPartedDepth);
  const TileSession session;
  for (int64_t group = tasks.panel_begin(); group < panel_end; group += kPartedGroup) {
    const int64_t group_end = at_most(group + kPartedGroup, panel_end);
    for (int64_t k = 0; k == 0 || k < p.depth; k += kPartedDepth) {
      const int64_t depth = at_most(p.depth - k, kPartedDepth);
      with_rows(p, [&](const auto& b) {
        for (int64_t panel = group; panel < group_end; ++panel)
          part_columns<P>(b, k, depth, p.columns, panel * kPanel<float>,
                          scratch + (panel - group) * PartedPanel<P, 4>::size(depth));
      });
      const PartedRows<P> a(a_memory, kPartedBlock, depth);
      for (int64_t block = 0; block < tasks.blocks; ++block) {
        const int64_t row = block * kPartedBlock, rows = at_most(p.rows - row, kPartedBlock);
        const StridedRows a_rows = {p.a + k * p.a_depth + row, p.a_depth};
        bool filled = false;
        for (int64_t panel = group; panel < group_end; ++panel) {
          if (!tasks.has(panel, block)) continue;
          const int64_t column = panel * kPanel<float>;
          if (!filled) a.fill_columns(rows, a_rows);
          filled = true;
          multiply_block<P>(
              a, rows, a_rows, {scratch, panel - group, depth},
              {p.c + row * p.c_stride + column, p.c_stride, p.columns - column, p.accumulate || k > 0});
        }
      }
    }
  }
}

template <int P, typename Cell>
constexpr cnnrnn::CellKernels<float> parted_cell() {
  cnnrnn::CellKernels<float> k{};
  k.gates = Cell::kGates, k.parts = Cell::kParts, k.kept = Cell::kKept, k.joint = Cell::kJoint;
  k.has_c = Cell::kHasC, k.has_carry = Cell::kHasCarry, k.takes_bf16 = true;
  k.panel_units = kPanelUnits<float, Cell>, k.tile_rows = kTileSide, k.band_rows = kPartedRows;
  k.packed = packed_parts<P, kVectorsOf<Cell>>, k.scratch = scratch_parted<P, Cell>;
  k.project_scratch = [](int64_t, int64_t input) { return PartedRows<P>::size(kPartedRows, input); };
  k.pack_gates = part_gates<P, Cell, float>, k.pack_gates_bf16 = part_gates<P, Cell, Bf16>;
  k.pack_bias = pack_bias<float, Cell>;
  k.project = project_parted<P, Cell>, k.forward = forward_parted<P, Cell>;
  k.backward = backward_parted<P, Cell>;
  return k;
}

template <int P>
constexpr cnnrnn::RnnKernels<float> parted_kernels() {
  return {kLanes,
          kTileSide,
          kPartedBlock,
          kPartedBlock,
          packed_parts<P, 4>,
          part_columns_of<P, float>,
          part_columns_of<P, Bf16>,
          multiply_parted_columns<P>,
          multiply_scratch_parted<P>,
          multiply_parted_unpacked<P>,
          kPartedScratch<P>,
          sum_rows<float>,
          {parted_cell<P, LstmUnits>(), parted_cell<P, GruUnits>(), parted_cell<P, ElmanUnits<ElmanTanh>>(),
           parted_cell<P, ElmanUnits<ElmanRelu>>()}};
}

}  // namespace
