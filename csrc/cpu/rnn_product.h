// Packing, and the matrix products outside the scan: gradients of the input and of the weights.
#pragma once

#include "bf16.h"
#include "rnn_step.h"

namespace {

using cnnrnn::Product;

// Products whose A is contiguous by column go slice by slice of the depth. Of a slice, some panels of B and
// a block of A's columns (rows of the product) are copied side by side: A comes with a stride that would
// touch a new page at every depth, and each copy serves many tiles.
// A panel of such a slice and a block of A fit the first-level cache together.
constexpr int64_t kDepthBlock = 96;
constexpr int64_t kPanelGroup = 8;
constexpr int64_t kRowBlock = 8 * kTileRows;

template <typename T>
constexpr int64_t kProductScratch = kDepthBlock * (kPanelGroup * kPanel<T> + kRowBlock);

// Row k of a row-major B, whose elements are T or narrower.
template <typename B>
struct MatrixRows {
  const B* first;
  int64_t stride;
  const B* const* each;  // where each row begins, or null
  CNNRNN_INLINE const B* operator()(int64_t k) const { return each ? each[k] : first + k * stride; }
};

// Calls f with the rows of an unpacked B.
template <typename T, typename F>
CNNRNN_INLINE void with_rows(const Product<T>& p, const F& f) {
  if constexpr (sizeof(T) == sizeof(float))
    if (p.b_bf16) return f(MatrixRows<Bf16>{p.b_bf16, p.b_stride, nullptr});
  f(MatrixRows<T>{p.b, p.b_stride, p.b_rows});
}

// 4 vectors of columns from `column` on, of `depth` rows from `from` on.
template <typename T, typename B>
CNNRNN_INLINE void pack_panel(const MatrixRows<B>& b, int64_t from, int64_t depth, int64_t columns,
                              int64_t column, T* out) {
  constexpr int L = kLanesOf<T>;
  for (int64_t k = 0; k < depth; ++k) {
    const B* row = b(from + k) + column;
    for (int v = 0; v < 4; ++v)
      storeu(out + (k * 4 + v) * L, load_n(row + v * L, valid(columns - column, v * L, L)));
  }
}

template <typename T, typename B>
void pack_columns(const B* b, int64_t stride, int64_t depth, int64_t columns, int64_t first, int64_t last,
                  T* out) {
  for (int64_t p = first; p < last; ++p)
    pack_panel<T, B>({b, stride, nullptr}, 0, depth, columns, p * kPanel<T>, out + p * depth * kPanel<T>);
}

template <typename T>
int64_t packed_columns(int64_t panels, int64_t depth) {
  return panels * depth * kPanel<T>;
}

template <typename T, typename Cell>
int64_t packed_gates(int64_t panels, int64_t depth) {
  return panels * depth * kVectorsOf<Cell> * kLanesOf<T>;
}

template <typename T, typename Cell, typename W>
void pack_gates(const W* w, int64_t hidden, int64_t depth, int64_t first, int64_t last, T* out) {
  constexpr int L = kLanesOf<T>, U = Cell::kUnitVectors, V = kVectorsOf<Cell>;
  for (int64_t p = first; p < last; ++p) {
    T* panel = out + p * depth * V * L;
    for (int64_t k = 0; k < depth; k += L) {
      const int64_t width = valid(depth, k, L);
      for (int v = 0; v < V; ++v) {
        const int64_t unit = (p * U + v % U) * L, n = valid(hidden, unit, L);
        const W* from = w + (v / U * hidden + unit) * depth + k;
        Vec<T> rows[L];
        for (int l = 0; l < L; ++l) rows[l] = l < n ? load_n(from + l * depth, width) : Vec<T>{};
        transpose<T>(rows);
        T* to = panel + (k * V + v) * L;
        for (int l = 0; l < L; ++l)
          if (l < width) storeu(to + l * V * L, rows[l]);
      }
    }
  }
}

// [panels][parts][panel_units]: the two bias vectors' sum, or each by itself where the parts stand apart.
template <typename T, typename Cell>
void pack_bias(const T* ih, const T* hh, int64_t hidden, T* out) {
  constexpr int L = kLanesOf<T>;
  const auto take = [&](const T* bias, int g, int64_t unit) {
    return load_n(bias + g * hidden + unit, valid(hidden, unit, L));
  };
  for (int64_t panel = 0; panel * kPanelUnits<T, Cell> < hidden; ++panel)
    for (int u = 0; u < Cell::kUnitVectors; ++u) {
      const int64_t unit = panel * kPanelUnits<T, Cell> + u * L;
      T* to = out + panel * Cell::kParts * kPanelUnits<T, Cell> + u * L;
      for (int g = 0; g < Cell::kGates; ++g) {
        const bool joint = g < Cell::kJoint;
        storeu(to + g * kPanelUnits<T, Cell>,
               joint ? take(ih, g, unit) + take(hh, g, unit) : take(ih, g, unit));
        if (!joint) storeu(to + (g + Cell::kGates - Cell::kJoint) * kPanelUnits<T, Cell>, take(hh, g, unit));
      }
    }
}

// Where a product goes: `columns` of them, beginning at c.
template <typename T>
struct ProductColumns {
  T* c;
  int64_t stride, columns;
  bool accumulate;

  CNNRNN_INLINE void prefetch_row(int64_t row) const {
    for (int v = 0; v < 4; ++v) prefetch_to_write(c + row * stride + v * kLanesOf<T>);
  }
  CNNRNN_INLINE void store(int64_t row, const Vec<T> (&sum)[4]) const {
    constexpr int L = kLanesOf<T>;
    for (int v = 0; v < 4; ++v) {
      const int64_t n = valid(columns, v * L, L);
      T* to = c + row * stride + v * L;
      if (n == 0) break;
      store_n(to, accumulate ? load_n(to, n) + sum[v] : sum[v], n);
    }
  }
};

// Tasks: bands of rows x panels of B.
template <typename T>
void multiply_packed(const Product<T>& p, int64_t first, int64_t last, T*) {
  const int64_t panels = (p.columns + kPanel<T> - 1) / kPanel<T>;
  for_panels_of_bands<4>(p.rows, panels, first, last, [&](int64_t panel, int64_t row, int64_t rows) {
    const int64_t column = panel * kPanel<T>;
    const ProductColumns<T> to = {p.c + row * p.c_stride + column, p.c_stride, p.columns - column,
                                  p.accumulate};
    const T* a[kBandRows<4>];
    for (int64_t r = 0; r < rows; ++r) a[r] = p.a_rows ? p.a_rows[row + r] : p.a + (row + r) * p.a_row;
    const T* b = p.b + panel * p.depth * kPanel<T>;
    BandSums<T, 4> sums;
    multiply_band(sums, rows, a, b, p.a_split, Into::kSet, [&](int64_t r) { to.prefetch_row(r); });
    if (p.a_split < p.depth) {
      for (int64_t r = 0; r < rows; ++r) a[r] += p.a_split + p.a_skip;
      multiply_band(sums, rows, a, b + p.a_split * kPanel<T>, p.depth - p.a_split, Into::kAdd);
    }
    for (int64_t r = 0; r < rows; ++r) to.store(r, sums.of[r]);
  });
}

template <typename T>
struct ColumnTile {
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t depth;
  ProductColumns<T> to;

  template <int Rows>
  void run(int64_t row) const {
    for (int r = 0; r < Rows; ++r) to.prefetch_row(row + r);
    Vec<T> acc[Rows][4];
    multiply_columns<T, Rows>(acc, a + row, a_stride, b, depth);
    for (int r = 0; r < Rows; ++r) to.store(row + r, acc[r]);
  }
};

template <typename T>
CNNRNN_INLINE void copy_columns(const T* a, int64_t stride, int64_t depth, int64_t columns, T* out) {
  constexpr int L = kLanesOf<T>;
  static_assert(kRowBlock % kLanesOf<T> == 0, "a block of A is whole vectors");
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t m = 0; m < kRowBlock; m += L)
      storeu(out + k * kRowBlock + m, load_n(a + k * stride + m, valid(columns, m, L)));
}

// Tasks of a product with an unpacked B: panels of B x blocks of rows, numbered so that whoever takes some
// side by side shares few of the larger operand's columns with others.
struct BlockTasks {
  int64_t panels, blocks, first, last;
  bool by_block;

  CNNRNN_INLINE BlockTasks(int64_t rows, int64_t row_block, int64_t columns, int64_t panel, int64_t first,
                           int64_t last)
      : panels((columns + panel - 1) / panel),
        blocks((rows + row_block - 1) / row_block),
        first(first),
        last(last),
        by_block(rows > columns) {}
  CNNRNN_INLINE bool has(int64_t panel, int64_t block) const {
    const int64_t task = by_block ? block * panels + panel : panel * blocks + block;
    return task >= first && task < last;
  }
  // All tasks lie in these panels.
  CNNRNN_INLINE int64_t panel_begin() const {
    return !by_block ? first / blocks : first / panels == (last - 1) / panels ? first % panels : 0;
  }
  CNNRNN_INLINE int64_t panel_end() const {
    if (!by_block) return (last - 1) / blocks + 1;
    return first / panels == (last - 1) / panels ? (last - 1) % panels + 1 : panels;
  }
};

template <typename T>
void multiply_unpacked(const Product<T>& p, int64_t first, int64_t last, T* scratch) {
  if (first >= last) return;
  const BlockTasks tasks(p.rows, kRowBlock, p.columns, kPanel<T>, first, last);
  T* const a_block = scratch + kDepthBlock * kPanelGroup * kPanel<T>;
  const int64_t panel_end = tasks.panel_end();
  for (int64_t group = tasks.panel_begin(); group < panel_end; group += kPanelGroup) {
    const int64_t group_end = group + kPanelGroup < panel_end ? group + kPanelGroup : panel_end;
    for (int64_t k = 0; k == 0 || k < p.depth; k += kDepthBlock) {
      const int64_t depth = p.depth - k < kDepthBlock ? p.depth - k : kDepthBlock;
      with_rows(p, [&](const auto& b) {
        for (int64_t panel = group; panel < group_end; ++panel)
          pack_panel<T>(b, k, depth, p.columns, panel * kPanel<T>,
                        scratch + (panel - group) * kDepthBlock * kPanel<T>);
      });
      for (int64_t block = 0; block < tasks.blocks; ++block) {
        const int64_t row = block * kRowBlock;
        const int64_t rows = p.rows - row < kRowBlock ? p.rows - row : kRowBlock;
        bool copied = false;
        for (int64_t panel = group; panel < group_end; ++panel) {
          if (!tasks.has(panel, block)) continue;
          const int64_t column = panel * kPanel<T>;
          if (!copied) copy_columns(p.a + k * p.a_depth + row, p.a_depth, depth, rows, a_block);
          copied = true;
          const ColumnTile<T> tile = {
              a_block,
              kRowBlock,
              scratch + (panel - group) * kDepthBlock * kPanel<T>,
              depth,
              {p.c + row * p.c_stride + column, p.c_stride, p.columns - column, p.accumulate || k > 0}};
          for_tiles(rows, tile);
        }
      }
    }
  }
}

template <typename T>
void sum_rows(const T* a, int64_t stride, int64_t depth, int64_t first, int64_t last, T* out) {
  constexpr int L = kLanesOf<T>, V = 4;  // vectors side by side: whole stretches of a row are read
  for (int64_t m = first; m < last; m += V * L) {
    // Two levels of partial sums, as in the products.
    Vec<T> total[V] = {};
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      const int64_t end = k + kDepthBlock < depth ? k + kDepthBlock : depth;
      Vec<T> sum[V] = {};
      for (int64_t i = k; i < end; ++i)
        for (int v = 0; v < V; ++v) sum[v] += load_n(a + i * stride + m + v * L, valid(last, m + v * L, L));
      for (int v = 0; v < V; ++v) total[v] += sum[v];
    }
    for (int v = 0; v < V; ++v) store_n(out + m + v * L, total[v], valid(last, m + v * L, L));
  }
}

}  // namespace
