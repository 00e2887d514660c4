// Packing, and the matrix products outside the scan: gradients of the input and of the weights.
#pragma once

#include "rnn_tile.h"

namespace {

using cnnrnn::Product;

// A panel's slice of this depth stays in the first-level cache while every tile of rows passes over it;
// partial sums of such slices also keep the rounding error of long sums down.
constexpr int64_t kDepthBlock = 128;

template <typename T>
CNNRNN_INLINE void pack_panel(const T* b, int64_t stride, int64_t depth, int64_t columns, T* out) {
  constexpr int L = kLanesOf<T>;
  for (int64_t k = 0; k < depth; ++k)
    for (int v = 0; v < 4; ++v)
      storeu(out + (k * 4 + v) * L, load_n(b + k * stride + v * L, valid(columns, v * L, L)));
}

template <typename T>
void pack_columns(const T* b, int64_t stride, int64_t depth, int64_t columns, int64_t first, int64_t last,
                  T* out) {
  for (int64_t p = first; p < last; ++p)
    pack_panel(b + p * kPanel<T>, stride, depth, columns - p * kPanel<T>, out + p * depth * kPanel<T>);
}

template <typename T>
void pack_gates(const T* w, int64_t hidden, int64_t depth, int64_t first, int64_t last, T* out) {
  constexpr int L = kLanesOf<T>;
  for (int64_t p = first; p < last; ++p) {
    T* panel = out + p * depth * kPanel<T>;
    const int64_t n = valid(hidden, p * L, L);
    for (int g = 0; g < 4; ++g) {
      const T* rows = w + (g * hidden + p * L) * depth;
      for (int64_t k = 0; k < depth; ++k) {
        T* line = panel + (k * 4 + g) * L;
        for (int64_t l = 0; l < L; ++l) line[l] = l < n ? rows[l * depth + k] : T(0);
      }
    }
  }
}

template <typename T>
void pack_bias(const T* ih, const T* hh, int64_t hidden, T* out) {
  constexpr int L = kLanesOf<T>;
  for (int64_t unit = 0; unit < hidden; unit += L) {
    const int64_t n = valid(hidden, unit, L);
    for (int g = 0; g < 4; ++g) {
      const int64_t at = g * hidden + unit;
      storeu(out + unit * 4 + g * L, load_n(ih + at, n) + load_n(hh + at, n));
    }
  }
}

template <typename T, bool kByRow>
struct ProductTile {
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t depth;
  T* c;
  int64_t c_stride, columns;
  bool accumulate;

  template <int Rows>
  void run(int64_t row) const {
    constexpr int L = kLanesOf<T>;
    Vec<T> acc[Rows][4] = {};
    multiply_tile<T, Rows, kByRow>(acc, a + row * (kByRow ? a_stride : 1), a_stride, b, depth);
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < 4; ++v) {
        const int64_t n = valid(columns, v * L, L);
        T* to = c + (row + r) * c_stride + v * L;
        if (n == 0) break;
        store_n(to, accumulate ? load_n(to, n) + acc[r][v] : acc[r][v], n);
      }
    }
  }
};

// Panel by panel, and in a panel slice by slice of the depth; the tasks of one panel are its tiles of rows.
template <typename T, bool kPacked, bool kByRow>
CNNRNN_INLINE void product_tasks(const Product<T>& p, int64_t first, int64_t last, T* scratch) {
  const int64_t tiles = tiles_of(p.rows);
  while (first < last) {
    const int64_t panel = first / tiles, column = panel * kPanel<T>;
    const int64_t end = (panel + 1) * tiles < last ? (panel + 1) * tiles : last;
    for (int64_t k = 0; k == 0 || k < p.depth; k += kDepthBlock) {
      const int64_t depth = p.depth - k < kDepthBlock ? p.depth - k : kDepthBlock;
      const T* b = scratch;
      if constexpr (kPacked)
        b = p.b + (panel * p.depth + k) * kPanel<T>;
      else
        pack_panel(p.b + k * p.b_stride + column, p.b_stride, depth, p.columns - column, scratch);
      const ProductTile<T, kByRow> tile = {
          p.a + k * p.a_depth, kByRow ? p.a_row : p.a_depth, b, depth, p.c + column, p.c_stride,
          p.columns - column,  p.accumulate || k > 0};
      for (int64_t task = first; task < end; ++task) dispatch_tile(p.rows, task - panel * tiles, tile);
    }
    first = end;
  }
}

template <typename T>
void multiply_packed(const Product<T>& p, int64_t first, int64_t last) {
  product_tasks<T, true, true>(p, first, last, nullptr);
}

template <typename T>
void multiply_unpacked(const Product<T>& p, int64_t first, int64_t last, T* scratch) {
  product_tasks<T, false, false>(p, first, last, scratch);
}

template <typename T>
void sum_rows(const T* a, int64_t stride, int64_t depth, int64_t first, int64_t last, T* out) {
  constexpr int L = kLanesOf<T>;
  for (int64_t m = first; m < last; m += L) {
    const int64_t n = valid(last, m, L);
    // Two levels of partial sums, as in the products.
    Vec<T> total{};
    for (int64_t k = 0; k < depth; k += kDepthBlock) {
      const int64_t end = k + kDepthBlock < depth ? k + kDepthBlock : depth;
      Vec<T> sum{};
      for (int64_t i = k; i < end; ++i) sum += load_n(a + i * stride + m, n);
      total += sum;
    }
    store_n(out + m, total, n);
  }
}

}  // namespace
